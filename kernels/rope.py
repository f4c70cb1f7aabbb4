"""Rotary position embedding, half-split pairing (i, i + d/2), as in Qwen2."""

import torch
from torch import Tensor


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (R, H, L, d); cos, sin (R, 1, L, d), both halves filled: x cos + rotate_half(x) sin."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin
