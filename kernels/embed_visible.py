"""Encoder input of masked autoregressive decoding: LayerNorm([first | W tokens[visible] + b] + position).

One launch gathers the visible tokens, projects their few channels to the model's width, adds positions and
normalises; the buffer's rows in front come from `first`. Called by engine/models/unipic/mar.py.
Letters: B sequences, n tokens of C channels, V of them visible, D width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ._op import Case, Cost, Operator, cdiv, launch, next_power_of_2, tl, triton
from .linear import linear


def embed_visible_ref(tokens, visible, weight, bias, norm_weight, norm_bias, eps, first, position) -> Tensor:
    """In the tensors' dtype: (B, buffer + V, D). What the operator takes is said at `embed_visible`."""
    batch, n, _ = tokens.shape
    buffer = position.shape[0] - n
    known = tokens.gather(1, visible[..., None].expand(-1, -1, tokens.shape[-1]))
    x = linear(known, weight, bias) + position[buffer:][visible]  # (B, V, D)
    head = (first + position[:buffer]).expand(batch, -1, -1)  # (B, buffer, D)
    return F.layer_norm(torch.cat([head, x], dim=1), position.shape[1:], norm_weight, norm_bias, eps)


@triton.jit
def _embedded(x, at, is_token, rows, weight_ptr, bias_ptr, first_ptr, position_ptr, col, C, D, channel):
    """Columns `col` of [first | project(x)] + position: (ROWS, columns) float32."""
    there = col < D
    w_at = col[None, :] * C + channel[:, None]
    w = tl.load(weight_ptr + w_at, mask=there[None, :] & (channel[:, None] < C), other=0.0)
    bias = tl.load(bias_ptr + col, mask=there, other=0.0).to(tl.float32)
    first = tl.load(first_ptr + col, mask=there, other=0.0).to(tl.float32)
    y = tl.dot(x, w, input_precision="ieee") + tl.where(is_token[:, None], bias[None, :], first[None, :])
    inside = rows[:, None] & there[None, :]
    return y + tl.load(position_ptr + at[:, None] * D + col[None, :], mask=inside, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["n", "seen", "buffer"])
def _embed_visible_kernel(
    tokens_ptr,  # (B, n, C) contiguous
    visible_ptr,  # (B, V) contiguous
    weight_ptr,  # (D, C)
    bias_ptr,  # (D); norm_weight, norm_bias alike
    norm_weight_ptr,
    norm_bias_ptr,
    first_ptr,  # (1, D)
    position_ptr,  # (buffer + n, D) contiguous
    y_ptr,  # (B, buffer + V, D)
    n,
    seen,  # V
    buffer,
    eps,
    C: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,  # columns at a time
    BLOCK_C: tl.constexpr,
):
    batch = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside, is_token = row < buffer + seen, (row >= buffer) & (row < buffer + seen)
    token = tl.load(visible_ptr + batch * seen + row - buffer, mask=is_token, other=0)
    at = tl.where(is_token, buffer + token, row)
    channel = tl.arange(0, BLOCK_C)
    known = is_token[:, None] & (channel[None, :] < C)
    x = tl.load(tokens_ptr + (batch * n + token)[:, None] * C + channel[None, :], mask=known, other=0.0)
    # The product is computed twice: its few multiply-adds are cheaper than keeping a row of D values.
    mean, spread = tl.zeros([ROWS], tl.float32), tl.zeros([ROWS], tl.float32)
    for start in range(0, D, BLOCK):
        col = start + tl.arange(0, BLOCK)
        y = _embedded(x, at, is_token, inside, weight_ptr, bias_ptr, first_ptr, position_ptr, col, C, D, channel)
        here = tl.minimum(D - start, BLOCK).to(tl.float32)
        middle = tl.sum(y, axis=1) / here
        off = tl.where((col < D)[None, :], y - middle[:, None], 0.0)
        shift = middle - mean  # joins two sets' moments (Chan et al. 1983)
        spread += tl.sum(off * off, axis=1) + shift * shift * (here * start / (start + here))
        mean += shift * (here / (start + here))
    scale = tl.rsqrt(spread / D + eps)
    for start in range(0, D, BLOCK):
        col = start + tl.arange(0, BLOCK)
        y = _embedded(x, at, is_token, inside, weight_ptr, bias_ptr, first_ptr, position_ptr, col, C, D, channel)
        weight = tl.load(norm_weight_ptr + col, mask=col < D, other=0.0).to(tl.float32)
        bias = tl.load(norm_bias_ptr + col, mask=col < D, other=0.0).to(tl.float32)
        y = (y - mean[:, None]) * scale[:, None] * weight[None, :] + bias[None, :]
        to = y_ptr + (batch * (buffer + seen) + row)[:, None] * D + col[None, :]
        tl.store(to, y.to(y_ptr.dtype.element_ty), mask=inside[:, None] & (col < D)[None, :])


