"""The diffusion head's MLPs with int8 weights, W8A8: what is before the second product, in one launch.

    y = silu((LN(h) (1 + scale) + shift) W^T + b)
    s = max |y| / 127 and q = round(y / s) in each row of a group of 128 columns, so that y ~ q * s

W ~ q_W * w_scale as in kernels/int8_linear.py. What multiplies W is made whole with a scale for each group as well, on
its way to the product, and no pass over a row is needed before. Every program does it for its own rows; the wider its
tile, the fewer repeat it. kernels/int8_of_groups.py is the other launch of a block.
Called by `norm_mlp` of engine/layers/linear.py. Letters: M rows, K width in, N width out.
"""

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from ._device import moments, rounded_to_int8, row_scale
from ._op import Case, Cost, Operator, cdiv, launch, tl, triton
from ._product import GROUP, INSTRUCTION, Tile, check_product, halves, product_cost, tile_options, weight_rows
from ._tuned import Options, dtype_class, row_class, tuned
from .head import ROWS, modulated_linear_ref, random_block
from .int8_of_groups import ADDED, MAGIC, OFFSET, int8_linear_of_groups_torch
from .int8_to_groups import WRITTEN, finish_group
from .norms import norm_ref
from .quantise import quantise_rows

# Rows, columns and K of a step's product; warps, stages. Columns are whole groups.
TILES = (
    (16, 128, 128, 4, 3),
    (16, 256, 128, 8, 3),
    (32, 256, 128, 8, 2),
    (64, 256, 128, 8, 2),
)
# Of a value that multiplies W: bytes that are read, and instructions until it is whole, as compiled for sm_89.
READ, MADE = 8, 34


@lru_cache(4096)
def tile(m: int, n: int, dtype: torch.dtype) -> Tile:
    """The tile for m rows and n columns; a heuristic, never measured.

    As `_product.fewest_clocks`, and beside it what every program does to its rows, and that a multiprocessor has 64
    bytes a clock from L2. K scales all of it alike.
    """

    def clocks(candidate: Tile) -> float:
        rows, columns = candidate[:2]
        programs, taken = cdiv(m, rows) * cdiv(n, columns), READ * rows + columns
        turns = cdiv(programs, 128)
        computing = turns * rows * (columns / 750 + MADE / 128)
        return max(computing, programs * taken / 2000, turns * taken / 64)

    return min(TILES[:-1] if dtype == torch.float32 else TILES, key=clocks)  # the last would spill


def options(h: Tensor, n: int) -> Options:
    """Of the launch for rows h (M, K)."""
    (m, k), single = h.shape, h.dtype == torch.float32
    heuristic = tile_options(tile(m, n, h.dtype))
    heuristic["num_stages"] = min(heuristic["num_stages"], 2 if single else 3)
    del heuristic["BLOCK_K"]  # a group

    def staged(tiles: Options) -> int:
        return GROUP * (tiles["BLOCK_M"] * h.element_size() * 3 + tiles["BLOCK_N"])

    return tuned("head_int8", f"{dtype_class(h.dtype)} m{row_class(m)} n{n} k{k}", heuristic, h.device, staged)


# The weight comes first: the first tensor of a product tells the precision it is multiplied in.


def modulated_linear_int8_ref(weight, weight_scale, bias, h, shift, scale, norm_weight, norm_bias, eps) -> Tensor:
    """y (M, N / 128, 128) on the dequantised weight, in the dtype of h, of which nothing is quantised."""
    wide = weight.to(h.dtype) * weight_scale[:, None].to(h.dtype)
    y = modulated_linear_ref(h, shift, scale, norm_weight, norm_bias, eps, wide, bias)
    return y.unflatten(1, (-1, GROUP))


def modulated_linear_int8_torch(weight, weight_scale, bias, h, shift, scale, norm_weight, norm_bias, eps):
    x = norm_ref(h, norm_weight, norm_bias, None, None, eps, False)
    x = x * (1 + scale.to(x.dtype)) + shift.to(x.dtype)
    groups = quantise_rows(x.unflatten(1, (-1, GROUP)))
    y = int8_linear_of_groups_torch(*groups, weight, weight_scale, bias, None, None, torch.float32)
    return quantise_rows(F.silu(y).unflatten(1, (-1, GROUP)))


