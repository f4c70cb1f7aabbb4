"""The diffusion head's fused steps with int8 weights, W8A8: as in kernels/head.py, a block is two launches.

    modulated_linear_int8  act((LN(h) (1 + scale) + shift) W^T + b)                fc1 of a block, the final layer
    gated_linear_int8      h + gate * (u W^T + b)                                  fc2 of a block

W ~ q_W * w_scale as in kernels/int8_linear.py. What multiplies W is made whole as in kernels/norms.py and
kernels/quantise.py, so the numbers are those of their operators and a product each; but every program does it for its
own rows, in two steps before its product: their moments, then their largest magnitude. With few rows that should cost
less than a launch; with many, wide tiles have fewer programs repeat it.
Called by the composites of engine/layers/linear.py. Letters: M rows, K width in, N width out.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ._device import moments, row_scale, to_int8
from ._op import Case, Cost, Operator, launch, tl, triton
from ._product import check_product, epilogue, product_cost, weight_rows
from .head import gated_linear_cases, gated_linear_ref, modulated_linear_cases, modulated_linear_ref
from .int8_linear import int8_linear_torch
from .norms import norm_torch
from .quantise import quantise_rows

# Rows, columns and K of a step's product; warps, stages.
TILES = (
    (16, 16, 128, 4, 3),
    (16, 32, 128, 4, 3),
    (16, 64, 128, 4, 3),
    (16, 128, 128, 4, 3),
    (16, 256, 64, 8, 3),
    (32, 256, 64, 8, 3),
    (64, 256, 64, 8, 2),  # with 3 stages more shared memory than a block of sm_89 may have, in float32
)


def tile(m: int, n: int) -> tuple[int, int, int, int, int]:
    """The tile for m rows and n columns; a heuristic, never measured.

    The least that one of 128 multiprocessors has to do in whole rounds, if making a row's value whole takes as long
    as reading 16 bytes of the weight: it is read up to four times, and the modulation twice.
    """

    def work(candidate: tuple[int, int, int, int, int]) -> int:
        rows, columns = candidate[:2]
        return triton.cdiv(triton.cdiv(m, rows) * triton.cdiv(n, columns), 128) * (16 * rows + columns)

    return min(TILES, key=work)


# The weight comes first in the operators: the first tensor of a product tells the precision it is multiplied in.


def modulated_linear_int8_ref(weight, weight_scale, bias, h, shift, scale, norm_weight, norm_bias, eps, silu):
    """On the dequantised weight, in the dtype of h, which is not quantised."""
    wide = weight.to(h.dtype) * weight_scale[:, None].to(h.dtype)
    return modulated_linear_ref(h, shift, scale, norm_weight, norm_bias, eps, wide, bias, silu)


def gated_linear_int8_ref(weight, weight_scale, bias, u, gate, h):
    return gated_linear_ref(u, weight.to(u.dtype) * weight_scale[:, None].to(u.dtype), bias, gate, h)


def modulated_linear_int8_torch(weight, weight_scale, bias, h, shift, scale, norm_weight, norm_bias, eps, silu):
    normed = norm_torch(h, norm_weight, norm_bias, None, None, eps, False) * (1 + scale) + shift
    act = "silu" if silu else "none"
    return int8_linear_torch(*quantise_rows(normed), weight, weight_scale, bias, act, None, None, h.dtype)


def gated_linear_int8_torch(weight, weight_scale, bias, u, gate, h):
    return int8_linear_torch(*quantise_rows(u), weight, weight_scale, bias, "none", h, gate, h.dtype)


@triton.jit
def _values(
    x_at,  # (BLOCK_M, 1): where rows begin; shift and scale alike
    shift_at,
    scale_at,
    there,  # (BLOCK_M, columns): what is to be read
    k,  # (columns)
    mean,  # (BLOCK_M); inverse alike
    inverse,
    norm_weight_ptr,
    norm_bias_ptr,
    K: tl.constexpr,
    MODULATE: tl.constexpr,
    AFFINE: tl.constexpr,
):
    """What multiplies the weight, (BLOCK_M, columns) float32 and zero where nothing is to be read."""
    x = tl.load(x_at + k[None, :], mask=there, other=0.0).to(tl.float32)
    if MODULATE:
        x = (x - mean[:, None]) * inverse[:, None]
        if AFFINE:
            x = x * tl.load(norm_weight_ptr + k, mask=k < K, other=0.0).to(tl.float32)[None, :]
            x = x + tl.load(norm_bias_ptr + k, mask=k < K, other=0.0).to(tl.float32)[None, :]
        scale = tl.load(scale_at + k[None, :], mask=there, other=0.0).to(tl.float32)
        shift = tl.load(shift_at + k[None, :], mask=there, other=0.0).to(tl.float32)
        x = tl.where(there, x * (1 + scale) + shift, 0.0)
    return x


@triton.jit(do_not_specialize=["m"])
def _head_int8_kernel(
    x_ptr,  # (M, K), rows x_stride apart
    shift_ptr,  # (M, K), rows m_stride apart; scale alike
    scale_ptr,
    norm_weight_ptr,  # (K); norm_bias alike
    norm_bias_ptr,
    weight_ptr,  # (N, K) int8 contiguous
    weight_scale_ptr,  # what follows is said at _product.epilogue
    bias_ptr,
    residual_ptr,
    gate_ptr,
    y_ptr,
    x_stride,
    m_stride,
    gate_stride,
    eps,
    m,
    N: tl.constexpr,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAT: tl.constexpr,
    MODULATE: tl.constexpr,
    AFFINE: tl.constexpr,
    BIAS: tl.constexpr,
    SILU: tl.constexpr,
):
    left = tl.program_id(0) * BLOCK_N
    row = tl.program_id(1).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = row < m
    x_at = x_ptr + row[:, None] * x_stride
    shift_at = shift_ptr + row[:, None] * m_stride
    scale_at = scale_ptr + row[:, None] * m_stride
    if MODULATE:
        mean, variance = moments(x_ptr + row * x_stride, inside, K, BLOCK_M, STAT)
        inverse = tl.rsqrt(variance + eps)
    else:
        mean = tl.zeros((BLOCK_M,), tl.float32)
        inverse = mean

    largest = tl.zeros((BLOCK_M, STAT), tl.float32)
    for start in tl.range(0, K, STAT, loop_unroll_factor=2):
        k = start + tl.arange(0, STAT)
        there = inside[:, None] & (k < K)[None, :]
        x = _values(
            x_at, shift_at, scale_at, there, k, mean, inverse, norm_weight_ptr, norm_bias_ptr, K, MODULATE, AFFINE
        )  # fmt: skip
        largest = tl.maximum(largest, tl.abs(x))
    x_scale = row_scale(tl.max(largest, axis=1))

    weight_at = weight_ptr + weight_rows(left, N, BLOCK_N, False).to(tl.int64)[None, :] * K
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        there = inside[:, None] & (k < K)[None, :]
        x = _values(
            x_at, shift_at, scale_at, there, k, mean, inverse, norm_weight_ptr, norm_bias_ptr, K, MODULATE, AFFINE
        )  # fmt: skip
        weight = tl.load(weight_at + k[:, None], mask=(k < K)[:, None], other=0)
        sums = tl.dot(to_int8(x, x_scale[:, None]), weight, sums, out_dtype=tl.int32)

    epilogue(
        sums, x_scale, row, left, m, 1, weight_scale_ptr, bias_ptr, residual_ptr, gate_ptr, y_ptr, gate_stride,
        N, BIAS, not MODULATE, not MODULATE, False, False, SILU, False,
    )  # fmt: skip


def _launch(x, modulation, norm, eps, weight, weight_scale, bias, silu, gate, residual) -> Tensor:
    """With a modulation (shift, scale) and perhaps a norm's (weight, bias), or with a gate and a residual."""
    (m, k), n = x.shape, len(weight)
    y = torch.empty((m, n), dtype=x.dtype, device=x.device)
    block_m, block_n, block_k, warps, stages = tile(m, n)
    launch(
        _head_int8_kernel,
        (triton.cdiv(n, block_n), triton.cdiv(m, block_m)),
        x,
        *(modulation or (x, x)),
        *(norm or (x, x)),
        weight,
        weight_scale,
        weight_scale if bias is None else bias,
        y if residual is None else residual,
        y if gate is None else gate,
        y,
        x.stride(0),
        modulation[0].stride(0) if modulation else 0,
        0 if gate is None else gate.stride(0),
        eps,
        m,
        N=n,
        K=k,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        STAT=512 * warps // block_m,  # 16 values a thread
        MODULATE=modulation is not None,
        AFFINE=norm is not None,
        BIAS=bias is not None,
        SILU=silu,
        num_warps=warps,
        num_stages=stages,
    )
    return y