def _embed_visible_triton(tokens, visible, weight, bias, norm_weight, norm_bias, eps, first, position):
    (batch, n, channels), (total, width) = tokens.shape, position.shape
    buffer, seen, rows = total - n, visible.shape[1], 16  # the least a dot takes
    y = tokens.new_empty(batch, buffer + seen, width)
    launch(
        _embed_visible_kernel,
        (cdiv(buffer + seen, rows), batch),
        tokens.contiguous(),
        visible.contiguous(),
        weight,
        bias,
        norm_weight,
        norm_bias,
        first,
        position.contiguous(),
        y,
        n,
        seen,
        buffer,
        eps,
        C=channels,
        D=width,
        ROWS=rows,
        BLOCK=min(128, max(16, next_power_of_2(width))),  # heuristic
        BLOCK_C=max(16, next_power_of_2(channels)),
        num_warps=4,
    )
    return y


def embed_visible_cost(tokens, visible, weight, bias, norm_weight, norm_bias, eps, first, position) -> Cost:
    (batch, n, channels), width = tokens.shape, position.shape[1]
    rows = batch * (len(position) - n + visible.shape[1])
    read = visible.numel() * (8 + channels * tokens.element_size())
    parameters = sum(t.numel() for t in (weight, bias, norm_weight, norm_bias, first))
    moved = (2 * rows * width + parameters) * tokens.element_size()  # a position in, a row out
    return Cost((2 * channels + 8) * rows * width, read + moved)


_embed_visible = Operator(
    "embed_visible(Tensor tokens, Tensor visible, Tensor weight, Tensor bias, Tensor norm_weight, Tensor norm_bias, "
    "float eps, Tensor first, Tensor position) -> Tensor",
    torch=embed_visible_ref,
    triton=_embed_visible_triton,
    cost=embed_visible_cost,
)


def embed_visible(
    tokens: Tensor, visible: Tensor, project: torch.nn.Linear, norm: torch.nn.LayerNorm, first: Tensor, position: Tensor
) -> Tensor:
    """Encoder input LN([first | project(visible tokens)] + position).

    tokens (B, n, C), visible (B, V) int64, first (1, D) repeated over the buffer, position (buffer + n, D).
    Returns (B, buffer + V, D), visible tokens in the order of `visible`.
    """
    return _embed_visible(
        tokens, visible, project.weight, project.bias, norm.weight, norm.bias, norm.eps, first, position
    )


def embed_visible_cases() -> list[Case]:
    def make(batch: int, n: int, seen: int, buffer: int, channels: int, width: int, dtype=torch.float32):
        def arguments(device):
            noise = torch.Generator().manual_seed(n)

            def random(*size: int) -> Tensor:
                return torch.randn(*size, generator=noise).to(device, dtype)

            visible = torch.rand(batch, n, generator=noise).argsort(1)[:, :seen].sort(1).values
            affine = random(width, channels), random(width), random(width), random(width)
            tokens, first, position = random(batch, n, channels), random(1, width), random(buffer + n, width)
            return tokens, visible.to(device), *affine, 1e-6, first, position

        return arguments

    return [
        Case("last rounds at 1024", make(1, 4096, 4000, 64, 16, 1280, torch.bfloat16), "aot gpu"),
        Case("first round, nothing visible", make(1, 4096, 0, 64, 16, 1280, torch.bfloat16), "aot gpu"),
        Case("two sequences in bfloat16, a block partly full", make(2, 40, 13, 8, 16, 320, torch.bfloat16)),
        Case("odd width and channels", make(2, 9, 4, 3, 6, 37)),
        Case("nothing visible", make(1, 9, 0, 2, 16, 32)),
        Case("one row", make(1, 4, 1, 0, 16, 16)),
        Case("no rows", make(0, 4, 1, 2, 16, 16)),
    ]
