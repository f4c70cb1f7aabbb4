"""The diffusion head's fused steps with int8 weights, W8A8: as in kernels/head.py, a block is two launches.

    modulated_linear_int8  act((LN(h) (1 + scale) + shift) W^T + b)                fc1 of a block, the final layer
    gated_linear_int8      h + gate * (u W^T + b)                                  fc2 of a block

W ~ q_W * w_scale as in kernels/int8_linear.py. What multiplies W is made whole with a scale for each group of 128
columns of a row, as kernels/int8_of_groups.py has it: a group is quantised on its way to its product, and no pass over
a row is needed before. Every program does it for its own rows; the wider its tile, the fewer repeat it.
Called by the composites of engine/layers/linear.py. Letters: M rows, K width in, N width out.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._device import moments, rounded_to_int8, row_scale
from ._op import Case, Cost, Operator, launch, tl, triton
from ._product import GROUP, INSTRUCTION, Tile, check_product, epilogue, product_cost, tile_options, weight_rows
from ._tuned import Options, dtype_class, row_class, tuned
from .head import gated_linear_cases, gated_linear_ref, modulated_linear_cases, modulated_linear_ref
from .int8_of_groups import ADDED, MAGIC, OFFSET, int8_linear_of_groups_torch
from .norms import norm_torch
from .quantise import activated, quantise_rows

# Rows, columns and K of a step's product; warps, stages.
TILES = (
    (16, 16, 128, 4, 3),
    (16, 32, 128, 4, 3),
    (16, 64, 128, 4, 3),
    (16, 128, 128, 4, 3),
    (16, 256, 128, 8, 3),
    (32, 64, 128, 4, 3),
    (32, 128, 128, 8, 3),
    (32, 256, 128, 8, 2),
    (64, 256, 128, 8, 2),
)
# Of a value that multiplies W: bytes that are read, and instructions until it is whole, as compiled for sm_89.
MODULATED, PLAIN = (10, 40), (2, 14)


def tile(m: int, n: int, made: tuple[int, int], dtype: torch.dtype) -> Tile:
    """The tile for m rows and n columns; a heuristic, never measured.

    As `_product.fewest_clocks`, and beside it what every program does to its rows, and that a multiprocessor has 64
    bytes a clock from L2. K scales all of it alike.
    """
    read, instructions = made

    def clocks(candidate: Tile) -> float:
        rows, columns = candidate[:2]
        programs, taken = triton.cdiv(m, rows) * triton.cdiv(n, columns), read * rows + columns
        turns = triton.cdiv(programs, 128)
        computing = turns * rows * (columns / 750 + instructions / 128)
        return max(computing, programs * taken / 2000, turns * taken / 64)

    return min(TILES[:-1] if dtype == torch.float32 else TILES, key=clocks)  # the last would spill


def options(x: Tensor, n: int, made: tuple[int, int]) -> Options:
    """Of the launch for rows x (M, K)."""
    (m, k), modulated, single = x.shape, made is MODULATED, x.dtype == torch.float32
    heuristic = tile_options(tile(m, n, made, x.dtype))
    heuristic["num_stages"] = min(heuristic["num_stages"], 2 if single else 3)
    del heuristic["BLOCK_K"]  # a group

    def staged(tiles: Options) -> int:
        return GROUP * (tiles["BLOCK_M"] * x.element_size() * (3 if modulated else 1) + tiles["BLOCK_N"])

    key = f"{'modulated' if modulated else 'gated'} {dtype_class(x.dtype)} m{row_class(m)} n{n} k{k}"
    return tuned("head_int8", key, heuristic, x.device, staged)


# The weight comes first in the operators: the first tensor of a product tells the precision it is multiplied in.


def modulated_linear_int8_ref(weight, weight_scale, bias, h, shift, scale, norm_weight, norm_bias, eps, silu):
    """On the dequantised weight, in the dtype of h, which is not quantised."""
    wide = weight.to(h.dtype) * weight_scale[:, None].to(h.dtype)
    return modulated_linear_ref(h, shift, scale, norm_weight, norm_bias, eps, wide, bias, silu)


def gated_linear_int8_ref(weight, weight_scale, bias, u, gate, h):
    return gated_linear_ref(u, weight.to(u.dtype) * weight_scale[:, None].to(u.dtype), bias, gate, h)


def modulated_linear_int8_torch(weight, weight_scale, bias, h, shift, scale, norm_weight, norm_bias, eps, silu):
    normed = norm_torch(h, norm_weight, norm_bias, None, None, eps, False) * (1 + scale) + shift
    return activated(_by_groups(normed, weight, weight_scale, bias, None, None), "silu" if silu else "none")


def gated_linear_int8_torch(weight, weight_scale, bias, u, gate, h):
    return _by_groups(u, weight, weight_scale, bias, h, gate)


def _by_groups(x, weight, weight_scale, bias, residual, gate) -> Tensor:
    """The last group may be short."""
    missing = -x.shape[1] % GROUP
    groups = quantise_rows(F.pad(x, (0, missing)).unflatten(1, (-1, GROUP)))
    return int8_linear_of_groups_torch(
        *groups, F.pad(weight, (0, missing)), weight_scale, bias, residual, gate, x.dtype
    )


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
    GROUP: tl.constexpr,
    MAGIC: tl.constexpr,
    OFFSET: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
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

    weight_at = weight_ptr + weight_rows(left, N, BLOCK_N, False).to(tl.int64)[None, :] * K
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, K, GROUP):
        k = start + tl.arange(0, GROUP)
        there = inside[:, None] & (k < K)[None, :]
        x = _values(
            x_at, shift_at, scale_at, there, k, mean, inverse, norm_weight_ptr, norm_bias_ptr, K, MODULATE, AFFINE
        )  # fmt: skip
        x_scale = row_scale(tl.max(tl.abs(x), axis=1))
        weight = tl.load(weight_at + k[:, None], mask=(k < K)[:, None], other=0)
        sums = tl.full((BLOCK_M, BLOCK_N), MAGIC, tl.int32)
        sums = tl.dot(rounded_to_int8(x * (1.0 / x_scale)[:, None]), weight, sums, out_dtype=tl.int32)
        total += (sums.to(tl.float32, bitcast=True) - OFFSET) * x_scale[:, None]

    epilogue(
        total, tl.full((BLOCK_M,), 1.0, tl.float32), row, left, m, 1, weight_scale_ptr, bias_ptr, residual_ptr,
        gate_ptr, y_ptr, gate_stride, N, BIAS, not MODULATE, not MODULATE, False, False, SILU, False,
    )  # fmt: skip


def _launch(x, modulation, norm, eps, weight, weight_scale, bias, silu, gate, residual) -> Tensor:
    """With a modulation (shift, scale) and perhaps a norm's (weight, bias), or with a gate and a residual."""
    (m, k), n = x.shape, len(weight)
    y = torch.empty((m, n), dtype=x.dtype, device=x.device)
    tiles = options(x, n, MODULATED if modulation else PLAIN)
    launch(
        _head_int8_kernel,
        (triton.cdiv(n, tiles["BLOCK_N"]), triton.cdiv(m, tiles["BLOCK_M"])),
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
        GROUP=GROUP,
        MAGIC=MAGIC,
        OFFSET=OFFSET,
        STAT=512 * tiles["num_warps"] // tiles["BLOCK_M"],  # 16 values a thread
        MODULATE=modulation is not None,
        AFFINE=norm is not None,
        BIAS=bias is not None,
        SILU=silu,
        **tiles,
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


def modulated_linear_int8_cost(weight, weight_scale, bias, h, *rest) -> Cost:
    return _cost(MODULATED, weight, weight_scale, bias, h, *rest)


def gated_linear_int8_cost(weight, weight_scale, bias, u, *rest) -> Cost:
    return _cost(PLAIN, weight, weight_scale, bias, u, *rest)


def _cost(made: tuple[int, int], weight, weight_scale, bias, x, *rest) -> Cost:
    """With what programs repeat, and the sums of groups."""
    others = (t for t in rest if isinstance(t, Tensor))
    base, (m, k), n = (
        product_cost((x, weight, weight_scale, bias, *others), weight, "none", x.dtype),
        x.shape,
        len(weight),
    )
    repeated = triton.cdiv(n, tile(m, n, made, x.dtype)[1]) * made[1] * m * k
    return replace(base, beside=INSTRUCTION * (repeated + ADDED * m * n * triton.cdiv(k, GROUP)))


_modulated_linear_int8 = Operator(
    "modulated_linear_int8(Tensor weight, Tensor weight_scale, Tensor? bias, Tensor h, Tensor shift, Tensor scale, "
    "Tensor? norm_weight, Tensor? norm_bias, float eps, bool silu) -> Tensor",
    torch=modulated_linear_int8_torch,
    triton=_modulated_linear_int8_triton,
    cost=modulated_linear_int8_cost,
)
_gated_linear_int8 = Operator(
    "gated_linear_int8(Tensor weight, Tensor weight_scale, Tensor? bias, Tensor u, Tensor gate, Tensor h) -> Tensor",
    torch=gated_linear_int8_torch,
    triton=_gated_linear_int8_triton,
    cost=gated_linear_int8_cost,
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
