"""Attention of one new token a row over a long cache, its keys split over programs (Flash-Decoding).

    row r    sees keys 0 .. lengths[r] - 1

    q (R, H, 1, d); k, v (R, K, capacity, d)    the new token's key and value already in their place
    lengths (R)                                 int32, on the device: a captured graph serves every token

Each program takes one share of the keys for all query heads of one key head, and leaves a sum of values, its largest
score and its sum of weights; a second kernel joins the shares. Their number and the workspace, under 2 MB, follow from
the capacity; a share beyond the length weighs nothing and reads nothing. Called by the language model for `ask`.
"""

import torch
from torch import Tensor

from ._attend import LOG2_E, attend, empty_state, head_blocks, load_rows, store_rows
from ._op import Case, Cost, Operator, launch, next_power_of_2, tl, triton, unit_rows
from ._tuned import dtype_class, tuned
from .attention import attention_ref, attention_torch, random_qkv

HEURISTIC = {"BLOCK_N": 64, "num_warps": 4, "num_stages": 2}
PROGRAMS = 256  # heuristic: two for each multiprocessor of a large card


def _by_row(attend_all, q, k, v, lengths) -> Tensor:
    """On CUDA it waits for the device to learn the lengths."""
    rows = (slice(row, row + 1) for row in range(len(q)))
    found = [
        attend_all(q[row], k[row, :, :length], v[row, :, :length], False)
        for row, length in zip(rows, lengths.tolist(), strict=True)
    ]
    return torch.cat(found) if found else q.clone()


def decode_attention_ref(q, k, v, lengths) -> Tensor:
    """In float32 or wider, scores materialised. Arguments as of `decode_attention`."""
    return _by_row(attention_ref, q, k, v, lengths)


def decode_attention_torch(q, k, v, lengths) -> Tensor:
    return _by_row(attention_torch, q, k, v, lengths)


