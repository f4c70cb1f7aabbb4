"""What kernels/int8_linear.py and kernels/int8_weight.py share: all but the sums of their products.

On the device how a tile's columns are laid out and what follows its sums; on the host the same in torch, what is
checked, what it costs, and the operands of their cases.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ._device import activate
from ._op import Cost, tl, triton
from .quantise import activated, activation_flags

LARGEST_K = 131072  # products of 127 * 127 whose sum fits int32


def out_features(weight: Tensor, activation: str) -> int:
    return len(weight) // 2 if activation == "swiglu" else len(weight)


def epilogue_options(
    n: int, bias: Tensor | None, activation: str, residual: Tensor | None, gate: Tensor | None
) -> dict[str, int | bool]:
    """The constexprs of `epilogue`."""
    given = {"BIAS": bias is not None, "RESIDUAL": residual is not None, "GATE": gate is not None}
    return {"N": n, **given, **activation_flags(activation)}


def finished(
    y: Tensor, bias: Tensor | None, activation: str, residual: Tensor | None, gate: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """residual + gate * activation(y + bias) in y's dtype, rounded to `dtype`. y (..., N) or (..., 2 N) for swiglu."""
    y = activated(y if bias is None else y + bias.to(y.dtype), activation)
    if gate is not None:
        group = y.numel() // y.shape[-1] // max(len(gate), 1)
        y = y * gate.to(y.dtype).repeat_interleave(group, dim=0).view(y.shape)
    return (y if residual is None else residual.to(y.dtype) + y).to(dtype)


def product_cost(operands: Sequence[Tensor | None], weight: Tensor, activation: str, dtype: torch.dtype) -> Cost:
    """Of any product x W^T of this form; the operands are whatever is read, x the first of them."""
    rows, k = operands[0].numel() // operands[0].shape[-1], operands[0].shape[-1]
    read = sum(t.numel() * t.element_size() for t in operands if t is not None)
    return Cost(2 * rows * len(weight) * k, read + rows * out_features(weight, activation) * dtype.itemsize)


def check_product(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    activation: str,
    residual: Tensor | None,
    gate: Tensor | None,
) -> None:
    """ValueError where shapes or layouts do not fit, before a kernel reads what is not there."""
    activation_flags(activation)
    if weight.shape[1] != x.shape[-1] or weight.shape[1] > LARGEST_K or not weight.is_contiguous():
        raise ValueError(
            f"x {tuple(x.shape)} and weight {tuple(weight.shape)} with strides {weight.stride()}: their last "
            f"dimensions have to agree and be at most {LARGEST_K}, and the weight has to be contiguous"
        )
    rows, n = x.numel() // x.shape[-1], out_features(weight, activation)
    expected = {"weight_scale": (weight_scale, (len(weight),)), "bias": (bias, (len(weight),))}
    expected |= {"residual": (residual, (*x.shape[:-1], n))}
    for name, (given, shape) in expected.items():
        if given is not None and given.shape != shape:
            raise ValueError(f"{name} is {tuple(given.shape)}, not {shape}")
    if gate is not None and (gate.shape[1] != n or rows % max(len(gate), 1) or gate.stride(1) != 1):
        raise ValueError(f"gate is {tuple(gate.shape)}, not (G, {n}) where G divides {rows} rows")


def product_operands(
    device: torch.device | str,
    m: int,
    k: int,
    n: int,
    activation: str = "none",
    bias: bool = True,
    residual: bool = False,
    gates: int = 0,
    dtype: torch.dtype = torch.bfloat16,
) -> tuple[Any, ...]:
    """Everything of a case behind x: n rows of weight, their scales, ..., dtype."""
    noise = torch.Generator().manual_seed(1)
    outputs = n // 2 if activation == "swiglu" else n

    def random(*size: int) -> Tensor:
        return torch.randn(*size, generator=noise).to(device, dtype)

    return (
        torch.randint(-127, 128, (n, k), dtype=torch.int8, generator=noise).to(device),
        (torch.rand(n, generator=noise).to(device) + 0.5) / (64 * k**0.5),
        random(n) if bias else None,
        activation,
        random(m, outputs) if residual else None,
        random(gates, 3 * outputs)[:, -outputs:] if gates else None,  # a third of a modulation
        dtype,
    )


