"""Sizes of pictures, and what the model cannot do: checked before any work, since nothing fails loudly later."""

import math
from collections.abc import Mapping, Sequence

from PIL import Image

from ...checks import PATCH
from ...errors import UsageError
from ...picture import resize
from ...task import Task
from ...tokens import Tokens
from ..context import room_behind
from .config import DeepGenConfig, DiTConfig
from .prompts import IMAGE, as_ids, avoided, turn
from .vision import MERGE, PIXELS
from .vision import PATCH as SEEN

SPECIAL = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", IMAGE)
CELL = SEEN * MERGE  # pixels of a token's side where Qwen2.5-VL looks at a picture as it was trained to


def max_image_tokens(config: DeepGenConfig) -> int:
    """Of the result and its sources together; each is bounded by the table of positions besides."""
    return 2 * config.dit.table**2


def fitted_size(size: tuple[int, int], fit: str, res: int) -> tuple[int, int]:
    """(width, height) of a source, multiples of 32. keep: the area of res squared, as in training; longest: a longer
    side of res, and smaller pictures as they are, as the released command does it; crop: a square.
    """
    width, height = size
    if fit == "crop":
        return _up(res), _up(res)
    if fit == "longest" and max(size) < res:
        return _up(width), _up(height)
    if fit == "longest":
        ratio = res / max(size)
        return (_up(res), _up(height * ratio)) if width >= height else (_up(width * ratio), _up(res))
    ratio = res / math.sqrt(width * height)
    return _up(width * ratio), _up(height * ratio)


def _up(side: float) -> int:
    return max(1, math.ceil(side / PIXELS)) * PIXELS


def question_size(config: DeepGenConfig, size: tuple[int, int], res: int) -> tuple[int, int]:
    """(width, height) of the picture that the model sees of one of that size: at most the area of res squared.

    Sides are multiples of 28, as Qwen2.5-VL takes them; small pictures are not enlarged.
    """
    width, height = size
    shrink = math.sqrt(width * height) / res
    fitted = [side / max(1.0, shrink) / CELL for side in size]
    fitted = [math.floor(side) if shrink > 1 else round(side) for side in fitted]
    most = max(1, res * res // CELL**2)  # beyond it even the thinnest strip has more than the area
    return tuple(CELL * min(most, max(1, side)) for side in fitted)


def question_picture(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    return resize(image, size)


def check_prompts(config: DeepGenConfig, tokens: Tokens, task: Task, prompts: Sequence[str]) -> None:
    """Raise UsageError for sizes beyond the tables, prompts that do not fit, and options of other families."""
    check_task(config.dit, task)
    count = len(task.sources)
    texts = {turn(task.kind, prompt, count): prompt for prompt in prompts}
    texts[turn(task.kind, avoided(task), count)] = task.negative or ""
    check_texts(config, tokens, task, texts)


def check_task(dit: DiTConfig, task: Task) -> None:
    """Raise UsageError for sizes beyond the table, and options of other families."""
    if task.guidance < 1.0:
        raise UsageError(f"guidance {task.guidance:g} is below 1", "use 1, which turns it off, or more")
    for name, value, only in (("temperature", task.temperature, 1.0), ("cfg_schedule", task.cfg_schedule, "constant")):
        if value != only:
            raise UsageError(f"{name} {value} has no meaning for this model", f"leave it at {only}")
    sizes = [(task.columns * PATCH, task.rows * PATCH), *((x.shape[3], x.shape[2]) for x in task.sources)]
    most = dit.table * PATCH
    for width, height in sizes:
        if max(width, height) > most:
            raise UsageError(f"a picture of {width}x{height}, and sides have at most {most} pixels", "make it smaller")


def check_texts(config: DeepGenConfig, tokens: Tokens, task: Task, texts: Mapping[str, str]) -> None:
    """Raise UsageError for prompts that do not fit; `texts` maps them, in their templates, to what the user said."""
    grids = [(x.shape[2] // PIXELS, x.shape[3] // PIXELS) for x in task.sources]
    for text, said in texts.items():
        refuse_special(said)
        used = len(as_ids(tokens, text, config.image_token, grids)) + config.connector.queries
        if used > config.llm.max_positions:
            what = f"a prompt with its pictures takes {used} positions, the model has {config.llm.max_positions}"
            raise UsageError(what, "shorten the prompt, or give fewer or smaller pictures")


def check_question(config: DeepGenConfig, tokens: Tokens, size: tuple[int, int], question: str, limit: int) -> int:
    """Positions behind the picture that a question and its answer may take. Raises UsageError if they are too few."""
    refuse_special(question)
    before, _, after = (tokens.encode(part) for part in turn("ask", question, 1).partition(IMAGE))
    return room_behind(before, size[0] // CELL * (size[1] // CELL), after, limit, config.llm.max_positions)


def refuse_special(text: str) -> None:
    """A user's text must not end its turn, nor claim pictures that do not exist."""
    for name in SPECIAL:
        if name in text:
            raise UsageError(f"the text contains {name}, which has a meaning of its own to the model", "leave it out")
