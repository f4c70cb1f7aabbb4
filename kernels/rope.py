"""Rotary position embedding, half-split pairing (i, i + d/2), as in Qwen2; and the split into heads around it.

    angle = position * inv_freq[i];  y_i = x_i cos - x_{i+d/2} sin;  y_{i+d/2} = x_{i+d/2} cos + x_i sin

`rope_split` is called by `layers/qwen2.py`, once a layer: it reads what the fused q/k/v projection wrote and puts
rotated queries, rotated keys and values where attention wants them, which may be a cache: the place in it can be read
on the device, so that a captured graph serves every token. The angle is float32; cosine and sine are rounded to the
model's dtype, as models were trained.
Letters: R rows, L tokens of this block, H query heads, K key/value heads, d head dim.
"""

import torch
from torch import Tensor

from ._device import cos_sin
from ._op import Case, Cost, Operator, launch, next_power_of_2, tl, triton


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (R, H, L, d); cos, sin (R, 1, L, d), both halves filled: x cos + rotate_half(x) sin."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def rotary_halves(positions: Tensor, inv_freq: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin (R, L, d/2) for positions (R, L) and inv_freq (d/2) float32."""
    angle = positions[..., None].to(inv_freq.dtype) * inv_freq
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rotary_tables(positions: Tensor, inv_freq: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The same with both halves filled, (R, 1, L, d)."""
    cos, sin = (torch.cat([x, x], dim=-1)[:, None] for x in rotary_halves(positions, inv_freq, dtype))
    return cos, sin


def split_heads(qkv: Tensor, heads: int, kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Views q (R, H, L, d) and k, v (R, K, L, d) of qkv (R, L, (H + 2K) d)."""
    x = qkv.unflatten(-1, (heads + 2 * kv_heads, -1)).transpose(1, 2)
    return x.split([heads, kv_heads, kv_heads], dim=1)


def rope_split_ref(qkv, positions, inv_freq, ends, q_out, k_out, v_out) -> None:
    """In the tensors' dtype. What the operator takes is said at `rope_split`."""
    cos, sin = rotary_tables(positions, inv_freq, qkv.dtype)
    q, k, v = split_heads(qkv, q_out.shape[1], k_out.shape[1])
    q_out.copy_(rope(q, cos, sin))
    for out, x in ((k_out, rope(k, cos, sin)), (v_out, v)):
        if ends is None:
            out.copy_(x)
        else:
            at = ends.long()[:, None] + torch.arange(-x.shape[2], 0, device=x.device)  # (R, L)
            out.scatter_(2, at[:, None, :, None].expand_as(x), x)


@triton.jit(do_not_specialize=["positions_stride", "length"])
def _rope_split_kernel(
    qkv_ptr,  # (R L, (H + 2K) d), rows qkv_stride apart
    positions_ptr,  # (R, L) int64
    inv_freq_ptr,  # (d/2) float32
    ends_ptr,  # (R) int32
    q_ptr,  # (R, H, L, d), each dimension but the last at its own stride; k and v alike
    k_ptr,
    v_ptr,
    qkv_stride,
    positions_stride,
    q_row,
    q_head,
    q_token,
    k_row,
    k_head,
    k_token,
    v_row,
    v_head,
    v_token,
    length,  # L
    H: tl.constexpr,
    K: tl.constexpr,
    HALF: tl.constexpr,
    HEADS: tl.constexpr,  # powers of two that hold H + 2K and HALF
    BLOCK: tl.constexpr,
    ENDS: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    row, token = token // length, token % length
    place = token
    if ENDS:
        place += tl.load(ends_ptr + row) - length
    head, i = tl.arange(0, HEADS).to(tl.int64)[:, None], tl.arange(0, BLOCK)[None, :]
    inside = (head < H + 2 * K) & (i < HALF)
    here = qkv_ptr + (row * length + token) * qkv_stride + head * (2 * HALF) + i
    position = tl.load(positions_ptr + row * positions_stride + token).to(tl.float32)
    angle = position * tl.load(inv_freq_ptr + i, mask=i < HALF, other=0.0)
    kind = q_ptr.dtype.element_ty
    cos, sin = cos_sin(angle)
    cos, sin = cos.to(kind).to(tl.float32), sin.to(kind).to(tl.float32)
    x1 = tl.load(here, mask=inside, other=0.0).to(tl.float32)
    x2 = tl.load(here + HALF, mask=inside, other=0.0).to(tl.float32)
    y1, y2 = (x1 * cos - x2 * sin).to(kind), (x2 * cos + x1 * sin).to(kind)
    of_q, of_v = inside & (head < H), inside & (head >= H + K)
    of_k = inside & (head >= H) & (head < H + K)
    q = q_ptr + row * q_row + head * q_head + token * q_token + i
    tl.store(q, y1, mask=of_q)
    tl.store(q + HALF, y2, mask=of_q)
    k = k_ptr + row * k_row + (head - H) * k_head + place * k_token + i
    tl.store(k, y1, mask=of_k)
    tl.store(k + HALF, y2, mask=of_k)
    v = v_ptr + row * v_row + (head - H - K) * v_head + place * v_token + i
    tl.store(v, x1.to(kind), mask=of_v)
    tl.store(v + HALF, x2.to(kind), mask=of_v)


def _rope_split_triton(qkv, positions, inv_freq, ends, q_out, k_out, v_out) -> None:
    rows, length = positions.shape
    flat, half = qkv.reshape(rows * length, qkv.shape[-1]), len(inv_freq)
    heads, kv_heads = q_out.shape[1], k_out.shape[1]
    values = next_power_of_2(heads + 2 * kv_heads) * next_power_of_2(half)
    launch(
        _rope_split_kernel,
        (rows * length,),
        flat,
        positions if positions.stride(1) == 1 else positions.contiguous(),
        inv_freq,
        inv_freq if ends is None else ends,
        q_out,
        k_out,
        v_out,
        flat.stride(0),
        positions.stride(0) if positions.stride(1) == 1 else length,
        *q_out.stride()[:3],
        *k_out.stride()[:3],
        *v_out.stride()[:3],
        length,
        H=heads,
        K=kv_heads,
        HALF=half,
        HEADS=next_power_of_2(heads + 2 * kv_heads),
        BLOCK=next_power_of_2(half),
        ENDS=ends is not None,
        num_warps=4 if values <= 2048 else 8,  # heuristic
    )


def rope_split_cost(qkv, positions, inv_freq, ends, q_out, k_out, v_out) -> Cost:
    return Cost(3 * qkv.numel(), 2 * qkv.numel() * qkv.element_size() + 8 * positions.numel())


_rope_split = Operator(
    "rope_split(Tensor qkv, Tensor positions, Tensor inv_freq, Tensor? ends,"
    " Tensor(a!) q, Tensor(b!) k, Tensor(c!) v) -> ()",
    torch=rope_split_ref,
    triton=_rope_split_triton,
    cost=rope_split_cost,
)


def rope_split(
    qkv: Tensor,
    positions: Tensor,
    inv_freq: Tensor,
    heads: int,
    kv_heads: int,
    into: tuple[Tensor, Tensor] | None = None,
    ends: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Rotated q (R, H, L, d), rotated k and v (R, K, L, d) of qkv (R, L, (H + 2K) d), its bias added.

    positions (R, L) int64, inv_freq (d/2) float32. With `into`, keys and values are written there, (R, K, L, d) with
    any strides but a last one of 1, and returned as these tensors. With `ends` (R) int32 as well, `into` may be longer:
    row r is written to the L places before ends[r], which is at least L.
    """
    rows, length, width = qkv.shape
    d = width // (heads + 2 * kv_heads)
    q = qkv.new_empty(rows, heads, length, d)
    k, v = into or (qkv.new_empty(rows, kv_heads, length, d) for _ in range(2))
    if k.stride(3) != 1 or v.stride(3) != 1:
        raise ValueError(f"keys and values need a last stride of 1, not {k.stride(3)} and {v.stride(3)}")
    _rope_split(qkv, positions, inv_freq, ends, q, k, v)
    return q, k, v


def rope_split_cases() -> list[Case]:
    def make(
        rows: int,
        length: int,
        heads: int,
        kv_heads: int,
        d: int,
        dtype=torch.bfloat16,
        room: int = 0,
        ends: bool = False,
    ):
        def arguments(device):
            noise = torch.Generator().manual_seed(length)
            qkv = torch.randn(rows, length, (heads + 2 * kv_heads) * d, generator=noise).to(device, dtype)
            start = torch.randint(3000, (rows, 1), generator=noise)
            positions = (start + torch.arange(length)).to(device)
            inv_freq = (1.0 / 1e6 ** (torch.arange(0, d, 2).float() / d)).to(dtype).float().to(device)
            q = torch.empty(rows, heads, length, d, dtype=dtype, device=device)
            kept = torch.empty(2, rows, kv_heads, length + room, d, dtype=dtype, device=device)
            if ends:  # somewhere in a cache
                places = length + torch.arange(rows, dtype=torch.int32).to(device) % (room + 1)
                return qkv, positions, inv_freq, places, q, *kept.zero_().unbind()
            return qkv, positions, inv_freq, None, q, *kept[..., room:, :].unbind()  # behind the prompt of a cache

        return arguments

    return [
        Case("LLM block at 1024, both guidance halves", make(2, 4160, 12, 2, 128), "aot gpu"),
        Case("a token of an answer about a 1024 picture", make(1, 1, 12, 2, 128, room=4607, ends=True), "aot gpu"),
        Case("one token, into a cache", make(1, 1, 12, 2, 128, room=50)),
        Case("one token of rows at places of their own", make(3, 1, 12, 2, 128, room=5, ends=True)),
        Case("two tokens of such rows in float32, odd width", make(3, 2, 3, 1, 12, torch.float32, room=2, ends=True)),
        Case("rows with positions of their own", make(2, 3, 12, 2, 128)),
        Case("odd head counts and width, float32, into a cache", make(2, 5, 3, 1, 12, torch.float32, room=4)),
        Case("no tokens", make(1, 0, 3, 1, 8)),
    ]
