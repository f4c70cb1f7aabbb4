"""Queries, keys and values as kernels/attention_int8.py reads them, in one launch.

    q (B, H, Lq, d)     to int8 and a scale a row, float32
    k (B, K, Lk, d)     the same, once one vector near the mean of a head's keys is taken off: softmax does not see what
                        all keys share, and the rest has finer steps (SageAttention, arXiv 2410.02367)
    v (B, K, Lk, d)     to float16

Any one vector is exact, so the mean of a sample of keys will do, and every program can find it for itself. An operator
of its own, because what it returns grows with the picture and has to be seen by whoever counts memory.
"""

import torch
from torch import Tensor

from ._attend import load_rows, store_rows
from ._device import row_scale, to_half, to_int8
from ._op import Case, Cost, Operator, launch, next_power_of_2, tl, triton, unit_rows
from .attention import random_qkv
from .quantise import quantise_rows

SAMPLE = 64  # keys, evenly spaced
LARGEST = 65504.0  # of float16


def centred(k: Tensor) -> Tensor:
    """k (B, K, Lk, d) without the mean of its sample; float32 or wider."""
    k = k if k.dtype == torch.float64 else k.float()
    if not k.shape[2]:
        return k
    which = torch.arange(SAMPLE, device=k.device) * k.shape[2] // SAMPLE
    return k - k[:, :, which].mean(2, keepdim=True)