@triton.jit(do_not_specialize=["m"])
def _head_int8_kernel(
    h_ptr,  # (M, K), rows h_stride apart
    shift_ptr,  # (M, K), rows m_stride apart; scale alike
    scale_ptr,
    norm_weight_ptr,  # (K); norm_bias alike
    norm_bias_ptr,
    weight_ptr,  # (N, K) int8 contiguous
    weight_scale_ptr,  # (N) float32
    bias_ptr,  # (N)
    y_ptr,  # (M, N) int8
    y_scale_ptr,  # (M, N / 128) float32
    h_stride,
    m_stride,
    eps,
    m,
    N: tl.constexpr,
    K: tl.constexpr,
    GROUP: tl.constexpr,
    MAGIC: tl.constexpr,
    OFFSET: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,  # a group or two
    STAT: tl.constexpr,
    BIAS: tl.constexpr,
):
    tl.static_assert(BLOCK_N == GROUP or BLOCK_N == 2 * GROUP, "a tuned table may say anything")
    left = tl.program_id(0) * BLOCK_N
    row = tl.program_id(1).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    safe = tl.minimum(row, m - 1)  # cheaper to compute twice than to mask
    mean, variance = moments(h_ptr + safe * h_stride, K, BLOCK_M, STAT)
    inverse = tl.rsqrt(variance + eps)
    lift = -mean * inverse

    at = tl.arange(0, GROUP)
    h_at = h_ptr + safe[:, None] * h_stride + at[None, :]
    modulation = safe[:, None] * m_stride + at[None, :]
    weight_at = weight_ptr + weight_rows(left, N, BLOCK_N, False).to(tl.int64)[None, :] * K + at[:, None]
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, K, GROUP):
        x = tl.load(h_at + start).to(tl.float32) * inverse[:, None] + lift[:, None]
        x = x * tl.load(norm_weight_ptr + start + at).to(tl.float32)[None, :]
        x = x + tl.load(norm_bias_ptr + start + at).to(tl.float32)[None, :]
        scale = tl.load(scale_ptr + modulation + start).to(tl.float32)
        x = x * scale + x + tl.load(shift_ptr + modulation + start).to(tl.float32)
        x_scale = row_scale(tl.max(tl.abs(x), axis=1))
        weight = tl.load(weight_at + start)
        sums = tl.full((BLOCK_M, BLOCK_N), MAGIC, tl.int32)
        sums = tl.dot(rounded_to_int8(x * (1.0 / x_scale)[:, None]), weight, sums, out_dtype=tl.int32)
        total += (sums.to(tl.float32, bitcast=True) - OFFSET) * x_scale[:, None]

    one = tl.full((BLOCK_M,), 1.0, tl.float32)
    if BLOCK_N == GROUP:
        finish_group(total, one, row, left, m, weight_scale_ptr, bias_ptr, y_ptr, y_scale_ptr, N, GROUP, False, BIAS,
                     False, False, True)  # fmt: skip
    else:
        first, second = halves(total)
        finish_group(first, one, row, left, m, weight_scale_ptr, bias_ptr, y_ptr, y_scale_ptr, N, GROUP, False, BIAS,
                     False, False, True)  # fmt: skip
        finish_group(second, one, row, left + GROUP, m, weight_scale_ptr, bias_ptr, y_ptr, y_scale_ptr, N, GROUP,
                     False, BIAS, False, False, True)  # fmt: skip