def _modulated_linear_int8_triton(weight, weight_scale, bias, h, shift, scale, norm_weight, norm_bias, eps, silu):
    if shift.stride() != scale.stride() or shift.stride(1) != 1:
        shift, scale = shift.contiguous(), scale.contiguous()
    h = h if h.stride(1) == 1 else h.contiguous()
    norm = None if norm_weight is None else (norm_weight, norm_bias)
    return _launch(h, (shift, scale), norm, eps, weight, weight_scale, bias, silu, None, None)


def _gated_linear_int8_triton(weight, weight_scale, bias, u, gate, h):
    u = u if u.stride(1) == 1 else u.contiguous()
    return _launch(u, None, None, 0.0, weight, weight_scale, bias, False, gate, h.contiguous())


def head_int8_cost(weight, weight_scale, bias, x, *rest) -> Cost:
    """Of either."""
    others = (t for t in rest if isinstance(t, Tensor))
    return product_cost((x, weight, weight_scale, bias, *others), weight, "none", x.dtype)


_modulated_linear_int8 = Operator(
    "modulated_linear_int8(Tensor weight, Tensor weight_scale, Tensor? bias, Tensor h, Tensor shift, Tensor scale, "
    "Tensor? norm_weight, Tensor? norm_bias, float eps, bool silu) -> Tensor",
    torch=modulated_linear_int8_torch,
    triton=_modulated_linear_int8_triton,
    cost=head_int8_cost,
)
_gated_linear_int8 = Operator(
    "gated_linear_int8(Tensor weight, Tensor weight_scale, Tensor? bias, Tensor u, Tensor gate, Tensor h) -> Tensor",
    torch=gated_linear_int8_torch,
    triton=_gated_linear_int8_triton,
    cost=head_int8_cost,
)


