"""What kernels/int8_*.py share: most of a product of whole numbers.

On the device which tile is a program's, how its columns are laid out, its sums and what follows them; on the host the
same in torch, what is checked, what it costs, and the operands of their cases.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ._device import activate, rounded_to_int8, row_scale
from ._op import Cost, cdiv, tl, triton
from ._tuned import Options, row_class, tuned
from .quantise import activated, activation_flags

LARGEST_K = 131072  # products of 127 * 127 whose sum fits int32
# int8 operations that a multiprocessor's tensor cores do while one other instruction is issued for a value: 2048 and
# 128 a clock on sm_89. What a kernel needs beyond the usual epilogue is `Cost.beside`, as if nothing overlapped.
INSTRUCTION = 16
GROUP = 128  # columns of a product's output, or input, that share a scale where a row has several
GROUP_M = 8  # row tiles that walk along the columns together
Tile = tuple[int, int, int, int, int]  # rows, columns, K of one of a step's products; warps, stages


@lru_cache(4096)
def fewest_clocks(tiles: tuple[Tile, ...], m: int, n: int) -> Tile:
    """The tile for m rows and n columns; a heuristic, never measured.

    Takes the least of what an RTX 4090 should need: 750 products a clock on each of 128 multiprocessors (480 TOPS),
    in whole rounds, and 2000 bytes a clock out of L2 (5 TB/s). K scales all candidates alike.
    """

    def clocks(candidate: Tile) -> float:
        rows, columns = candidate[:2]
        programs = cdiv(m, rows) * cdiv(n, columns)
        return max(cdiv(programs, 128) * rows * columns / 750, programs * (rows + columns) / 2000)

    return min(tiles, key=clocks)


def tile_options(tile: Tile) -> Options:
    return dict(zip(("BLOCK_M", "BLOCK_N", "BLOCK_K", "num_warps", "num_stages"), tile, strict=True))


def product_options(
    kernel: str,
    how: str,
    tiles: tuple[Tile, ...],
    shape: tuple[int, int, int],
    device: torch.device,
    fixed: Sequence[str] = (),
) -> Options:
    """Of the launch of a kernel for (m, k) x (n, k)^T, shape (m, n, k).

    `how`: what else tells its shape classes apart; `fixed`: options that its layout of columns leaves no choice of.
    """
    m, n, k = shape
    heuristic = tile_options(fewest_clocks(tiles, m, n))
    kept = {name: heuristic.pop(name) for name in fixed}

    def staged(options: Options) -> int:
        """Bytes of both operands in a step, which is two products."""
        whole = kept | options
        return 2 * whole["BLOCK_K"] * (whole["BLOCK_M"] + whole["BLOCK_N"])

    return kept | tuned(kernel, f"{how}m{row_class(m)} n{n} k{k}", heuristic, device, staged)


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
    read = sum(t.nbytes for t in operands if t is not None)
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
    for name, given in {"weight_scale": weight_scale, "bias": bias, "gate": gate}.items():
        if given is not None and given.shape[-1] > 1 and given.stride(-1) != 1:
            raise ValueError(f"{name} has strides {given.stride()}: its last dimension has to be dense")
    if gate is not None and (gate.shape[1] != n or rows % max(len(gate), 1) or len(gate) < min(rows, 1)):
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
def place(m, across, BLOCK_M: tl.constexpr, GROUP_M: tl.constexpr):
    """(rows of this program's tile, where it is of `across` tiles): GROUP_M row tiles walk along the columns together.

    So both operands are found in L2.
    """
    band = GROUP_M * across
    top = tl.program_id(0) // band * GROUP_M
    tall = tl.minimum(tl.cdiv(m, BLOCK_M) - top, GROUP_M)
    row = (top + tl.program_id(0) % tall) * BLOCK_M + tl.arange(0, BLOCK_M)
    return row, tl.program_id(0) % band // tall


@triton.jit
def whole_sums(
    x_ptr,  # (M, K) int8, rows x_stride apart
    weight_ptr,  # (rows, K) int8 contiguous
    row,  # (BLOCK_M)
    weight_row,  # (BLOCK_N)
    m,
    x_stride,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """x W^T of these rows, int32 (BLOCK_M, BLOCK_N)."""
    EVEN: tl.constexpr = K % (2 * BLOCK_K) == 0
    at = tl.arange(0, BLOCK_K)
    x_at = x_ptr + tl.minimum(row, m - 1).to(tl.int64)[:, None] * x_stride + at[None, :]
    weight_at = weight_ptr + weight_row.to(tl.int64)[None, :] * K + at[:, None]
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    # Two products a step: around a single one the compiler for sm_8x carries operands over to the next step as bytes
    # in registers of their own, and spills hundreds of them.
    for start in range(0, K, 2 * BLOCK_K):
        for part in tl.static_range(2):
            if EVEN:
                x = tl.load(x_at + part * BLOCK_K)
                weight = tl.load(weight_at + part * BLOCK_K)
            else:
                inside = at < K - start - part * BLOCK_K
                x = tl.load(x_at + part * BLOCK_K, mask=inside[None, :], other=0)
                weight = tl.load(weight_at + part * BLOCK_K, mask=inside[:, None], other=0)
            sums = tl.dot(x, weight, sums, out_dtype=tl.int32)
        x_at += 2 * BLOCK_K
        weight_at += 2 * BLOCK_K
    return sums


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
    y = activate(dequantised(first, x_scale, col, N, scale_ptr, bias_ptr, BIAS), GELU, GELU_TANH, SILU)
    if SWIGLU:
        y *= dequantised(second, x_scale, N + col, 2 * N, scale_ptr, bias_ptr, BIAS)
    _store(y, row, col, m, group, residual_ptr, gate_ptr, y_ptr, gate_stride, N, RESIDUAL, GATE)
    if not SWIGLU:
        col += first.shape[1]
        y = activate(dequantised(second, x_scale, col, N, scale_ptr, bias_ptr, BIAS), GELU, GELU_TANH, SILU)
        _store(y, row, col, m, group, residual_ptr, gate_ptr, y_ptr, gate_stride, N, RESIDUAL, GATE)


@triton.jit
def dequantised(sums, x_scale, col, END: tl.constexpr, scale_ptr, bias_ptr, BIAS: tl.constexpr):
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


@triton.jit
def store_whole(
    a,
    b,
    y_at,  # (rows): where the first column of [a | b] goes, int8; y_scale_at alike, float32
    y_scale_at,
    inside,
    UNIT: tl.constexpr,  # of a and b
):
    """Stores the rows of [a | b] UNIT, (rows, W) each, as whole numbers and a scale a row."""
    scale = row_scale(tl.max(tl.maximum(tl.abs(a), tl.abs(b)), axis=1) * UNIT)
    tl.store(y_scale_at, scale, mask=inside)
    steps, at = (UNIT / scale)[:, None], y_at[:, None] + tl.arange(0, a.shape[1])[None, :]
    tl.store(at, rounded_to_int8(a * steps), mask=inside[:, None])
    tl.store(at + a.shape[1], rounded_to_int8(b * steps), mask=inside[:, None])
