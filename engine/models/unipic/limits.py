"""Sizes of pictures, and what fits the LLM's context: checked before any work, since nothing fails loudly later."""

from collections.abc import Sequence

from PIL import Image

from ...checks import PATCH
from ...errors import UsageError
from ...picture import fit_area, pad_square
from ...task import Task
from ...tokens import Tokens
from ..context import room_behind
from .config import UniPicConfig
from .prompts import IMAGE, turn, unconditional_turn

PROMPT_ROOM = 512  # positions kept free for a prompt when the largest picture is asked for


def max_image_tokens(config: UniPicConfig) -> int:
    """The most latent tokens a masked edit can have."""
    return config.llm.max_positions - config.mar.buffer - PROMPT_ROOM


def fitted_size(size: tuple[int, int], fit: str, res: int) -> tuple[int, int]:
    """(width, height) of an edit's source."""
    return (res, res) if fit == "crop" else fit_area(*size, res)


def question_size(config: UniPicConfig, size: tuple[int, int], res: int) -> tuple[int, int]:
    """(width, height) of the picture that the model sees of one of that size: always a square."""
    return res, res


def question_picture(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Padded to a square, as the released script does it."""
    return pad_square(image, size[0])


def check_prompts(config: UniPicConfig, tokens: Tokens, task: Task, prompts: Sequence[str]) -> None:
    """Raise UsageError for a prompt that does not fit beside the picture, or that holds the image placeholder."""
    picture = task.rows * task.columns + config.mar.buffer
    texts = {turn(task.kind, prompt): prompt for prompt in prompts}
    texts[unconditional_turn(task.kind, task.negative)] = task.negative or ""
    for text, said in texts.items():
        refuse_placeholder(said)
        images = 1 + text.count(IMAGE)  # the one to make, and the source of an edit
        words = len(tokens.encode(text)) - text.count(IMAGE)
        used = words + images * picture
        if used > config.llm.max_positions:
            size = f"{task.columns * PATCH}x{task.rows * PATCH}"
            raise UsageError(
                f"a prompt of {words} tokens with a picture of {size} takes {used} positions, "
                f"the model has {config.llm.max_positions}",
                "shorten the prompt or make the picture smaller",
            )


def check_question(config: UniPicConfig, tokens: Tokens, size: tuple[int, int], question: str, limit: int) -> int:
    """Positions behind the image that a question and its answer may take. Raises UsageError if there are not enough."""
    refuse_placeholder(question)
    before, _, after = (tokens.encode(part) for part in turn("ask", question).partition(IMAGE))
    picture = size[0] // PATCH * (size[1] // PATCH) + config.mar.buffer
    return room_behind(before, picture, after, limit, config.llm.max_positions)


def refuse_placeholder(text: str) -> None:
    """A user's text must not claim image features that do not exist."""
    if IMAGE in text:
        raise UsageError(f"the text contains {IMAGE}, which the model reserves for image features", "leave it out")
