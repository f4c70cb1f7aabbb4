"""Softmax attention: softmax(q k^T / sqrt(d)) v, bidirectional (MAR, VAE, DiT) or causal (LLM).

With more keys than queries the causal mask is aligned to the last key: query i sees keys 0 .. Lk - Lq + i.
Grouped queries: query head h reads key head h // (heads / kv_heads).

On CUDA `attention` takes the library's kernels (`sdpa`) or ours (`flash_attention`), by shape. Ours reads views of a
fused projection where they lie, covers a head dim of 80 with blocks of 64 and 16, and what it returns lies in memory as
(B, Lq, H, d), so that `transpose(1, 2).flatten(2)` is free. One program: one head, one block of queries, all keys.
"""

from dataclasses import replace
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

from ._attend import LOG2_E, attend, empty_state, head_blocks, load_rows, store_means
from ._op import Case, Cost, Operator, launch, tl, triton, unit_rows
from ._tuned import Options, dtype_class, tuned

_MAX_WIDTH = 128  # of a head; the VAE's single one of 512 is left to the library


def attention_ref(q: Tensor, k: Tensor, v: Tensor, causal: bool = False) -> Tensor:
    """q (B, H, Lq, d); k, v (B, K, Lk, d); all in float32 or wider, scores of a head at a time materialised."""
    group = q.shape[1] // k.shape[1]
    q, k, v = (x if x.dtype == torch.float64 else x.float() for x in (q, k, v))
    y = q.new_empty(*q.shape[:3], v.shape[3])
    for row, head in product(range(len(q)), range(q.shape[1])):
        y[row, head] = _of_a_head(q[row, head], k[row, head // group], v[row, head // group], causal)
    return y


def _of_a_head(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    scores = q @ k.T / q.shape[-1] ** 0.5  # (Lq, Lk)
    if causal:
        seen = torch.ones_like(scores, dtype=torch.bool).tril(len(k) - len(q))
        scores = scores.masked_fill(~seen, float("-inf"))
    return scores.softmax(-1) @ v


def attention_torch(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """By torch's own kernels, in the dtype of q."""
    grouped = q.shape[1] != k.shape[1]
    if causal and q.shape[2] > 1:
        mask = None if q.shape[2] == k.shape[2] else to_the_last_key(q.shape[2], k.shape[2], q.device)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=grouped)
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=grouped)


def to_the_last_key(lq: int, lk: int, device: torch.device) -> Tensor:
    """A causal mask (lq, lk); CUDA's kernels know it and read none."""
    if device.type != "cuda":
        return torch.ones(lq, lk, dtype=torch.bool, device=device).tril(lk - lq)
    from torch.nn.attention.bias import causal_lower_right  # which brings torch's compiler along: seconds

    return causal_lower_right(lq, lk)


# Counts only end loops and masks: one binary serves them all, since that they are multiples of 16 speeds nothing up.
@triton.jit(do_not_specialize=["lq", "lk", "heads", "group"])
def _attention_kernel(
    q_ptr,  # (B, H, Lq, d), last dimension contiguous, as of k and v
    k_ptr,  # (B, K, Lk, d)
    v_ptr,
    out_ptr,  # (B, Lq, H, d) contiguous
    q_batch,  # strides
    q_head,
    q_row,
    k_batch,
    k_head,
    k_row,
    v_batch,
    v_head,
    v_row,
    lq,
    lk,
    heads,
    group,  # query heads a key head serves
    scale,  # log2(e) / sqrt(d)
    D: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr,
):
    block = tl.program_id(0)
    if CAUSAL:
        block = tl.num_programs(0) - 1 - block  # the longest first
    batch = (tl.program_id(1) // heads).to(tl.int64)
    head = tl.program_id(1) % heads
    first = block * BLOCK_M
    q_ptr += batch * q_batch + head * q_head + first.to(tl.int64) * q_row
    k_ptr += batch * k_batch + (head // group) * k_head
    v_ptr += batch * v_batch + (head // group) * v_head
    q0 = load_rows(q_ptr, q_row, lq - first, BLOCK_M, 0, D0, D, True)
    q1 = q0
    if D1:
        q1 = load_rows(q_ptr, q_row, lq - first, BLOCK_M, D0, D1, D, True)
    query = first + tl.arange(0, BLOCK_M)
    if CAUSAL:
        last = tl.minimum(lk - lq + query, lk - 1)
        end = tl.minimum(lk - lq + first + BLOCK_M, lk)
        whole = (lk - lq + first + 1) // BLOCK_N * BLOCK_N
    else:
        last = query * 0 + lk - 1
        end = lk
        whole = lk // BLOCK_N * BLOCK_N
    state = empty_state(BLOCK_M, D0, D1)
    state = attend(state, q0, q1, k_ptr, v_ptr, k_row, v_row, whole * 0, whole, last, scale, D, D0, D1, BLOCK_N, False)
    state = attend(state, q0, q1, k_ptr, v_ptr, k_row, v_row, whole, end, last, scale, D, D0, D1, BLOCK_N, True)
    out_ptr += (batch * lq + first) * heads * D + head * D
    store_means(out_ptr, heads * D, lq - first, state, BLOCK_M, D0, D1, D)


def tiles(dtype: torch.dtype) -> Options:
    """Heuristic, from registers and shared memory alone: two or three programs fit each multiprocessor of sm_89."""
    if dtype == torch.float32:
        return {"BLOCK_M": 16, "BLOCK_N": 32, "num_warps": 4, "num_stages": 2}
    return {"BLOCK_M": 64, "BLOCK_N": 32, "num_warps": 4, "num_stages": 3}


def _flash_triton(q, k, v, causal):
    q, k, v = unit_rows(q), unit_rows(k), unit_rows(v)
    (batch, heads, lq, width), lk = q.shape, k.shape[2]
    out = torch.empty(batch, lq, heads, width, dtype=q.dtype, device=q.device)
    d0, d1 = head_blocks(width)
    causal = causal and lq > 1
    row = 2 * (d0 + d1) * q.element_size()  # bytes of a key and a value
    key = f"{dtype_class(q.dtype)} d{width}{' causal' * causal}"
    tile = tuned("attention", key, tiles(q.dtype), q.device, lambda tile: tile["BLOCK_N"] * row)
    launch(
        _attention_kernel,
        (-(-lq // tile["BLOCK_M"]), batch * heads),
        *(q, k, v, out),
        *(stride for x in (q, k, v) for stride in x.stride()[:3]),
        *(lq, lk, heads, heads // k.shape[1], LOG2_E / width**0.5),
        D=width,
        D0=d0,
        D1=d1,
        CAUSAL=causal,
        **tile,
    )
    return out.transpose(1, 2)


def _sdpa_triton(q, k, v, causal):
    if q.is_meta:
        return q.new_empty(q.shape[0], q.shape[2], q.shape[1], q.shape[3]).transpose(1, 2)
    return attention_torch(q, k, v, causal)


def attention_cost(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Cost:
    (batch, heads, lq, width), lk = q.shape, k.shape[2]
    pairs = lq * (lk - lq) + lq * (lq + 1) // 2 if causal else lq * lk
    return Cost(4 * batch * heads * pairs * width, (2 * q.numel() + k.numel() + v.numel()) * q.element_size())


def _sdpa_cost(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Cost:
    return replace(attention_cost(q, k, v, causal), launches=1)


_ARGUMENTS = "(Tensor q, Tensor k, Tensor v, bool causal) -> Tensor"
flash_attention = Operator(f"attention{_ARGUMENTS}", torch=attention_torch, triton=_flash_triton, cost=attention_cost)
sdpa = Operator(f"attention_sdpa{_ARGUMENTS}", torch=attention_torch, triton=_sdpa_triton, cost=_sdpa_cost)


def prefers_triton(q: Tensor, k: Tensor) -> bool:
    """Heuristic: ours where the library, which pads head dims to multiples of 32, would compute more columns.

    Few queries on many keys are the library's, since it splits the keys over programs and ours does not.
    """
    width = q.shape[-1]
    if q.dtype == torch.float32 or width % 16 or width > _MAX_WIDTH or q.shape[2] * 64 < k.shape[2]:
        return False
    return sum(head_blocks(width)) < -(-width // 32) * 32


def attention(q: Tensor, k: Tensor, v: Tensor, causal: bool = False) -> Tensor:
    """q (B, H, Lq, d); k, v (B, K, Lk, d), one dtype; returns (B, H, Lq, d)."""
    return (flash_attention if prefers_triton(q, k) else sdpa)(q, k, v, causal)


def random_qkv(
    device: torch.device | str,
    batch: int,
    heads: int,
    kv_heads: int,
    lq: int,
    lk: int,
    width: int,
    dtype: torch.dtype = torch.bfloat16,
    layout: str = "fused",
) -> tuple[Tensor, ...]:
    """q, k, v as views: `fused` of one projection, `apart` of three, `columns` with the last dimension strided."""
    noise = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=noise).to(device, dtype)

    counts, lengths = (heads, kv_heads, kv_heads), (lq, lk, lk)
    if layout == "fused":
        parts = random(batch, lk, sum(counts), width).transpose(1, 2).split(counts, 1)
        return tuple(part[:, :, lk - length :] for part, length in zip(parts, lengths, strict=True))
    if layout == "columns":
        return tuple(random(batch, n, width, length).mT for n, length in zip(counts, lengths, strict=True))
    return tuple(random(batch, length, n, width).transpose(1, 2) for n, length in zip(counts, lengths, strict=True))


def attention_cases() -> list[Case]:
    half, single = torch.float16, torch.float32

    def case(
        why: str, *shape: int, marks: str = "interp aot gpu", causal: bool = False, whom: str = "attention", **kind
    ):
        return Case(why, lambda device: (*random_qkv(device, *shape, **kind), causal), marks, whom)

    return [
        case("MAR decoder at 1024, both guidance halves", 2, 16, 16, 4160, 4160, 80, marks="aot gpu"),
        case("its last block, predicted tokens only", 2, 16, 16, 256, 4160, 80, layout="apart", marks="aot gpu"),
        case("DiT at 1024", 2, 24, 24, 4250, 4250, 64, marks="aot gpu"),
        case("LLM block, grouped queries", 1, 12, 2, 4160, 4160, 128, causal=True, marks="aot gpu"),
        case("VAE at 1024", 1, 1, 1, 4096, 4096, 512, layout="columns", marks="aot gpu", whom="attention_sdpa"),
        case("two blocks of columns, tails of rows and keys", 2, 2, 2, 70, 70, 80),
        case("keys are whole blocks, halves", 1, 2, 2, 64, 96, 80, dtype=half, layout="apart"),
        case("causal behind earlier keys, grouped", 1, 4, 2, 67, 101, 128, causal=True),
        case("causal from the first key", 1, 1, 1, 66, 66, 64, causal=True),
        case("one query sees all", 1, 4, 2, 1, 37, 64, causal=True),
        case("tiny head in float32", 2, 2, 1, 19, 33, 12, dtype=single),
        case("columns apart, float32", 1, 2, 2, 5, 40, 80, dtype=single, layout="columns"),
        case("no queries", 1, 2, 2, 0, 5, 80, whom="attention attention_sdpa"),
        case("no pictures", 0, 2, 2, 5, 5, 80),
    ]
