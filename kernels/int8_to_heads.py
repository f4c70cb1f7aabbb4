"""Matrix product of whole numbers that leaves queries, keys and values behind as kernels/attention_int8.py reads them.

    y = x_scale (q_x q_W^T) w_scale + bias,   N = parts * H * d columns: H heads of each part

    queries, keys    int8 and a scale a row of a head, float32; the bias of keys may take their mean off
                     (kernels/keys_off.py), and then there is one for each picture
    values           float16

A program's columns are those of whole heads, so it knows their scales: 3 of 80 columns in a tile of 256, and the other
16 are computed in vain.
Called for the blocks of 8-bit models (engine/layers/int8_attention.py). Letters: B pictures, L rows of each, K inputs.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ._device import rounded_to_int8, row_scale, to_half
from ._op import Case, Cost, Operator, cdiv, launch, tl, triton
from ._product import (
    GROUP_M,
    INSTRUCTION,
    check_product,
    dequantised,
    halves,
    place,
    product_cost,
    product_operands,
    product_options,
    whole_sums,
)
from .int8_linear import int8_linear_ref, int8_linear_torch
from .quantise import quantise_rows
from .quantise_qkv import to_float16

HEAD_DIMS = range(64, 129)  # a quarter of a tile has columns of at most two heads
WRITTEN = 20  # instructions that a value takes beyond those of kernels/int8_linear.py, as compiled for sm_89

# Rows, columns, and K of one of a step's two products; warps, stages. With more rows or warps sm_90 spills.
TILES = ((64, 256, 64, 4, 3), (32, 256, 64, 8, 3), (16, 256, 64, 4, 3))


def int8_linear_to_heads_ref(x, x_scale, weight, weight_scale, bias, heads, width, whole):
    """What the results stand for, on the dequantised operands in float64."""
    y = int8_linear_ref(x, x_scale, weight, weight_scale, None, "none", None, None)
    return _in_parts(y, bias, heads, width, whole)


def int8_linear_to_heads_torch(x, x_scale, weight, weight_scale, bias, heads, width, whole):
    y = int8_linear_torch(x, x_scale, weight, weight_scale, None, "none", None, None, torch.float32)
    numbers, others = _in_parts(y, bias, heads, width, whole)
    return *(part.contiguous() for part in quantise_rows(numbers)), to_float16(others).contiguous()


def _in_parts(y: Tensor, bias: Tensor | None, heads: int, width: int, whole: int) -> tuple[Tensor, Tensor]:
    """y (B, L, N), with the bias, as parts (whole, B, H, L, d) and the parts behind those."""
    if bias is not None:
        y = y + bias.to(y.dtype).view(-1, 1, y.shape[-1])
    parts = y.unflatten(-1, (-1, heads, width)).permute(2, 0, 3, 1, 4)
    return parts[:whole], parts[whole:]


@triton.jit(do_not_specialize=["length", "images"])  # they change from round to round, or from batch to batch
def _to_heads_kernel(
    x_ptr,  # (B, L, K) int8 contiguous
    x_scale_ptr,  # (B, L) float32
    weight_ptr,  # (N, K) int8 contiguous
    scale_ptr,  # (N) float32
    bias_ptr,  # (N), or (B, N) float32
    y_ptr,  # (whole parts, B, H, L, D) int8
    y_scale_ptr,  # (whole parts, B, H, L) float32
    half_ptr,  # (other parts, B, H, L, D) float16
    length,
    images,
    bias_stride,
    N: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    HEADS: tl.constexpr,
    WHOLE: tl.constexpr,  # heads of all parts that become whole numbers
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    BIAS: tl.constexpr,
):
    ACROSS: tl.constexpr = BLOCK_N // D  # heads of a tile
    QUARTER: tl.constexpr = BLOCK_N // 4
    image = tl.program_id(1).to(tl.int64)
    row, column = place(length, tl.cdiv(N // D, ACROSS), BLOCK_M, GROUP_M)
    first = column * ACROSS
    col = first * D + tl.arange(0, BLOCK_N)
    x_ptr += image * length * K
    sums = whole_sums(x_ptr, weight_ptr, row, tl.minimum(col, N - 1), length, K, K, BLOCK_M, BLOCK_N, BLOCK_K)
    x_scale = tl.load(x_scale_ptr + image * length + row, mask=row < length, other=0.0)
    left, right = halves(sums)
    a, b = halves(left)
    c, d = halves(right)
    col, bias_ptr = first * D + tl.arange(0, QUARTER), bias_ptr + image * bias_stride
    a = dequantised(a, x_scale, col, N, scale_ptr, bias_ptr, BIAS)
    b = dequantised(b, x_scale, col + QUARTER, N, scale_ptr, bias_ptr, BIAS)
    c = dequantised(c, x_scale, col + 2 * QUARTER, N, scale_ptr, bias_ptr, BIAS)
    d = dequantised(d, x_scale, col + 3 * QUARTER, N, scale_ptr, bias_ptr, BIAS)

    scale0 = _scale(a, b, c, d, 0, D, QUARTER)
    scale1 = _scale(a, b, c, d, 1, D, QUARTER)
    scale2, scale3 = scale1, scale1
    if ACROSS > 2:
        scale2 = _scale(a, b, c, d, 2, D, QUARTER)
    if ACROSS > 3:
        scale3 = _scale(a, b, c, d, 3, D, QUARTER)
    scales = (scale0, scale1, scale2, scale3)
    for head in tl.static_range(ACROSS):
        slot = first + head
        at = ((slot // HEADS * images + image) * HEADS + slot % HEADS) * length + row
        tl.store(y_scale_ptr + at, scales[head], mask=row < tl.where(slot < WHOLE, length, 0))
    steps = (1.0 / scale0, 1.0 / scale1, 1.0 / scale2, 1.0 / scale3)
    quarters = (a, b, c, d)
    for quarter in tl.static_range(4):
        _store(quarters[quarter], steps, row, first, image, images, length, y_ptr, half_ptr,
               quarter * QUARTER, ACROSS, N // D, WHOLE, HEADS, D, QUARTER)  # fmt: skip


@triton.jit
def _scale(a, b, c, d, HEAD: tl.constexpr, D: tl.constexpr, QUARTER: tl.constexpr):
    """(rows): of one of the heads of the tile [a | b | c | d]."""
    left = tl.maximum(_largest(a, 0, HEAD, D, QUARTER), _largest(b, QUARTER, HEAD, D, QUARTER))
    right = tl.maximum(_largest(c, 2 * QUARTER, HEAD, D, QUARTER), _largest(d, 3 * QUARTER, HEAD, D, QUARTER))
    return row_scale(tl.maximum(left, right))


@triton.jit
def _largest(y, FIRST: tl.constexpr, HEAD: tl.constexpr, D: tl.constexpr, QUARTER: tl.constexpr):
    """(rows): of |y|, columns FIRST ... of the tile, what belongs to the head."""
    if HEAD * D < FIRST + QUARTER and FIRST < HEAD * D + D:
        col = FIRST + tl.arange(0, QUARTER)
        inside = (col >= HEAD * D) & (col < HEAD * D + D)
        return tl.max(tl.where(inside[None, :], tl.abs(y), 0.0), axis=1)
    else:
        return tl.zeros((y.shape[0],), tl.float32)


@triton.jit
def _store(
    y,  # (rows, QUARTER)
    steps,  # of the tile's heads, each (rows)
    row,
    first,  # head of the tile's first column, among those of all parts
    image,
    images,
    length,
    y_ptr,
    half_ptr,
    FIRST: tl.constexpr,  # the quarter's first column in the tile
    ACROSS: tl.constexpr,
    ALL: tl.constexpr,  # heads of all parts
    WHOLE: tl.constexpr,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    QUARTER: tl.constexpr,
):
    col = FIRST + tl.arange(0, QUARTER)
    slot, row = first + col // D, row.to(tl.int64)
    within = (col < ACROSS * D) & (slot < ALL)
    if first < WHOLE:
        step = steps[FIRST // D][:, None]
        if FIRST // D < (FIRST + QUARTER - 1) // D:
            step = tl.where((col < (FIRST // D + 1) * D)[None, :], step, steps[FIRST // D + 1][:, None])
        at = ((slot // HEADS * images + image) * HEADS + slot % HEADS) * length * D + col % D
        mask = (row < length)[:, None] & (within & (slot < WHOLE))[None, :]
        tl.store(y_ptr + at[None, :] + row[:, None] * D, rounded_to_int8(y * step), mask=mask)
    if first + ACROSS > WHOLE:
        behind = slot - WHOLE
        at = ((behind // HEADS * images + image) * HEADS + behind % HEADS) * length * D + col % D
        mask = (row < length)[:, None] & (within & (behind >= 0))[None, :]
        tl.store(half_ptr + at[None, :] + row[:, None] * D, to_half(y), mask=mask)


def _int8_linear_to_heads_triton(x, x_scale, weight, weight_scale, bias, heads, width, whole):
    x, x_scale = x.contiguous(), x_scale.contiguous()
    (images, length, k), n = x.shape, len(weight)
    parts = n // (heads * width)
    y = torch.empty((whole, images, heads, length, width), dtype=torch.int8, device=x.device)
    y_scale = torch.empty(y.shape[:-1], dtype=torch.float32, device=x.device)
    other = torch.empty((parts - whole, images, heads, length, width), dtype=torch.float16, device=x.device)
    shape = images * length, _columns(n, width), k
    tiles = product_options("int8_to_heads", f"d{width} ", TILES, shape, x.device, fixed=("BLOCK_N",))
    launch(
        _to_heads_kernel,
        (cdiv(length, tiles["BLOCK_M"]) * _columns(n, width) // tiles["BLOCK_N"], images),
        *(x, x_scale, weight, weight_scale, weight_scale if bias is None else bias, y, y_scale, other),
        *(length, images, n if bias is not None and bias.dim() == 2 else 0),
        N=n,
        K=k,
        D=width,
        HEADS=heads,
        WHOLE=whole * heads,
        GROUP_M=GROUP_M,
        BIAS=bias is not None,
        **tiles,
    )
    return y, y_scale, other


def _columns(n: int, width: int) -> int:
    """Of all tiles, with those in vain."""
    return cdiv(n // width, 256 // width) * 256


def int8_linear_to_heads_cost(x, x_scale, weight, weight_scale, bias, heads, width, whole) -> Cost:
    """With the columns in vain, and the instructions that a product alone would not have."""
    rows, n, k = x_scale.numel(), len(weight), x.shape[-1]
    base, numbers = product_cost((x, x_scale, weight, weight_scale, bias), weight, "none", torch.int8), whole * heads
    beside = 2 * rows * (_columns(n, width) - n) * k + WRITTEN * INSTRUCTION * rows * n
    written = rows * (n - numbers * width) + 4 * rows * numbers  # the second byte of values, and scales
    return replace(base, nbytes=base.nbytes + written, beside=beside)


_int8_linear_to_heads = Operator(
    "int8_linear_to_heads(Tensor x, Tensor x_scale, Tensor weight, Tensor weight_scale, Tensor? bias, int heads, "
    "int width, int whole) -> (Tensor, Tensor, Tensor)",
    torch=int8_linear_to_heads_torch,
    triton=_int8_linear_to_heads_triton,
    cost=int8_linear_to_heads_cost,
)


def int8_linear_to_heads(
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    heads: int,
    whole: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """x W^T + bias in parts of `heads` heads: int8 (whole, B, H, L, d), scales (whole, B, H, L), float16 (rest, ...).

    x (B, L, K) int8, bias (N) or (B, N), the rest as for int8_linear. Parts are as wide as x; the first `whole` of them
    become whole numbers.
    """
    check_product(x, weight, weight_scale, None, "none", None, None)
    width, n = x.shape[-1] // heads, len(weight)
    if x.dim() != 3 or x_scale.shape != x.shape[:-1] or width not in HEAD_DIMS or n % (heads * width):
        raise ValueError(
            f"x {tuple(x.shape)}, x_scale {tuple(x_scale.shape)} and {n} outputs are not (B, L, K), (B, L) and parts "
            f"of {heads} heads of {width} columns, {HEAD_DIMS.start} to {HEAD_DIMS.stop - 1}"
        )
    if bias is not None and bias.shape not in ((n,), (len(x), n)):
        raise ValueError(f"bias is {tuple(bias.shape)}, not ({n},) or ({len(x)}, {n})")
    return _int8_linear_to_heads(x, x_scale, weight, weight_scale, bias, heads, width, whole)


def int8_linear_to_heads_cases() -> list[Case]:
    def make(
        b: int, length: int, k: int, heads: int, width: int, parts: int, whole: int, images: bool = False, **how: Any
    ):
        def arguments(device):
            noise = torch.Generator().manual_seed(0)
            x = torch.randint(-127, 128, (b, length, k), dtype=torch.int8, generator=noise).to(device)
            x_scale = torch.rand(b, length, generator=noise).to(device) / 64
            weight, scale, bias, *_ = product_operands(device, b * length, k, parts * heads * width, **how)
            if images:
                bias = torch.randn(b, len(weight), generator=noise).to(device)
            return x, x_scale, weight, scale, bias, heads, width, whole

        return arguments

    return [
        Case("MAR qkv at 1024, both guidance halves", make(2, 4160, 1280, 16, 80, 3, 2, True), "aot gpu"),
        Case("MAR qkv, first round", make(1, 64, 1280, 16, 80, 3, 2, True), "aot gpu"),
        Case("MAR keys and values", make(2, 4160, 1280, 16, 80, 2, 1, True), "aot gpu"),
        Case("MAR queries of few tokens", make(2, 20, 1280, 16, 80, 1, 1), "aot gpu"),
        Case("DiT qkv", make(2, 4096, 1536, 24, 64, 3, 2, True), "aot gpu"),
        Case("all tails, heads of 80", make(2, 19, 144, 2, 80, 3, 2, True)),
        Case("heads of 64, no bias, float32", make(1, 17, 272, 2, 64, 3, 2, True, bias=False, dtype=torch.float32)),
        Case("keys and values, one head of 128", make(2, 5, 64, 1, 128, 2, 1, True)),
        Case("queries, heads of 72", make(1, 1, 64, 4, 72, 1, 1)),
        Case("no rows", make(2, 0, 64, 2, 80, 3, 2, True)),
    ]
