"""Causal attention of a block of rows, each behind the cached keys of its own prompt.

    row r, query i of the block    sees keys 0 .. S - 1 of prompt p = prefix_of[r], S = lengths[p],
                                   and keys 0 .. i of the row itself

    q (R, H, L, d); k, v (R, K, L, d)         the block's own
    prefix_k, prefix_v (P, K, capacity, d)    one layer of all prompts' caches, read where they lie: no copy, no pad
    prefix_of (R), lengths (P)                int32, on the device

Query head h reads key head h // (H / K). Called by the language model in every round of masked decoding.

Why it takes them like this. Prompts are few (with guidance one and its empty twin) but of different lengths, and rows
share them. One tensor with a slot for each prompt lets one launch serve all rows, with two addresses and six strides
for any number of prompts. So the caches of one batch are slots of one allocation, (layers, P, K, capacity, d), filled
in place; a lone cache is a slot of its own, `keys[layer][None]`. What lies beyond a prompt's length is never read.
Lengths and the table of rows are read from memory when the kernel runs: a captured graph serves any prompts that fit
the capacity, if the same buffers are refilled. No host sync, no shape that depends on a prompt's length.
"""

from itertools import groupby

import torch
from torch import Tensor

from ._attend import LOG2_E, attend, empty_state, head_blocks, load_rows, store_means
from ._op import Case, Cost, Operator, launch, tl, triton, unit_rows
from ._tuned import dtype_class, tuned
from .attention import attention_cost, attention_ref, attention_torch, random_qkv, tiles


def _by_prompt(attend_all, q, k, v, prefix_k, prefix_v, prefix_of, lengths) -> Tensor:
    """Rows of one prompt at a time, keys joined; on CUDA it waits for the device to learn the lengths."""
    out, row, lengths = [], 0, lengths.tolist()
    for prompt, run in groupby(prefix_of.tolist()):
        rows = len(list(run))
        here, length = slice(row, row + rows), lengths[prompt]
        keys, values = (x[prompt, :, :length].expand(rows, -1, -1, -1) for x in (prefix_k, prefix_v))
        out.append(attend_all(q[here], torch.cat([keys, k[here]], 2), torch.cat([values, v[here]], 2), True))
        row += rows
    return torch.cat(out) if out else q.clone()


def prefix_attention_ref(*arguments: Tensor) -> Tensor:
    """In float32 or wider, scores materialised. Arguments as of `prefix_attention`."""
    return _by_prompt(attention_ref, *arguments)


def prefix_attention_torch(*arguments: Tensor) -> Tensor:
    return _by_prompt(attention_torch, *arguments)


