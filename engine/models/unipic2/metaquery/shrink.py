"""Pictures made smaller exactly as Pillow's bicubic filter does it, which the released model was shown.

A level of the result is the sum of levels within two results' distance, by Keys' cubic (a = -1/2) of that distance, in
multiples of 2^-22, rounded. Everything is exact in float64. First along the rows, then along the columns.
"""

import torch
from torch import Tensor

from ...deepgen.vision import MERGE, PATCH, PIXELS

SUPPORT, A, STEPS = 2.0, -0.5, 2.0**22


def smaller(pixels: Tensor) -> Tensor:
    """pixels (1, 3, H, W) in [-1, 1], each of 256 levels, to float32 of 28 pixels for 32."""
    levels = ((pixels.double() + 1) * 127.5).round()
    levels = shrunk(shrunk(levels).mT).mT
    return (levels / 127.5 - 1).float()


def shrunk(levels: Tensor) -> Tensor:
    """Rows of levels (..., W) float64 to (..., W')."""
    weights = weights_of(levels.shape[-1], levels.shape[-1] * PATCH * MERGE // PIXELS)
    return (levels @ weights.to(levels.device).T + 0.5).floor().clamp(0, 255)


def weights_of(size: int, smaller: int) -> Tensor:
    """(smaller, size) float64 on the CPU; beyond the edges there is nothing."""
    scale = size / smaller
    centre = (torch.arange(smaller, dtype=torch.float64)[:, None] + 0.5) * scale
    at = torch.arange(size, dtype=torch.float64)
    first, end = (centre - SUPPORT * scale + 0.5).floor(), (centre + SUPPORT * scale + 0.5).floor()
    weights = cubic((at + 0.5 - centre) / scale) * ((at >= first) & (at < end))
    weights = weights / weights.sum(1, keepdim=True) * STEPS
    return (weights.abs() + 0.5).floor() * weights.sign() / STEPS


def cubic(x: Tensor) -> Tensor:
    """Keys' kernel (doi 10.1109/TASSP.1981.1163711)."""
    x = x.abs()
    inner = ((A + 2) * x - (A + 3)) * x * x + 1
    outer = (((x - 5) * x + 8) * x - 4) * A
    return torch.where(x < 1, inner, torch.where(x < 2, outer, 0.0))
