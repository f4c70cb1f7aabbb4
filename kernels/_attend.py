"""What the attention kernels are built from: rows of a head, products, and a softmax that goes through keys once.

The running softmax is that of FlashAttention-2 (arXiv 2307.08691). A head dim is covered by two blocks where that is
less than one, 80 = 64 + 16. Scores are in powers of two: log2(e) / sqrt(d) is folded into one factor.
"""

import math

from ._device import rounded_to_int8, row_scale
from ._op import tl, triton

LOG2_E = 1 / math.log(2)


def head_blocks(width: int, least: int = 16) -> tuple[int, int]:
    """Two powers of two, the second perhaps 0, that cover a head dim; products of matrices take no fewer than `least`.

    Neither is over 64 up to a head dim of 128: Triton spreads warps over the columns of sums that are wider than high,
    and each row's maximum then has to travel between warps.
    """
    whole = max(least, 1 << (width - 1).bit_length())
    if whole == least:
        return whole, 0
    first = whole // 2
    second = max(least, 1 << (width - first - 1).bit_length())
    return (whole, 0) if whole <= 64 and first + second == whole else (first, second)


@triton.jit
def load_rows(
    ptr,  # of the first row
    stride,
    count,  # rows there are
    ROWS: tl.constexpr,
    FIRST: tl.constexpr,
    WIDTH: tl.constexpr,
    D: tl.constexpr,
    MASK: tl.constexpr,
):
    """Columns FIRST .. FIRST + WIDTH - 1 of ROWS rows of D; zeros beyond D and, with MASK, beyond `count`."""
    row = tl.arange(0, ROWS)[:, None]
    column = FIRST + tl.arange(0, WIDTH)[None, :]
    at = ptr + row * stride + column
    if FIRST + WIDTH > D:
        if MASK:
            return tl.load(at, mask=(row < count) & (column < D), other=0.0)
        return tl.load(at, mask=column < D, other=0.0)
    if MASK:
        return tl.load(at, mask=row < count, other=0.0)
    return tl.load(at)


@triton.jit
def store_rows(
    ptr,
    stride,
    count,
    rows,  # (ROWS, WIDTH)
    ROWS: tl.constexpr,
    FIRST: tl.constexpr,
    WIDTH: tl.constexpr,
    D: tl.constexpr,
):
    row = tl.arange(0, ROWS)[:, None]
    column = FIRST + tl.arange(0, WIDTH)[None, :]
    tl.store(ptr + row * stride + column, rows.to(ptr.dtype.element_ty), mask=(row < count) & (column < D))


@triton.jit
def store_means(
    ptr, stride, count, state, ROWS: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr, D: tl.constexpr
):
    """The sums of values in both blocks of columns, divided by the sums of weights."""
    share = (1 / state[3])[:, None]
    store_rows(ptr, stride, count, state[0] * share, ROWS, 0, FIRST, D)
    if SECOND:
        store_rows(ptr, stride, count, state[1] * share, ROWS, FIRST, SECOND, D)


@triton.jit
def store_whole_means(
    ptr,  # int8
    scale_ptr,  # of the first row's scale
    stride,
    scale_stride,
    count,
    state,
    ROWS: tl.constexpr,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    D: tl.constexpr,
):
    """The same as whole numbers and a scale a row; columns beyond D are zero."""
    share = (1 / state[3])[:, None]
    largest = tl.max(tl.abs(state[0] * share), axis=1)
    if SECOND:
        largest = tl.maximum(largest, tl.max(tl.abs(state[1] * share), axis=1))
    scale, row = row_scale(largest), tl.arange(0, ROWS)
    tl.store(scale_ptr + row * scale_stride, scale, mask=row < count)
    share *= (1 / scale)[:, None]
    store_rows(ptr, stride, count, rounded_to_int8(state[0] * share), ROWS, 0, FIRST, D)
    if SECOND:
        store_rows(ptr, stride, count, rounded_to_int8(state[1] * share), ROWS, FIRST, SECOND, D)


@triton.jit
def softmax_step(scores, largest, total, scale):
    """One more block of keys: their weights, the largest score and the sum so far, and what older sums shrink by."""
    now = tl.maximum(largest, tl.max(scores, axis=1) * scale)
    weights = tl.exp2(scores * scale - now[:, None])
    shrink = tl.exp2(largest - now)
    return weights, now, total * shrink + tl.sum(weights, axis=1), shrink


