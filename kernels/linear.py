"""Matrix product, with bias or onto a residual, and convolution: y = x W^T + b.

On CPUs without bfloat16 or float16 arithmetic torch computes these in software, 4 times slower than converting the
operands to float32 first (320 rows, 1536 to 8960, two AVX2 cores). A few rows are not worth converting a matrix for.
"""

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

FEW_ROWS = 32


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., K), weight (N, K), bias (N) in one dtype; returns (..., N)."""
    if x.numel() // x.shape[-1] < FEW_ROWS or not in_software(x):
        return F.linear(x, weight, bias)
    return F.linear(x.float(), weight.float(), None if bias is None else bias.float()).to(x.dtype)


def linear_onto(residual: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """residual + x W^T, shaped as residual (..., N), in whose place it may be made where no gradients are wanted.

    The product adds to what is there: a pass over memory and a rounding less than a sum behind it.
    """
    if torch.is_grad_enabled() or in_software(x) or not residual.is_contiguous():
        return residual + linear(x, weight)
    residual.view(-1, len(weight)).addmm_(x.reshape(-1, x.shape[-1]), weight.t())
    return residual


def conv2d(x: Tensor, weight: Tensor, bias: Tensor, stride: int = 1, padding: int | tuple[int, int] = 0) -> Tensor:
    """x (B, C, h, w), weight (N, C, k, k), bias (N) in one dtype."""
    if not in_software(x):
        return F.conv2d(x, weight, bias, stride, padding)
    return F.conv2d(x.float(), weight.float(), bias.float(), stride, padding).to(x.dtype)


def in_software(x: Tensor) -> bool:
    """Whether torch has to emulate the arithmetic of x's dtype where x is."""
    return x.device.type == "cpu" and x.dtype in (torch.bfloat16, torch.float16) and not _native(x.dtype)


@cache
def _native(dtype: torch.dtype) -> bool:
    name = "_is_mkldnn_bf16_supported" if dtype == torch.bfloat16 else "_is_mkldnn_fp16_supported"
    try:
        return bool(getattr(torch.ops.mkldnn, name)())
    except (AttributeError, RuntimeError):  # a torch without oneDNN: whatever it does is all there is
        return True
