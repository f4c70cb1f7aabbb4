"""Prompt templates of DeepGen 1.0: which text stands for which task. No system turn, except to answer questions."""

from collections.abc import Callable, Sequence

from ...task import Task
from ...tokens import Tokens

TURN = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"  # of Qwen2.5-VL, where it answers
IMAGE = "<|image_pad|>"  # one special token, repeated for every token of a picture
PICTURE = f"<|vision_start|>{IMAGE}<|vision_end|>"

# What an edit is steered away from where the user says nothing; the words are part of the released model.
UNWANTED = (
    "blurry, low quality, low resolution, distorted, deformed, broken content, missing parts, damaged details, "
    "artifacts, glitch, noise, pixelated, grainy, compression artifacts, bad composition, wrong proportion, "
    "incomplete editing, unfinished, unedited areas."
)


def turn(kind: str, text: str, pictures: int = 0) -> str:
    """The prompt of a row, with one placeholder for each picture."""
    if kind == "generate":
        return TURN.format(f"Generate an image: {text.strip()}")
    if kind == "edit":
        return TURN.format(f"{PICTURE * pictures}\n{text.strip()}")
    return SYSTEM + TURN.format(PICTURE * pictures + text)


def avoided(task: Task) -> str:
    """What its pictures are steered away from, in no template."""
    usual = UNWANTED if task.kind == "edit" else ""
    return usual if task.negative is None else task.negative


def texts_of(task: Task, prompts: Sequence[str], turn: Callable[[str, str, int], str] = turn) -> list[tuple[str, str]]:
    """Of each picture its prompt and what is to be avoided, in the templates that `turn` has."""
    count = len(task.sources)
    negative = turn(task.kind, avoided(task), count)
    return [(turn(task.kind, prompt, count), negative) for prompt in prompts]


def as_ids(tokens: Tokens, text: str, image_token: int, grids: Sequence[tuple[int, int]]) -> list[int]:
    """Token ids, each placeholder repeated for the (rows, columns) tokens of its picture."""
    first, *rest = text.split(IMAGE)
    ids = tokens.encode(first)
    for (rows, columns), piece in zip(grids, rest, strict=True):
        ids += [image_token] * (rows * columns) + tokens.encode(piece)
    return ids