@triton.jit(do_not_specialize=["kv_heads", "group", "share"])
def _decode_kernel(
    q_ptr,  # (R, H, 1, d), last dimension contiguous, as of all caches
    k_ptr,  # (R, K, capacity, d)
    v_ptr,
    lengths_ptr,  # (R) int32
    sums_ptr,  # (R, H, splits, d) float32: values by their weights
    largest_ptr,  # (R, H, splits) float32: scores
    total_ptr,  # (R, H, splits) float32: weights
    q_batch,  # strides
    q_head,
    k_batch,
    k_head,
    k_row,
    v_batch,
    v_head,
    v_row,
    kv_heads,
    group,  # query heads a key head serves
    share,  # keys of a split
    scale,  # log2(e) / sqrt(d)
    D: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    BLOCK_M: tl.constexpr,  # at least `group`
    BLOCK_N: tl.constexpr,
):
    split = tl.program_id(0)
    row = (tl.program_id(1) // kv_heads).to(tl.int64)
    kv_head = tl.program_id(1) % kv_heads
    q_ptr += row * q_batch + kv_head * group * q_head
    q0 = load_rows(q_ptr, q_head, group, BLOCK_M, 0, D0, D, True)
    q1 = q0
    if D1:
        q1 = load_rows(q_ptr, q_head, group, BLOCK_M, D0, D1, D, True)
    head = tl.arange(0, BLOCK_M)
    state = empty_state(BLOCK_M, D0, D1)
    begin = split * share
    end = tl.minimum(begin + share, tl.load(lengths_ptr + row))
    k, v = k_ptr + row * k_batch + kv_head * k_head, v_ptr + row * v_batch + kv_head * v_head
    last = head * 0 + end - 1
    state = attend(state, q0, q1, k, v, k_row, v_row, begin, end, last, scale, D, D0, D1, BLOCK_N, True)
    splits = tl.num_programs(0)
    first = tl.program_id(1).to(tl.int64) * group * splits + split
    sums_ptr += first * D
    store_rows(sums_ptr, splits * D, group, state[0], BLOCK_M, 0, D0, D)
    if D1:
        store_rows(sums_ptr, splits * D, group, state[1], BLOCK_M, D0, D1, D)
    tl.store(largest_ptr + first + head * splits, state[2], mask=head < group)
    tl.store(total_ptr + first + head * splits, state[3], mask=head < group)


@triton.jit(do_not_specialize=["splits"])
def _join_kernel(
    sums_ptr,  # (R, H, splits, d), as left by the shares
    largest_ptr,
    total_ptr,
    out_ptr,  # (R, H, d)
    splits,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SPLITS: tl.constexpr,  # at least `splits`
    ROWS: tl.constexpr,  # splits at a time
):
    head = tl.program_id(0).to(tl.int64)
    sums_ptr += head * splits * D
    largest_ptr += head * splits
    every = tl.arange(0, SPLITS)
    largest = tl.load(largest_ptr + every, mask=every < splits, other=float("-inf"))
    top = tl.max(largest, axis=0)
    total = tl.load(total_ptr + head * splits + every, mask=every < splits, other=0.0)
    total = tl.sum(total * tl.exp2(largest - top), axis=0)
    column = tl.arange(0, BLOCK_D)
    values = tl.zeros((BLOCK_D,), tl.float32)
    for start in tl.range(0, splits, ROWS):
        some = start + tl.arange(0, ROWS)
        weight = tl.exp2(tl.load(largest_ptr + some, mask=some < splits, other=float("-inf")) - top)
        rows = load_rows(sums_ptr + start * D, D, splits - start, ROWS, 0, BLOCK_D, D, True)
        values += tl.sum(rows * weight[:, None], axis=0)
    tl.store(out_ptr + head * D + column, (values / total).to(out_ptr.dtype.element_ty), mask=column < D)


def _decode_attention_triton(q, k, v, lengths):
    q, k, v = unit_rows(q), unit_rows(k), unit_rows(v)
    (rows, heads, _, width), kv_heads = q.shape, k.shape[1]
    d0, d1 = head_blocks(width)
    row = 2 * (d0 + d1) * q.element_size()  # bytes of a key and a value
    key = f"{dtype_class(q.dtype)} d{width}"
    tile = tuned("decode_attention", key, HEURISTIC, q.device, lambda tile: tile["BLOCK_N"] * row)
    block = tile["BLOCK_N"]
    blocks = -(-k.shape[2] // block)
    blocks_each = max(1, -(-blocks * rows * kv_heads // PROGRAMS))
    splits = -(-blocks // blocks_each)
    sums = torch.empty(rows, heads, splits, width, dtype=torch.float32, device=q.device)
    largest, total = torch.empty(2, rows, heads, splits, dtype=torch.float32, device=q.device)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    launch(
        _decode_kernel,
        (splits, rows * kv_heads),
        *(q, k, v, lengths, sums, largest, total),
        *(*q.stride()[:2], *k.stride()[:3], *v.stride()[:3]),
        *(kv_heads, heads // kv_heads, blocks_each * block, LOG2_E / width**0.5),
        D=width,
        D0=d0,
        D1=d1,
        BLOCK_M=max(16, next_power_of_2(heads // kv_heads)),
        **tile,
    )
    launch(
        _join_kernel,
        (rows * heads,),
        *(sums, largest, total, out, splits),
        D=width,
        BLOCK_D=next_power_of_2(width),
        SPLITS=next_power_of_2(splits),
        ROWS=16,
        num_warps=4,
    )
    return out


def decode_attention_cost(q, k, v, lengths) -> Cost:
    """By shapes: the cache counts as full."""
    return Cost(4 * q.numel() * k.shape[2], (2 * q.numel() + k.numel() + v.numel()) * q.element_size())


operator = Operator(
    "decode_attention(Tensor q, Tensor k, Tensor v, Tensor lengths) -> Tensor",
    torch=decode_attention_torch,
    triton=_decode_attention_triton,
    cost=decode_attention_cost,
)


def decode_attention(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
    """q (R, H, 1, d); k, v (R, K, capacity, d); lengths (R) int32, at least 1; returns (R, H, 1, d)."""
    return operator(q, k, v, lengths)


def decode_attention_cases() -> list[Case]:
    def case(
        why: str,
        shape: tuple[int, ...],
        lengths: list[int],
        marks: str = "interp aot gpu",
        dtype: torch.dtype = torch.bfloat16,
    ) -> Case:
        heads, kv_heads, capacity, width = shape

        def make(device: torch.device | str) -> tuple[Tensor, ...]:
            q, k, v = random_qkv(device, len(lengths), heads, kv_heads, 1, capacity, width, dtype=dtype, layout="apart")
            for row, length in enumerate(lengths):
                k[row, :, length:] = v[row, :, length:] = float("nan")  # which must not matter
            return q * 3, k, v, torch.tensor(lengths, dtype=torch.int32).to(device)

        return Case(why, make, marks)

    return [
        case("a token of an answer about a 1024 picture", (12, 2, 4608, 128), [4301], "aot gpu"),
        case("several shares, the last ones empty", (12, 2, 300, 128), [130]),
        case("a head dim in two blocks, the last block not full", (6, 2, 130, 80), [99]),
        case("rows of different lengths, one of one key", (4, 4, 9, 64), [1, 9]),
        case("tiny head in float32, more query heads than rows of a block", (34, 2, 20, 12), [19], dtype=torch.float32),
        case("no rows", (2, 2, 5, 64), []),
    ]
