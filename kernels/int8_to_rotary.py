"""Matrix product of whole numbers that leaves queries, keys and values as kernels/prefix_attention_int8.py reads them.

    y = x_scale (q_x q_W^T) w_scale + bias,   N = (H + 2 K) * 128 columns: heads of queries, keys, values
    queries    rope(y) R            keys    (rope(y) - off) R            values    y

    rope       as in kernels/rope.py, from its tables
    R          Sylvester's matrix of a head, as in kernels/quantise.py: what few channels have more of is spread, and
               q R (k R)^T = q k^T
    off        one vector for all keys of a head, near their mean (kernels/rotary_keys.py): softmax does not see it

Queries and keys become int8 with a scale a row of a head, float32; values float16. Two heads are a tile.
Called for the language model of an 8-bit UniPic (engine/layers/int8_attention.py). Letters: R rows, L tokens, H query
heads, K key/value heads, D inputs.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ._device import to_half, walsh_hadamard_rows
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
    store_whole,
    whole_sums,
)
from .int8_linear import int8_linear_ref, int8_linear_torch
from .quantise import quantise_rows, turned
from .quantise_qkv import to_float16
from .rope import rope

WIDTH = 128  # of a head
WRITTEN = 30  # instructions that a value takes beyond those of kernels/int8_linear.py, as compiled for sm_89

# Rows, columns, and K of one of a step's two products; warps, stages.
TILES = ((64, 256, 64, 4, 3), (32, 256, 64, 8, 3), (16, 256, 64, 4, 3))


def int8_linear_to_rotary_ref(x, x_scale, weight, weight_scale, bias, cos, sin, off, heads) -> tuple[Tensor, Tensor]:
    """What the results stand for, on the dequantised operands in float64."""
    y = int8_linear_ref(x, x_scale, weight, weight_scale, bias, "none", None, None)
    return _in_heads(y, cos.double(), sin.double(), off.double(), heads)


def int8_linear_to_rotary_torch(x, x_scale, weight, weight_scale, bias, cos, sin, off, heads):
    y = int8_linear_torch(x, x_scale, weight, weight_scale, bias, "none", None, None, torch.float32)
    numbers, values = _in_heads(y, cos.float(), sin.float(), off, heads)
    return *quantise_rows(numbers), to_float16(values).contiguous()


def _in_heads(y: Tensor, cos: Tensor, sin: Tensor, off: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """y (R, L, N) as mixed queries and keys (R, H + K, L, 128), and values (R, K, L, 128)."""
    kv_heads = off.shape[1]
    q, k, v = y.unflatten(-1, (-1, WIDTH)).transpose(1, 2).split([heads, kv_heads, kv_heads], dim=1)
    cos, sin = (torch.cat([x, x], dim=-1)[:, None] for x in (cos, sin))
    q, k = rope(q, cos, sin), rope(k, cos, sin) - off[:, :, None]
    return turned(torch.cat([q, k], dim=1), WIDTH), v


@triton.jit(do_not_specialize=["length"])
def _to_rotary_kernel(
    x_ptr,  # (R, L, D) int8 contiguous
    x_scale_ptr,  # (R, L) float32
    weight_ptr,  # (N, D) int8 contiguous
    scale_ptr,  # (N) float32, bias alike
    bias_ptr,
    cos_ptr,  # (R, L, WIDTH / 2) contiguous, sin alike
    sin_ptr,
    off_ptr,  # (R, K, WIDTH) float32
    y_ptr,  # (R, H + K, L, WIDTH) int8
    y_scale_ptr,  # (R, H + K, L) float32
    values_ptr,  # (R, K, L, WIDTH) float16
    length,
    N: tl.constexpr,
    K: tl.constexpr,  # D
    WIDTH: tl.constexpr,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,  # 2 WIDTH
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    BIAS: tl.constexpr,
):
    whose = tl.program_id(1).to(tl.int64)  # row of R
    row, column = place(length, tl.cdiv(N, BLOCK_N), BLOCK_M, GROUP_M)
    weight_row = tl.minimum(column * BLOCK_N + tl.arange(0, BLOCK_N), N - 1)
    x_ptr += whose * length * K
    sums = whole_sums(x_ptr, weight_ptr, row, weight_row, length, K, K, BLOCK_M, BLOCK_N, BLOCK_K)
    x_scale = tl.load(x_scale_ptr + whose * length + row, mask=row < length, other=0.0)
    first, second = halves(sums)
    _head(second, x_scale, row, 2 * column + 1, whose, length, scale_ptr, bias_ptr, cos_ptr, sin_ptr, off_ptr, y_ptr,
          y_scale_ptr, values_ptr, N, WIDTH, HEADS, KV_HEADS, BIAS)  # fmt: skip
    _head(first, x_scale, row, 2 * column, whose, length, scale_ptr, bias_ptr, cos_ptr, sin_ptr, off_ptr, y_ptr,
          y_scale_ptr, values_ptr, N, WIDTH, HEADS, KV_HEADS, BIAS)  # fmt: skip


@triton.jit
def _head(
    sums,  # (rows, WIDTH)
    x_scale,
    row,
    head,  # of queries, then keys, then values
    whose,
    length,
    scale_ptr,
    bias_ptr,
    cos_ptr,
    sin_ptr,
    off_ptr,
    y_ptr,
    y_scale_ptr,
    values_ptr,
    N: tl.constexpr,
    WIDTH: tl.constexpr,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    BIAS: tl.constexpr,
):
    HALF: tl.constexpr = WIDTH // 2
    UNIT: tl.constexpr = WIDTH**-0.5  # of the matrix of +1 and -1
    a, b = halves(sums)
    i, inside = tl.arange(0, HALF), row < length
    a = dequantised(a, x_scale, head * WIDTH + i, N, scale_ptr, bias_ptr, BIAS)
    b = dequantised(b, x_scale, head * WIDTH + HALF + i, N, scale_ptr, bias_ptr, BIAS)
    if head < HEADS + KV_HEADS:
        angle = (whose * length + row)[:, None] * HALF + i[None, :]
        cos = tl.load(cos_ptr + angle, mask=inside[:, None], other=0.0).to(tl.float32)
        sin = tl.load(sin_ptr + angle, mask=inside[:, None], other=0.0).to(tl.float32)
        at = off_ptr + (whose * KV_HEADS + head - HEADS) * WIDTH + i
        of_key = (i < HALF) & (head >= HEADS)
        low = a * cos - b * sin - tl.load(at, mask=of_key, other=0.0)[None, :]
        high = b * cos + a * sin - tl.load(at + HALF, mask=of_key, other=0.0)[None, :]
        to = (whose * (HEADS + KV_HEADS) + head) * length + row
        store_whole(
            walsh_hadamard_rows(low + high, HALF), walsh_hadamard_rows(low - high, HALF), y_ptr + to * WIDTH,
            y_scale_ptr + to, inside, UNIT,
        )  # fmt: skip
    elif head < HEADS + 2 * KV_HEADS:
        to = (whose * KV_HEADS + head - HEADS - KV_HEADS) * length + row
        at = values_ptr + to[:, None] * WIDTH + i[None, :]
        tl.store(at, to_half(a), mask=inside[:, None])
        tl.store(at + HALF, to_half(b), mask=inside[:, None])


def _int8_linear_to_rotary_triton(x, x_scale, weight, weight_scale, bias, cos, sin, off, heads):
    (rows, length, k), n, kv_heads = x.shape, len(weight), off.shape[1]
    numbers = torch.empty((rows, heads + kv_heads, length, WIDTH), dtype=torch.int8, device=x.device)
    scale = torch.empty(numbers.shape[:-1], dtype=torch.float32, device=x.device)
    values = torch.empty((rows, kv_heads, length, WIDTH), dtype=torch.float16, device=x.device)
    tiles = product_options("int8_to_rotary", "", TILES, (rows * length, n, k), x.device, fixed=("BLOCK_N",))
    launch(
        _to_rotary_kernel,
        (cdiv(length, tiles["BLOCK_M"]) * cdiv(n, tiles["BLOCK_N"]), rows),
        *(x.contiguous(), x_scale.contiguous(), weight, weight_scale, weight_scale if bias is None else bias),
        *(cos.contiguous(), sin.contiguous(), off.contiguous(), numbers, scale, values, length),
        N=n,
        K=k,
        WIDTH=WIDTH,
        HEADS=heads,
        KV_HEADS=kv_heads,
        GROUP_M=GROUP_M,
        BIAS=bias is not None,
        **tiles,
    )
    return numbers, scale, values


def int8_linear_to_rotary_cost(x, x_scale, weight, weight_scale, bias, cos, sin, off, heads) -> Cost:
    """With the instructions that a product alone would not have."""
    base = product_cost((x, x_scale, weight, weight_scale, bias, cos, sin, off), weight, "none", torch.int8)
    rows, kv_heads = x_scale.numel(), off.shape[1]
    turned_columns = (heads + kv_heads) * WIDTH
    written = rows * (4 * (heads + kv_heads) + kv_heads * WIDTH)  # scales, and the second byte of values
    return replace(base, nbytes=base.nbytes + written, beside=WRITTEN * INSTRUCTION * rows * turned_columns)


_int8_linear_to_rotary = Operator(
    "int8_linear_to_rotary(Tensor x, Tensor x_scale, Tensor weight, Tensor weight_scale, Tensor? bias, Tensor cos, "
    "Tensor sin, Tensor off, int heads) -> (Tensor, Tensor, Tensor)",
    torch=int8_linear_to_rotary_torch,
    triton=_int8_linear_to_rotary_triton,
    cost=int8_linear_to_rotary_cost,
)


def int8_linear_to_rotary(
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    off: Tensor,
    heads: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys int8 (R, H + K, L, 128) with scales (R, H + K, L), values float16 (R, K, L, 128).

    x (R, L, D) int8, cos and sin (R, L, 64) of any float, off (R, K, 128) float32, the rest as for int8_linear.
    """
    check_product(x, weight, weight_scale, bias, "none", None, None)
    (rows, length), kv_heads = x.shape[:-1], off.shape[1]
    if x_scale.shape != x.shape[:-1] or len(weight) != (heads + 2 * kv_heads) * WIDTH:
        raise ValueError(
            f"x {tuple(x.shape)}, x_scale {tuple(x_scale.shape)} and {len(weight)} outputs are not (R, L, D), (R, L) "
            f"and {heads} + 2 * {kv_heads} heads of {WIDTH} columns"
        )
    if not cos.shape == sin.shape == (rows, length, WIDTH // 2) or off.shape != (rows, kv_heads, WIDTH):
        raise ValueError(
            f"cos {tuple(cos.shape)}, sin {tuple(sin.shape)} and off {tuple(off.shape)} are not "
            f"({rows}, {length}, {WIDTH // 2}) and ({rows}, {kv_heads}, {WIDTH})"
        )
    return _int8_linear_to_rotary(x, x_scale, weight, weight_scale, bias, cos, sin, off, heads)


def int8_linear_to_rotary_cases() -> list[Case]:
    def make(rows: int, length: int, k: int, heads: int, kv_heads: int, **how: Any):
        def arguments(device):
            noise = torch.Generator().manual_seed(0)
            x = torch.randint(-127, 128, (rows, length, k), dtype=torch.int8, generator=noise).to(device)
            x_scale = torch.rand(rows, length, generator=noise).to(device) / 64
            n = (heads + 2 * kv_heads) * WIDTH
            weight, scale, bias, *_, dtype = product_operands(device, rows * length, k, n, **how)
            angle = 6.28 * torch.rand(rows, length, WIDTH // 2, generator=noise)
            off = torch.randn(rows, kv_heads, WIDTH, generator=noise).to(device)
            cos, sin = angle.cos().to(device, dtype), angle.sin().to(device, dtype)
            return x, x_scale, weight, scale, bias, cos, sin, off, heads

        return arguments

    return [
        Case("LLM qkv at 1024, both guidance halves", make(2, 4160, 1536, 12, 2), "aot gpu"),
        Case("LLM qkv, 200 tokens", make(2, 200, 1536, 12, 2), "aot gpu"),
        Case("LLM qkv, first round", make(2, 64, 1536, 12, 2), "aot gpu"),
        Case("tails, an odd number of heads", make(2, 19, 144, 3, 1)),
        Case("a tile of a key and a value, no bias, float32", make(1, 5, 64, 1, 1, bias=False, dtype=torch.float32)),
        Case("no rows", make(2, 0, 64, 2, 1)),
    ]
