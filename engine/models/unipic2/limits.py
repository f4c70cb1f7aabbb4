"""Sizes of UniPic-2's edits."""

from ..deepgen.vision import PIXELS


def fitted_size(size: tuple[int, int], fit: str, res: int) -> tuple[int, int]:
    """(width, height) of a source, multiples of 32. longest: a longer side of res, the shorter one rounded to the
    nearest such number; crop: a square.
    """
    side = max(1, -(-res // PIXELS)) * PIXELS
    ratio = side / max(size)
    width, height = size if fit == "longest" else (max(size), max(size))
    return _nearest(width * ratio), _nearest(height * ratio)


def _nearest(side: float) -> int:
    return max(1, round(side / PIXELS)) * PIXELS