def quantise_qkv_ref(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    """What the results stand for: q, k without the vector, v."""
    return q, centred(k), v


def to_float16(x: Tensor) -> Tensor:
    """float16; what is too large for it becomes its largest number."""
    return x.clamp(-LARGEST, LARGEST).half()


def quantise_qkv_torch(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    parts = *quantise_rows(q), *quantise_rows(centred(k)), to_float16(v)
    return tuple(x.contiguous() for x in parts)


@triton.jit
def _store_int8(
    x_ptr, stride, count, centre, whole_ptr, scale_ptr, D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr
):
    x = load_rows(x_ptr, stride, count, ROWS, 0, BLOCK_D, D, True).to(tl.float32) - centre
    scale = row_scale(tl.max(tl.abs(x), axis=1))
    store_rows(whole_ptr, D, count, to_int8(x, scale[:, None]), ROWS, 0, BLOCK_D, D)
    row = tl.arange(0, ROWS)
    tl.store(scale_ptr + row, scale, mask=row < count)


# As in kernels/attention.py: counts that change from round to round, of which one binary is to do.
@triton.jit(do_not_specialize=["lq", "lk"])
def _quantise_qkv_kernel(
    q_ptr,  # (B, H, Lq, d), last dimension contiguous, as of k and v
    k_ptr,  # (B, K, Lk, d)
    v_ptr,
    q8_ptr,  # contiguous, as the rest
    q_scale_ptr,
    k8_ptr,
    k_scale_ptr,
    half_ptr,
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
    kv_heads,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
    SAMPLE: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * ROWS
    slots = heads + 2 * kv_heads
    batch = (tl.program_id(1) // slots).to(tl.int64)
    slot = tl.program_id(1) % slots
    if slot < heads:
        if first < lq:
            x_ptr = q_ptr + batch * q_batch + slot * q_head + first * q_row
            at = (batch * heads + slot) * lq + first
            _store_int8(x_ptr, q_row, lq - first, 0.0, q8_ptr + at * D, q_scale_ptr + at, D, BLOCK_D, ROWS)
    elif first < lk:
        if slot < heads + kv_heads:
            head = slot - heads
            k_ptr += batch * k_batch + head * k_head
            which = tl.arange(0, SAMPLE).to(tl.int64) * lk // SAMPLE
            column = tl.arange(0, BLOCK_D)
            sample = tl.load(k_ptr + which[:, None] * k_row + column[None, :], mask=(column < D)[None, :], other=0.0)
            centre = (tl.sum(sample.to(tl.float32), axis=0) / SAMPLE)[None, :]
            at = (batch * kv_heads + head) * lk + first
            x_ptr = k_ptr + first * k_row
            _store_int8(x_ptr, k_row, lk - first, centre, k8_ptr + at * D, k_scale_ptr + at, D, BLOCK_D, ROWS)
        else:
            head = slot - heads - kv_heads
            v_ptr += batch * v_batch + head * v_head + first * v_row
            v = load_rows(v_ptr, v_row, lk - first, ROWS, 0, BLOCK_D, D, True).to(tl.float32)
            half_ptr += ((batch * kv_heads + head) * lk + first) * D
            store_rows(half_ptr, D, lk - first, to_half(v), ROWS, 0, BLOCK_D, D)


def _quantise_qkv_triton(q, k, v):
    q, k, v = unit_rows(q), unit_rows(k), unit_rows(v)
    (batch, heads, lq, width), (_, kv_heads, lk, _) = q.shape, k.shape
    q8, k8 = (torch.empty(x.shape, dtype=torch.int8, device=x.device) for x in (q, k))
    q_scale, k_scale = (torch.empty(x.shape[:3], dtype=torch.float32, device=x.device) for x in (q, k))
    halves = torch.empty(v.shape, dtype=torch.float16, device=v.device)
    rows = 64
    launch(
        _quantise_qkv_kernel,
        (-(-max(lq, lk) // rows), batch * (heads + 2 * kv_heads)),
        *(q, k, v, q8, q_scale, k8, k_scale, halves),
        *(stride for x in (q, k, v) for stride in x.stride()[:3]),
        *(lq, lk, heads, kv_heads),
        D=width,
        BLOCK_D=next_power_of_2(width),
        ROWS=rows,
        SAMPLE=SAMPLE,
        num_warps=8,  # heuristic
    )
    return q8, q_scale, k8, k_scale, halves


def quantise_qkv_cost(q: Tensor, k: Tensor, v: Tensor) -> Cost:
    read = sum(x.nbytes for x in (q, k, v))
    scales = 4 * sum(x.numel() // max(x.shape[-1], 1) for x in (q, k))
    return Cost(4 * (q.numel() + k.numel()) + v.numel(), read + q.numel() + k.numel() + 2 * v.numel() + scales)


operator = Operator(
    "quantise_qkv(Tensor q, Tensor k, Tensor v) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    torch=quantise_qkv_torch,
    triton=_quantise_qkv_triton,
    cost=quantise_qkv_cost,
)


def quantise_qkv(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    """(q8, q_scale, k8, k_scale, v as float16), contiguous; scales (B, heads, L) float32. Any float q, k, v."""
    return operator(q, k, v)


def quantise_qkv_cases() -> list[Case]:
    def case(why: str, *shape: int, marks: str = "interp aot gpu", shared: float = 0.0, **kind) -> Case:
        def make(device: torch.device | str) -> tuple[Tensor, ...]:
            q, k, v = random_qkv(device, *shape, **kind)
            return q, k + shared * k[:1, :1, :1] if shared else k, v

        return Case(why, make, marks)

    half, single = torch.float16, torch.float32
    return [
        case("MAR decoder at 1024, both guidance halves", 2, 16, 16, 4160, 4160, 80, marks="aot gpu"),
        case("its last block, predicted tokens only", 2, 16, 16, 256, 4160, 80, layout="apart", marks="aot gpu"),
        case("DiT at 1024", 2, 24, 24, 4250, 4250, 64, marks="aot gpu"),
        case("tails of rows and keys, keys with a large mean", 2, 1, 1, 70, 70, 80, shared=5.0),
        case("keys are whole blocks, halves", 1, 2, 2, 64, 96, 80, dtype=half, layout="apart"),
        case("one block of columns, a whole block of keys and a tail", 1, 2, 2, 65, 70, 64),
        case("grouped, two wide blocks of columns", 1, 4, 2, 33, 40, 128),
        case("one query", 1, 2, 2, 1, 37, 80),
        case("tiny head in float32, columns apart", 1, 2, 1, 9, 17, 12, dtype=single, layout="columns"),
        case("no queries", 1, 2, 2, 0, 5, 80),
        case("no pictures", 0, 2, 2, 5, 5, 80),
    ]