@triton.jit(do_not_specialize=["length", "heads", "group"])
def _prefix_attention_kernel(
    q_ptr,  # (R, H, L, d), last dimension contiguous, as of k, v and the prefixes
    k_ptr,  # (R, K, L, d)
    v_ptr,
    prefix_k_ptr,  # (P, K, capacity, d)
    prefix_v_ptr,
    prefix_of_ptr,  # (R) int32
    lengths_ptr,  # (P) int32
    out_ptr,  # (R, L, H, d) contiguous
    q_batch,  # strides
    q_head,
    q_row,
    k_batch,
    k_head,
    k_row,
    v_batch,
    v_head,
    v_row,
    pk_batch,
    pk_head,
    pk_row,
    pv_batch,
    pv_head,
    pv_row,
    length,
    heads,
    group,  # query heads a key head serves
    scale,  # log2(e) / sqrt(d)
    D: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M  # the longest first
    row = (tl.program_id(1) // heads).to(tl.int64)
    head = tl.program_id(1) % heads
    prompt = tl.load(prefix_of_ptr + row).to(tl.int64)
    before = tl.load(lengths_ptr + prompt)
    q_ptr += row * q_batch + head * q_head + first.to(tl.int64) * q_row
    prefix_k_ptr += prompt * pk_batch + (head // group) * pk_head
    prefix_v_ptr += prompt * pv_batch + (head // group) * pv_head
    q0 = load_rows(q_ptr, q_row, length - first, BLOCK_M, 0, D0, D, True)
    q1 = q0
    if D1:
        q1 = load_rows(q_ptr, q_row, length - first, BLOCK_M, D0, D1, D, True)
    query = first + tl.arange(0, BLOCK_M)
    none = first * 0
    state = empty_state(BLOCK_M, D0, D1)
    whole, last = before // BLOCK_N * BLOCK_N, query * 0 + before - 1
    pk, pv = prefix_k_ptr, prefix_v_ptr
    state = attend(state, q0, q1, pk, pv, pk_row, pv_row, none, whole, last, scale, D, D0, D1, BLOCK_N, False)
    state = attend(state, q0, q1, pk, pv, pk_row, pv_row, whole, before, last, scale, D, D0, D1, BLOCK_N, True)
    k_ptr += row * k_batch + (head // group) * k_head
    v_ptr += row * v_batch + (head // group) * v_head
    whole = first // BLOCK_N * BLOCK_N
    state = attend(state, q0, q1, k_ptr, v_ptr, k_row, v_row, none, whole, query, scale, D, D0, D1, BLOCK_N, False)
    end = tl.minimum(first + BLOCK_M, length)
    state = attend(state, q0, q1, k_ptr, v_ptr, k_row, v_row, whole, end, query, scale, D, D0, D1, BLOCK_N, True)
    out_ptr += (row * length + first) * heads * D + head * D
    store_means(out_ptr, heads * D, length - first, state, BLOCK_M, D0, D1, D)


def _prefix_attention_triton(q, k, v, prefix_k, prefix_v, prefix_of, lengths):
    q, k, v, prefix_k, prefix_v = (unit_rows(x) for x in (q, k, v, prefix_k, prefix_v))
    rows, heads, length, width = q.shape
    out = torch.empty(rows, length, heads, width, dtype=q.dtype, device=q.device)
    d0, d1 = head_blocks(width)
    step = 2 * (d0 + d1) * q.element_size()  # bytes of a key and a value
    key = f"{dtype_class(q.dtype)} d{width}"
    tile = tuned("prefix_attention", key, tiles(q.dtype), q.device, lambda tile: tile["BLOCK_N"] * step)
    launch(
        _prefix_attention_kernel,
        (-(-length // tile["BLOCK_M"]), rows * heads),
        *(q, k, v, prefix_k, prefix_v, prefix_of, lengths, out),
        *(stride for x in (q, k, v, prefix_k, prefix_v) for stride in x.stride()[:3]),
        *(length, heads, heads // k.shape[1], LOG2_E / width**0.5),
        D=width,
        D0=d0,
        D1=d1,
        **tile,
    )
    return out.transpose(1, 2)


def prefix_attention_cost(q, k, v, prefix_k, prefix_v, prefix_of, lengths) -> Cost:
    """By shapes: each row's prefix counts as long as the capacity, each prompt is read once."""
    own = attention_cost(q, k, v, True)
    behind = 4 * q.numel() * prefix_k.shape[2]
    return Cost(own.flop + behind, own.nbytes + (prefix_k.numel() + prefix_v.numel()) * q.element_size())


operator = Operator(
    "prefix_attention(Tensor q, Tensor k, Tensor v, Tensor prefix_k, Tensor prefix_v, Tensor prefix_of, Tensor lengths)"
    " -> Tensor",
    torch=prefix_attention_torch,
    triton=_prefix_attention_triton,
    cost=prefix_attention_cost,
)


def prefix_attention(
    q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor, prefix_of: Tensor, lengths: Tensor
) -> Tensor:
    """q (R, H, L, d); k, v (R, K, L, d); prefix_k, prefix_v (P, K, capacity, d); prefix_of (R), lengths (P) int32.

    Returns (R, H, L, d), in memory (R, L, H, d).
    """
    return operator(q, k, v, prefix_k, prefix_v, prefix_of, lengths)


def random_behind_prompts(
    device: torch.device | str,
    shape: tuple[int, int, int, int, int],  # R, H, K, L, d
    capacity: int,
    lengths: list[int],
    prefix_of: list[int],
    dtype: torch.dtype = torch.bfloat16,
) -> tuple[Tensor, ...]:
    """Arguments of `prefix_attention`."""
    rows, heads, kv_heads, length, width = shape
    qkv = random_qkv(device, rows, heads, kv_heads, length, length, width, dtype)
    _, pk, pv = random_qkv(device, len(lengths), 1, kv_heads, 1, capacity, width, dtype, "apart")
    for prompt, end in enumerate(lengths):
        pk[prompt, :, end:] = pv[prompt, :, end:] = float("nan")  # which must not matter
    return *qkv, pk, pv, *(torch.tensor(x, dtype=torch.int32).to(device) for x in (prefix_of, lengths))


def prefix_attention_cases() -> list[Case]:
    def case(why: str, *how, marks: str = "interp aot gpu") -> Case:
        return Case(why, lambda device: random_behind_prompts(device, *how), marks)

    real = "aot gpu"
    return [
        case("LLM block at 1024 behind two prompts", (2, 12, 2, 4160, 128), 64, [60, 7], [0, 1], marks=real),
        case("edit at 1024, a picture in the prompt", (2, 12, 2, 4160, 128), 1152, [1130, 1090], [0, 1], marks=real),
        case("grouped, prompts of different lengths", (2, 4, 2, 67, 128), 40, [33, 5], [1, 0]),
        case("two blocks of columns", (1, 2, 2, 70, 80), 8, [8], [0]),
        case("one prompt is empty", (2, 2, 1, 9, 64), 3, [0, 3], [0, 1]),
        case("one query a row", (2, 4, 2, 1, 64), 70, [70, 64], [0, 1]),
        case("tiny head in float32", (3, 2, 1, 21, 32), 19, [19, 2], [0, 1, 1], torch.float32),
        case("no rows", (0, 2, 2, 5, 64), 3, [3], []),
    ]