def modulated_linear_int8(
    h: Tensor,
    shift: Tensor,
    scale: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    silu: bool,
) -> Tensor:
    """act((LN(h) (1 + scale) + shift) W^T + b) in h's dtype, (M, N): h, shift, scale (M, K), norm_* (K) or both None.

    weight (N, K) int8 contiguous, weight_scale (N) float32, bias (N).
    """
    check_product(h, weight, weight_scale, bias, "none", None, None)
    if not (h.shape == shift.shape == scale.shape):
        raise ValueError(f"shift {tuple(shift.shape)} and scale {tuple(scale.shape)} are not for {tuple(h.shape)}")
    return _modulated_linear_int8(weight, weight_scale, bias, h, shift, scale, norm_weight, norm_bias, eps, silu)


def gated_linear_int8(
    u: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, gate: Tensor, h: Tensor
) -> Tensor:
    """h + gate * (u W^T + b) in h's dtype: u (M, K), gate and h (M, N), the rest as above."""
    check_product(u, weight, weight_scale, bias, "none", h, gate)
    if gate.shape != h.shape:
        raise ValueError(f"gate is {tuple(gate.shape)}, not one for each of {tuple(h.shape)}")
    return _gated_linear_int8(weight, weight_scale, bias, u, gate, h)


def _of_whole_weights(cases: list[Case], weight_at: int) -> list[Case]:
    """Cases of kernels/head.py, whose weight and bias stand there among the arguments."""

    def turned(make: Callable[..., tuple[Any, ...]]) -> Callable[..., tuple[Any, ...]]:
        def arguments(device: torch.device | str) -> tuple[Any, ...]:
            before, (weight, bias, *behind) = (given := make(device))[:weight_at], given[weight_at:]
            return *quantise_rows(weight), bias, *before, *behind

        return arguments

    return [replace(case, make=turned(case.make)) for case in cases]


def modulated_linear_int8_cases() -> list[Case]:
    return _of_whole_weights(modulated_linear_cases(), 6)


def gated_linear_int8_cases() -> list[Case]:
    return _of_whole_weights(gated_linear_cases(), 1)
