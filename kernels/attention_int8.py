"""Bidirectional attention with its scores in whole numbers: softmax(q8 k8^T * scales / sqrt(d)) v.

    attention_int8        as floats
    attention_int8_heads  as whole numbers with a scale for each head of a row, for kernels/int8_of_groups.py

    q8, k8   int8, one scale a row, from kernels/quantise_qkv.py; the head dim is covered by blocks of at least 32,
             80 = 64 + 32, the least that int8 products take
    v        float16, and so are sums over one block of keys; the sum over blocks is float32

GeForce cards sum halves in half at twice the rate of float32. A weight is at most 1 / BLOCK_N there, so that no sum
over a block exceeds its largest value. For MAR and DiT in 8 bits: within 2e-2 of float64, relative.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ._attend import LOG2_E, attend_int8, empty_state, head_blocks, load_rows, store_means, store_whole_means
from ._op import Case, Cost, Operator, launch, tl, triton
from ._tuned import tuned
from .attention import attention_cost, attention_ref, attention_torch
from .quantise import quantise_rows
from .quantise_qkv import quantise_qkv, quantise_qkv_cases, quantise_qkv_torch


def attention_int8_ref(
    q: Tensor, q_scale: Tensor, k: Tensor, k_scale: Tensor, v: Tensor, dtype: torch.dtype = torch.float64
) -> Tensor:
    """On the dequantised operands in float64."""
    return attention_ref(q.double() * q_scale[..., None], k.double() * k_scale[..., None], v.double())


def attention_int8_torch(
    q: Tensor, q_scale: Tensor, k: Tensor, k_scale: Tensor, v: Tensor, dtype: torch.dtype
) -> Tensor:
    """On the dequantised operands in `dtype`."""
    q, k = (q * q_scale[..., None]).to(dtype), (k * k_scale[..., None]).to(dtype)
    return attention_torch(q, k, v.to(dtype), False)


def attention_int8_heads_ref(q: Tensor, q_scale: Tensor, k: Tensor, k_scale: Tensor, v: Tensor) -> Tensor:
    """What the results stand for, (B, Lq, H, d)."""
    return attention_int8_ref(q, q_scale, k, k_scale, v).transpose(1, 2)


def attention_int8_heads_torch(
    q: Tensor, q_scale: Tensor, k: Tensor, k_scale: Tensor, v: Tensor
) -> tuple[Tensor, Tensor]:
    y = attention_int8_torch(q, q_scale, k, k_scale, v, torch.float32).transpose(1, 2)
    return tuple(part.contiguous() for part in quantise_rows(y))


@triton.jit(do_not_specialize=["lq", "lk", "heads", "group"])
def _attention_int8_kernel(
    q_ptr,  # (B, H, Lq, d) int8 contiguous
    q_scale_ptr,  # (B, H, Lq)
    k_ptr,  # (B, K, Lk, d) int8 contiguous
    k_scale_ptr,  # (B, K, Lk)
    v_ptr,  # (B, K, Lk, d) float16 contiguous
    out_ptr,  # (B, Lq, H, d) contiguous
    out_scale_ptr,  # (B, Lq, H), with WHOLE
    lq,
    lk,
    heads,
    group,  # query heads a key head serves
    scale,  # log2(e) / sqrt(d)
    D: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    V0: tl.constexpr,
    V1: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SHIFT: tl.constexpr,
    WHOLE: tl.constexpr,
):
    first = tl.program_id(0) * BLOCK_M
    batch = (tl.program_id(1) // heads).to(tl.int64)
    head = tl.program_id(1) % heads
    at = tl.program_id(1).to(tl.int64) * lq + first
    left = lq - first
    q0 = load_rows(q_ptr + at * D, D, left, BLOCK_M, 0, D0, D, True)
    q1 = q0
    if D1:
        q1 = load_rows(q_ptr + at * D, D, left, BLOCK_M, D0, D1, D, True)
    row = tl.arange(0, BLOCK_M)
    q_scale = tl.load(q_scale_ptr + at + row, mask=row < left, other=1.0) * scale
    keys = (tl.program_id(1) // group).to(tl.int64) * lk  # heads of all pictures follow one another
    k_ptr += keys * D
    k_scale_ptr += keys
    v_ptr += keys * D
    whole, last = lk // BLOCK_N * BLOCK_N, row * 0 + lk - 1
    state = empty_state(BLOCK_M, V0, V1)
    state = attend_int8(
        state, q0, q1, q_scale, k_ptr, k_scale_ptr, v_ptr, whole * 0, whole, last, D, D0, D1, V0, V1, BLOCK_N, SHIFT,
        False,
    )  # fmt: skip
    state = attend_int8(
        state, q0, q1, q_scale, k_ptr, k_scale_ptr, v_ptr, whole, lk, last, D, D0, D1, V0, V1, BLOCK_N, SHIFT, True
    )
    to = (batch * lq + first) * heads + head
    if WHOLE:
        store_whole_means(
            out_ptr + to * D, out_scale_ptr + to, heads * D, heads, left, state, BLOCK_M, V0, V1, D
        )  # fmt: skip
    else:
        store_means(out_ptr + to * D, heads * D, left, state, BLOCK_M, V0, V1, D)


def _attention_int8_triton(q, q_scale, k, k_scale, v, dtype):
    return _launch(q, q_scale, k, k_scale, v, dtype)[0].transpose(1, 2)


def _attention_int8_heads_triton(q, q_scale, k, k_scale, v):
    return _launch(q, q_scale, k, k_scale, v, torch.int8)


def _launch(q, q_scale, k, k_scale, v, dtype) -> tuple[Tensor, Tensor]:
    """(B, Lq, H, d) in `dtype`, and of int8 the scales."""
    q, q_scale, k, k_scale, v = (x.contiguous() for x in (q, q_scale, k, k_scale, v))  # as the quantiser leaves them
    (batch, heads, lq, width), lk = q.shape, k.shape[2]
    out, whole = torch.empty(batch, lq, heads, width, dtype=dtype, device=q.device), dtype == torch.int8
    out_scale = torch.empty(out.shape[:3], dtype=torch.float32, device=q.device) if whole else q_scale
    (d0, d1), (v0, v1) = head_blocks(width, 32), head_blocks(width)
    heuristic = {"BLOCK_M": 64, "BLOCK_N": 64 if width <= 64 else 32, "num_warps": 4, "num_stages": 3}
    row = d0 + d1 + 2 * (v0 + v1)  # bytes of a key and a value
    tile = tuned("attention_int8", f"d{width}", heuristic, q.device, lambda tile: tile["BLOCK_N"] * row)
    launch(
        _attention_int8_kernel,
        (-(-lq // tile["BLOCK_M"]), batch * heads),
        *(q, q_scale, k, k_scale, v, out, out_scale),
        *(lq, lk, heads, heads // k.shape[1], LOG2_E / width**0.5),
        D=width,
        D0=d0,
        D1=d1,
        V0=v0,
        V1=v1,
        SHIFT=tile["BLOCK_N"].bit_length() - 1,
        WHOLE=whole,
        **tile,
    )
    return out, out_scale


def attention_int8_cost(q: Tensor, q_scale: Tensor, k: Tensor, k_scale: Tensor, v: Tensor, dtype: torch.dtype) -> Cost:
    read = sum(x.nbytes for x in (q, q_scale, k, k_scale, v))
    return Cost(attention_cost(q, k, v, False).flop, read + q.numel() * dtype.itemsize)


def attention_int8_heads_cost(q: Tensor, q_scale: Tensor, k: Tensor, k_scale: Tensor, v: Tensor) -> Cost:
    base = attention_int8_cost(q, q_scale, k, k_scale, v, torch.int8)
    return replace(base, nbytes=base.nbytes + 4 * q_scale.numel())


operator = Operator(
    "attention_int8(Tensor q, Tensor q_scale, Tensor k, Tensor k_scale, Tensor v, ScalarType dtype) -> Tensor",
    torch=attention_int8_torch,
    triton=_attention_int8_triton,
    cost=attention_int8_cost,
)

_attention_int8_heads = Operator(
    "attention_int8_heads(Tensor q, Tensor q_scale, Tensor k, Tensor k_scale, Tensor v) -> (Tensor, Tensor)",
    torch=attention_int8_heads_torch,
    triton=_attention_int8_heads_triton,
    cost=attention_int8_heads_cost,
)


def attention_int8_heads(q: Tensor, q_scale: Tensor, k: Tensor, k_scale: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """int8 (B, Lq, H, d) and scales (B, Lq, H) float32, of what `quantise_qkv` or `int8_linear_to_heads` leaves."""
    return _attention_int8_heads(q, q_scale, k, k_scale, v)


def attention_int8(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q (B, H, Lq, d); k, v (B, K, Lk, d), float; returns (B, H, Lq, d) in q's dtype."""
    return operator(*quantise_qkv(q, k, v), q.dtype)


def attention_int8_cases() -> list[Case]:
    """Those of the quantiser, quantised."""

    def quantised(case: Case) -> Case:
        def make(device: torch.device | str) -> tuple[Any, ...]:
            q, k, v = case.make(device)
            return *quantise_qkv_torch(q, k, v), q.dtype

        return replace(case, make=make)

    return [quantised(case) for case in quantise_qkv_cases()]


def attention_int8_heads_cases() -> list[Case]:
    """The same, but for the type of the result."""

    def without(case: Case) -> Case:
        return replace(case, make=lambda device: case.make(device)[:-1])

    return [without(case) for case in attention_int8_cases()]