@triton.jit
def halves(x):
    """(x[:, :W / 2], x[:, W / 2:]) of x (rows, W): costs nothing, a thread holds columns of both."""
    return tl.split(tl.permute(tl.reshape(x, (x.shape[0], 2, x.shape[1] // 2)), (0, 2, 1)))


@triton.jit
def weight_rows(left, N: tl.constexpr, BLOCK_N: tl.constexpr, SWIGLU: tl.constexpr, PARTS: tl.constexpr = 1):
    """Which rows of the weight the BLOCK_N columns of a tile are, whose output begins at column `left`.

    The weight is (N, K), or (2 N, K) = [gate | up] for SwiGLU: then each part of the tile is half of the one, and half
    the same columns of the other. Beyond the last row it is the last one again: cheaper to compute twice than to mask.
    """
    column = tl.arange(0, BLOCK_N)
    if SWIGLU:
        HALF: tl.constexpr = BLOCK_N // PARTS // 2
        row = left + column // (2 * HALF) * HALF + column % HALF + column // HALF % 2 * N
        row = tl.minimum(row, 2 * N - 1)
    else:
        row = tl.minimum(left + column, N - 1)
    return row


@triton.jit
def epilogue(
    sums,  # (rows, columns) of one part of a tile as `weight_rows` lays it out
    x_scale,  # (rows) float32
    row,  # (rows)
    left,  # the part's first column of the output
    m,
    group,  # rows of the output that a row of the gate is for
    scale_ptr,  # (N) float32, or (2 N) for SwiGLU; bias alike
    bias_ptr,
    residual_ptr,  # (M, N) contiguous
    gate_ptr,  # (G, N), rows gate_stride apart
    y_ptr,  # (M, N) contiguous
    gate_stride,
    N: tl.constexpr,
    BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    GATE: tl.constexpr,
    GELU: tl.constexpr,
    GELU_TANH: tl.constexpr,
    SILU: tl.constexpr,
    SWIGLU: tl.constexpr,
):
    """Stores residual + gate * activation(sums * x_scale * scale + bias), half the columns at a time.

    Float copies of all of a large tile at once would not fit the registers.
    """
    first, second = halves(sums)
    col = left + tl.arange(0, first.shape[1])
    y = activate(_dequantised(first, x_scale, col, N, scale_ptr, bias_ptr, BIAS), GELU, GELU_TANH, SILU)
    if SWIGLU:
        y *= _dequantised(second, x_scale, N + col, 2 * N, scale_ptr, bias_ptr, BIAS)
    _store(y, row, col, m, group, residual_ptr, gate_ptr, y_ptr, gate_stride, N, RESIDUAL, GATE)
    if not SWIGLU:
        col += first.shape[1]
        y = activate(_dequantised(second, x_scale, col, N, scale_ptr, bias_ptr, BIAS), GELU, GELU_TANH, SILU)
        _store(y, row, col, m, group, residual_ptr, gate_ptr, y_ptr, gate_stride, N, RESIDUAL, GATE)


@triton.jit
def _dequantised(sums, x_scale, col, END: tl.constexpr, scale_ptr, bias_ptr, BIAS: tl.constexpr):
    y = sums.to(tl.float32) * x_scale[:, None] * tl.load(scale_ptr + col, mask=col < END, other=0.0)[None, :]
    if BIAS:
        y += tl.load(bias_ptr + col, mask=col < END, other=0.0).to(tl.float32)[None, :]
    return y


@triton.jit
def _store(
    y,
    row,
    col,
    m,
    group,
    residual_ptr,
    gate_ptr,
    y_ptr,
    gate_stride,
    N: tl.constexpr,
    RESIDUAL: tl.constexpr,
    GATE: tl.constexpr,
):
    inside = (row < m)[:, None] & (col < N)[None, :]
    if GATE:
        at = (row // group).to(tl.int64)[:, None] * gate_stride + col[None, :]
        y *= tl.load(gate_ptr + at, mask=inside, other=0.0).to(tl.float32)
    at = row.to(tl.int64)[:, None] * N + col[None, :]
    if RESIDUAL:
        y += tl.load(residual_ptr + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=inside)
