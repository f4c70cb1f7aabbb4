"""Queries, keys and values of two streams made one sequence, queries and keys normalised: joint attention of an MMDiT.

    q, k, v of token t = split(image_t) if t < N else split(text_(t - N))
    q = q / sqrt(mean q^2 + eps) * weight, a head at a time, k alike; each stream has weights of its own; v as it is

    image (B, N, 3 H d), text (B, M, 3 H d) or None    [q | k | v] of one fused projection a stream
    weights (d)                                        of image queries and keys, of text queries and keys

The result (B, N + M, 3, H, d) is what kernels/attention.py and quantise_qkv.py read as views. One launch stands for
four norms and three concatenations. Statistics are float32. One program a token, read once. For the DiT.
"""

import torch
from torch import Tensor

from ._op import Case, Cost, Operator, launch, next_power_of_2, tl, triton, unit_rows
from .norms import norm_ref, norm_torch


def _joined(norm, image, text, q_weight, k_weight, text_q_weight, text_k_weight, heads, eps) -> Tensor:
    streams = [(image, q_weight, k_weight)] + ([] if text is None else [(text, text_q_weight, text_k_weight)])
    parts = []
    for x, *weights in streams:
        *qk, v = x.unflatten(-1, (3, heads, -1)).unbind(2)  # (B, N or M, H, d)
        normed = [norm(y, weight, None, None, None, eps, True) for y, weight in zip(qk, weights, strict=True)]
        parts.append(torch.stack([*normed, v.to(normed[0].dtype)], 2))
    return torch.cat(parts, 1)


def joint_qkv_ref(*arguments) -> Tensor:
    """In float32 or wider. Arguments as of the operator."""
    return _joined(norm_ref, *arguments)


def joint_qkv_torch(*arguments) -> Tensor:
    return _joined(norm_torch, *arguments)


@triton.jit
def _joint_qkv_kernel(
    image_ptr,  # (B, N, 3 H d), last dimension contiguous
    text_ptr,  # (B, M, 3 H d)
    q_weight_ptr,  # (d), as the next three
    k_weight_ptr,
    text_q_weight_ptr,
    text_k_weight_ptr,
    out_ptr,  # (B, N + M, 3, H, d) contiguous
    image_batch,  # strides
    image_row,
    text_batch,
    text_row,
    n,
    eps,
    H: tl.constexpr,
    D: tl.constexpr,
    BLOCK_H: tl.constexpr,  # at least 3 H
    BLOCK_D: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    batch = tl.program_id(1).to(tl.int64)
    if token < n:
        x_ptr = image_ptr + batch * image_batch + token * image_row
    else:
        x_ptr = text_ptr + batch * text_batch + (token - n) * text_row
        q_weight_ptr = text_q_weight_ptr
        k_weight_ptr = text_k_weight_ptr
    head = tl.arange(0, BLOCK_H)[:, None]
    column = tl.arange(0, BLOCK_D)[None, :]
    inside = (head < 3 * H) & (column < D)
    x = tl.load(x_ptr + head * D + column, mask=inside, other=0.0)
    wide = x.to(tl.float32)
    y = wide * tl.rsqrt(tl.sum(wide * wide, axis=1) / D + eps)[:, None]
    y = y.to(out_ptr.dtype.element_ty).to(tl.float32)  # rounded here, as in kernels/norms.py
    q_weight = tl.load(q_weight_ptr + column, mask=column < D, other=0.0).to(tl.float32)
    k_weight = tl.load(k_weight_ptr + column, mask=column < D, other=0.0).to(tl.float32)
    y = tl.where(head < 2 * H, y * tl.where(head < H, q_weight, k_weight), wide)
    out_ptr += (batch * tl.num_programs(0) + token) * 3 * H * D
    tl.store(out_ptr + head * D + column, y.to(out_ptr.dtype.element_ty), mask=inside)


def _joint_qkv_triton(image, text, q_weight, k_weight, text_q_weight, text_k_weight, heads, eps):
    image = unit_rows(image)
    if text is None:
        text, text_q_weight, text_k_weight = image[:, :0], q_weight, k_weight
    text = unit_rows(text)
    (batch, n, columns), m = image.shape, text.shape[1]
    width = columns // (3 * heads)
    out = torch.empty(batch, n + m, 3, heads, width, dtype=image.dtype, device=image.device)
    launch(
        _joint_qkv_kernel,
        (n + m, batch),
        *(image, text, q_weight, k_weight, text_q_weight, text_k_weight, out),
        *(*image.stride()[:2], *text.stride()[:2], n, eps),
        H=heads,
        D=width,
        BLOCK_H=next_power_of_2(3 * heads),
        BLOCK_D=next_power_of_2(width),
        num_warps=8 if heads * width > 512 else 4,  # heuristic
    )
    return out


def joint_qkv_cost(image, text, q_weight, k_weight, text_q_weight, text_k_weight, heads, eps) -> Cost:
    numbers = image.numel() + (0 if text is None else text.numel())
    return Cost(4 * numbers * 2 // 3, 2 * numbers * image.element_size())


operator = Operator(
    "joint_qkv(Tensor image, Tensor? text, Tensor q_weight, Tensor k_weight, Tensor? text_q_weight,"
    " Tensor? text_k_weight, int heads, float eps) -> Tensor",
    torch=joint_qkv_torch,
    triton=_joint_qkv_triton,
    cost=joint_qkv_cost,
)


def joint_qkv(
    image: Tensor,
    text: Tensor | None,
    image_weights: tuple[Tensor, Tensor],
    text_weights: tuple[Tensor, Tensor] | None,
    heads: int,
    eps: float,
) -> tuple[Tensor, ...]:
    """q, k, v (B, H, N + M, d) of image (B, N, 3 H d) and text (B, M, 3 H d), or of image alone.

    Weights (d): of queries, of keys.
    """
    joint = operator(image, text, *image_weights, *(text_weights or (None, None)), heads, eps)
    return tuple(x.transpose(1, 2) for x in joint.unbind(2))


def joint_qkv_cases() -> list[Case]:
    def case(
        why: str,
        batch: int,
        n: int,
        m: int | None,
        heads: int,
        width: int,
        marks: str = "interp aot gpu",
        dtype: torch.dtype = torch.bfloat16,
        spread: int = 1,
    ) -> Case:
        def make(device: torch.device | str):
            noise = torch.Generator().manual_seed(0)

            def random(*shape: int) -> Tensor:
                return torch.randn(*shape, generator=noise).to(device, dtype)

            image = random(batch, n, spread * 3 * heads * width)[..., : 3 * heads * width]
            text = None if m is None else random(batch, m, 3 * heads * width)
            weights = [random(width) for _ in range(4)] if m is not None else [random(width), random(width), None, None]
            return image, text, *weights, heads, 1e-6

        return Case(why, make, marks)

    single = torch.float32
    return [
        case("DiT at 1024", 2, 4096, 154, 24, 64, "aot gpu"),
        case("the image alone, second attention of a block", 2, 4096, None, 24, 64, "aot gpu"),
        case("both streams", 2, 3, 2, 24, 64),
        case("the image alone, rows apart", 2, 3, None, 2, 64, spread=2),
        case("heads and columns that are no powers of two", 1, 2, 1, 3, 12, dtype=single),
        case("no text tokens", 1, 2, 0, 2, 16),
        case("no pictures", 0, 2, 1, 2, 16),
    ]