def _modulated_linear_int8_triton(weight, weight_scale, bias, h, shift, scale, norm_weight, norm_bias, eps):
    if shift.stride() != scale.stride() or shift.stride(1) != 1:
        shift, scale = shift.contiguous(), scale.contiguous()
    h = h if h.stride(1) == 1 else h.contiguous()
    (m, k), n = h.shape, len(weight)
    y = torch.empty((m, n // GROUP, GROUP), dtype=torch.int8, device=h.device)
    y_scale = torch.empty(y.shape[:2], dtype=torch.float32, device=h.device)
    tiles = options(h, n)
    launch(
        _head_int8_kernel,
        (cdiv(n, tiles["BLOCK_N"]), cdiv(m, tiles["BLOCK_M"])),
        *(h, shift, scale, norm_weight, norm_bias, weight, weight_scale),
        *(weight_scale if bias is None else bias, y, y_scale, h.stride(0), shift.stride(0), eps, m),
        N=n,
        K=k,
        GROUP=GROUP,
        MAGIC=MAGIC,
        OFFSET=OFFSET,
        STAT=512 * tiles["num_warps"] // tiles["BLOCK_M"],  # 16 values a thread
        BIAS=bias is not None,
        **tiles,
    )
    return y, y_scale


def modulated_linear_int8_cost(weight, weight_scale, bias, h, *rest) -> Cost:
    """With what programs repeat, the sums of groups, and what makes results whole."""
    operands = (h, weight, weight_scale, bias, *(t for t in rest if isinstance(t, Tensor)))
    base, (m, k), n = product_cost(operands, weight, "none", torch.int8), h.shape, len(weight)
    repeated = cdiv(n, tile(m, n, h.dtype)[1]) * MADE * m * k
    beside = INSTRUCTION * (repeated + (ADDED * k // GROUP + WRITTEN) * m * n)
    return Cost(base.flop, base.nbytes + 4 * m * n // GROUP, beside=beside)


_modulated_linear_int8 = Operator(
    "modulated_linear_int8(Tensor weight, Tensor weight_scale, Tensor? bias, Tensor h, Tensor shift, Tensor scale, "
    "Tensor norm_weight, Tensor norm_bias, float eps) -> (Tensor, Tensor)",
    torch=modulated_linear_int8_torch,
    triton=_modulated_linear_int8_triton,
    cost=modulated_linear_int8_cost,
)


def modulated_linear_int8(
    h: Tensor,
    shift: Tensor,
    scale: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """int8 (M, N / 128, 128) and scales (M, N / 128) float32 of silu((LN(h) (1 + scale) + shift) W^T + b).

    h, shift, scale (M, K), norm_* (K); weight (N, K) int8 contiguous, weight_scale (N) float32, bias (N).
    K and N are multiples of 128.
    """
    check_product(h, weight, weight_scale, bias, "none", None, None)
    if not (h.shape == shift.shape == scale.shape):
        raise ValueError(f"shift {tuple(shift.shape)} and scale {tuple(scale.shape)} are not for {tuple(h.shape)}")
    if weight.shape[0] % GROUP or weight.shape[1] % GROUP:
        raise ValueError(f"a weight {tuple(weight.shape)}: both have to be multiples of {GROUP}")
    return _modulated_linear_int8(weight, weight_scale, bias, h, shift, scale, norm_weight, norm_bias, eps)


def modulated_linear_int8_cases() -> list[Case]:
    def make(*shape: int, bias: bool = True, **how):
        def arguments(device):
            *before, weight, offset = random_block(*shape, **how)(device)
            return *quantise_rows(weight), offset if bias else None, *before

        return arguments

    single = torch.float32
    return [
        *(Case(f"{rows} rows of a block", make(rows, 1536, 1536), "aot gpu") for rows in ROWS),
        *(Case(f"{n} rows in float32", make(n, 1536, 1536, dtype=single), "aot gpu") for n in (20, 100, 402, 804)),
        Case("few rows, one group, float32", make(5, 128, 128, dtype=single)),
        Case("a tile and a half, no bias", make(33, 256, 384, bias=False)),
        Case("many rows", make(130, 128, 256)),
        Case("rows of a batch of pictures", make(515, 128, 128)),
        Case("one row", make(1, 128, 256)),
        Case("no rows", make(0, 128, 128)),
    ]