@triton.jit
def attend(
    state,  # (BLOCK_M, D0) and (BLOCK_M, D1) sums of values, (BLOCK_M) largest score, (BLOCK_M) sum of weights
    q0,
    q1,
    k_ptr,  # of key 0 of the head
    v_ptr,
    k_stride,
    v_stride,
    begin,  # keys begin .. end - 1
    end,
    last,  # (BLOCK_M) the last key a query sees; read with MASK
    scale,
    D: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASK: tl.constexpr,  # else every query sees all these keys and they are whole blocks
):
    acc0, acc1, largest, total = state
    k_ptr += begin.to(tl.int64) * k_stride
    v_ptr += begin.to(tl.int64) * v_stride
    for start in tl.range(begin, end, BLOCK_N):
        left = end - start
        k0 = load_rows(k_ptr, k_stride, left, BLOCK_N, 0, D0, D, MASK)
        scores = tl.dot(q0, tl.trans(k0), input_precision="ieee")
        if D1:
            k1 = load_rows(k_ptr, k_stride, left, BLOCK_N, D0, D1, D, MASK)
            scores = tl.dot(q1, tl.trans(k1), scores, input_precision="ieee")
        if MASK:
            key = start + tl.arange(0, BLOCK_N)
            scores = tl.where(key[None, :] <= last[:, None], scores, float("-inf"))
        weights, largest, total, shrink = softmax_step(scores, largest, total, scale)
        v0 = load_rows(v_ptr, v_stride, left, BLOCK_N, 0, D0, D, MASK)
        weights = weights.to(v0.dtype)
        acc0 = tl.dot(weights, v0, acc0 * shrink[:, None], input_precision="ieee")
        if D1:
            v1 = load_rows(v_ptr, v_stride, left, BLOCK_N, D0, D1, D, MASK)
            acc1 = tl.dot(weights, v1, acc1 * shrink[:, None], input_precision="ieee")
        k_ptr += BLOCK_N * k_stride
        v_ptr += BLOCK_N * v_stride
    return acc0, acc1, largest, total


@triton.jit
def empty_state(BLOCK_M: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr):
    acc0 = tl.zeros((BLOCK_M, D0), tl.float32)
    acc1 = tl.zeros((BLOCK_M, D1 if D1 else 1), tl.float32)
    return acc0, acc1, tl.full((BLOCK_M,), float("-inf"), tl.float32), tl.zeros((BLOCK_M,), tl.float32)


@triton.jit
def attend_int8(
    state,
    q0,
    q1,
    q_scale,  # (BLOCK_M), with log2(e) / sqrt(d)
    k_ptr,  # of key 0 of the head, int8 and contiguous; the next two alike, float32 and float16
    k_scale_ptr,
    v_ptr,
    begin,  # keys begin .. end - 1
    end,
    last,  # (BLOCK_M) the last key a query sees; read with MASK
    D: tl.constexpr,
    D0: tl.constexpr,  # blocks of columns of queries and keys
    D1: tl.constexpr,
    V0: tl.constexpr,  # and of values
    V1: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SHIFT: tl.constexpr,  # log2(BLOCK_N)
    MASK: tl.constexpr,
):
    """As `attend`, with scores in whole numbers and sums over a block in float16."""
    key = tl.arange(0, BLOCK_N)
    k_ptr += begin.to(tl.int64) * D
    v_ptr += begin.to(tl.int64) * D
    for start in tl.range(begin, end, BLOCK_N):
        left = end - start
        scores = tl.dot(q0, tl.trans(load_rows(k_ptr, D, left, BLOCK_N, 0, D0, D, MASK)))
        if D1:
            k1 = load_rows(k_ptr, D, left, BLOCK_N, D0, D1, D, MASK)
            scores = tl.dot(q1, tl.trans(k1), scores, out_dtype=tl.int32)
        if MASK:
            k_scale = tl.load(k_scale_ptr + start + key, mask=key < left, other=0.0)
            seen = (start + key)[None, :] <= last[:, None]
            scores = tl.where(seen, scores.to(tl.float32) * k_scale[None, :], float("-inf"))
        else:
            scores = scores.to(tl.float32) * tl.load(k_scale_ptr + start + key)[None, :]
        v0 = load_rows(v_ptr, D, left, BLOCK_N, 0, V0, D, MASK)
        v1 = v0
        if V1:
            v1 = load_rows(v_ptr, D, left, BLOCK_N, V0, V1, D, MASK)
        state = add_halves(state, scores, q_scale, v0, v1, SHIFT, V1 > 0)
        k_ptr += BLOCK_N * D
        v_ptr += BLOCK_N * D
    return state


@triton.jit
def add_halves(
    state,
    scores,  # (BLOCK_M, BLOCK_N), to be multiplied by q_scale (BLOCK_M)
    q_scale,
    v0,  # float16
    v1,
    SHIFT: tl.constexpr,
    TWO: tl.constexpr,  # blocks of columns of values
):
    """The state with one more block of keys.

    Weights have a factor 2^-SHIFT = 1 / BLOCK_N, which the division by `total` takes away again: so the sum of a block
    is never larger than its largest value, and float16 does not overflow.
    """
    acc0, acc1, largest, total = state
    now = tl.maximum(largest, tl.max(scores, axis=1) * q_scale)
    weights = tl.exp2(scores * q_scale[:, None] - (now + SHIFT)[:, None])
    shrink = tl.exp2(largest - now)
    halves = weights.to(tl.float16)
    acc0 = acc0 * shrink[:, None] + tl.dot(halves, v0, out_dtype=tl.float16)
    if TWO:
        acc1 = acc1 * shrink[:, None] + tl.dot(halves, v1, out_dtype=tl.float16)
    return acc0, acc1, now, total * shrink + tl.sum(weights, axis=1)
