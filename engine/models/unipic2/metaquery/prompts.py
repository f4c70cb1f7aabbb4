"""Prompt templates of UniPic2-MetaQuery: those of Qwen2.5-VL without its system turn; prompts are used as typed."""

from ...deepgen.prompts import PICTURE, TURN


def turn(kind: str, text: str, pictures: int = 0) -> str:
    """The prompt of a row, with one placeholder for each picture."""
    return TURN.format(f"Generate an image: {text}" if kind == "generate" else PICTURE * pictures + text)
