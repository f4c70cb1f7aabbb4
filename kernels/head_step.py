"""What ends a denoising step of the diffusion head and begins the next: final layer, sampler, first layer.

    [eps | v] = (LN(h) (1 + scale)) W^T + offset        LN without weight and bias
    x  <- a step of kernels/ddpm_step.py, guided, with noise of kernels/philox.py or by a solver that needs none
    h0 <- x W_in^T + b_in                               the same for both guidance halves

`offset` is the layer's shift and bias behind W, made ahead of time (`FinalLayer.folded`). A program has 16 rows, with
guidance both rows of 8 tokens. Everything that changes from step to step comes from device memory, so that a captured
chunk of steps can be replayed. Called by `models/unipic/head.py`, once per denoising step.
Letters: N tokens, C channels, M = N rows of the network, or 2N with guidance, W width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ._device import moments, normal
from ._op import Case, Cost, Operator, cdiv, launch, next_power_of_2, tl, triton, unit_rows
from ._product import halves
from .ddpm_step import COLUMNS, DDPMStep, Drawn, ddpm_step
from .linear import linear
from .philox import normals, token_words

ROWS = 16  # of a program


def head_step_ref(
    h, scale, offset, eps, weight, in_weight, in_bias, x, before, h0, clock, table, key, position, stream, ahead, close
) -> None:
    """In the tensors' dtypes, without a host synchronisation. What the operator takes is said at `head_step`."""
    out = linear(F.layer_norm(h, h.shape[-1:], eps=eps) * (1 + scale), weight) + offset
    index, channels = clock[1:2] - ahead, x.shape[1]
    *coefficients, guidance, temperature, c3 = table.index_select(0, index)[0].unbind()
    step = DDPMStep(*coefficients, timestep=0, c3=c3)
    cond, uncond = (out, None) if len(out) == len(x) else out.chunk(2)
    last = ddpm_step(x, cond, uncond, None, step, guidance, temperature, before)
    if before is None:
        taken = clock[2:] - index  # noise is numbered in the order of the steps, coefficients from the end
        noise = normals(token_words(key, position, taken, stream, channels), x.dtype).flatten(2)[0, :, :channels]
        last = torch.where(index > 0, ddpm_step(x, cond, uncond, noise, step, guidance, temperature), last)
    x.copy_(last)
    seen = x.to(h.dtype)
    h0.copy_(linear(seen if uncond is None else seen.repeat(2, 1), in_weight, in_bias))
    if close:
        clock[:1] = clock[1:2] - close


@triton.jit(do_not_specialize=["stream", "ahead", "close", "tokens"])
def _head_step_kernel(
    h_ptr,  # (M, W), rows h_stride apart
    scale_ptr,  # (M, W), rows scale_stride apart
    offset_ptr,  # (M, 2C), rows offset_stride apart
    weight_ptr,  # (2C, W) contiguous
    in_weight_ptr,  # (W, C) contiguous
    in_bias_ptr,  # (W)
    x_ptr,  # (N, C) float32 contiguous
    before_ptr,  # the same, None where noise is drawn
    h0_ptr,  # (M, W) contiguous
    clock_ptr,  # (3) int64
    table_ptr,  # (T, COLUMNS) float32
    key_ptr,  # (N, 2) int64, with position_ptr None where none is drawn
    position_ptr,  # (N) int64
    h_stride,
    scale_stride,
    offset_stride,
    eps,
    stream,
    ahead,
    close,
    tokens,  # N
    W: tl.constexpr,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ROWS: tl.constexpr,
    GUIDED: tl.constexpr,
    DRAWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAT: tl.constexpr,
):
    TOKENS: tl.constexpr = ROWS // 2 if GUIDED else ROWS
    at = tl.arange(0, ROWS)
    first = tl.program_id(0).to(tl.int64) * TOKENS
    row = tl.minimum(first + at % TOKENS, tokens - 1) + at // TOKENS * tokens  # the conditional half, then the other
    inside = first + at % TOKENS < tokens
    out = _final(h_ptr + row * h_stride, scale_ptr + row * scale_stride, weight_ptr, inside, eps,
                 W, C, BLOCK_C, ROWS, BLOCK_K, STAT)  # fmt: skip
    channel = tl.arange(0, BLOCK_C)
    column = tl.arange(0, 2 * BLOCK_C)
    there = inside[:, None] & (column % BLOCK_C < C)[None, :]
    column = column // BLOCK_C * C + column % BLOCK_C
    offset_at = offset_ptr + row[:, None] * offset_stride + column[None, :]
    noise_of, v = halves(out + tl.load(offset_at, mask=there, other=0.0).to(tl.float32))

    now = tl.load(clock_ptr + 1)
    index = now - ahead
    coefficients = table_ptr + index * COLUMNS
    if GUIDED:
        noise_of, bare = _both(noise_of, TOKENS)
        v, _ = _both(v, TOKENS)
        noise_of = bare + tl.load(coefficients + 6) * (noise_of - bare)
    token = first + tl.arange(0, TOKENS)
    there = (token < tokens)[:, None] & (channel < C)[None, :]
    x_at = x_ptr + token[:, None] * C + channel[None, :]
    x = tl.load(x_at, mask=there, other=0.0)
    x0 = tl.load(coefficients) * x - tl.load(coefficients + 1) * noise_of
    y = tl.load(coefficients + 2) * x0 + tl.load(coefficients + 3) * x
    if DRAWS:
        if index > 0:
            k0 = tl.load(key_ptr + 2 * token, mask=token < tokens, other=0)[:, None]
            k1 = tl.load(key_ptr + 2 * token + 1, mask=token < tokens, other=0)[:, None]
            position = tl.load(position_ptr + token, mask=token < tokens, other=0)[:, None]
            f = (v + 1) / 2
            log_variance = f * tl.load(coefficients + 4) + (1 - f) * tl.load(coefficients + 5)
            # Numbered in the order of the steps.
            taken = tl.load(clock_ptr + 2) - index
            noise = normal(k0, k1, position, channel[None, :].to(tl.int64), taken, stream, C)
            y += tl.exp(0.5 * log_variance) * noise * tl.load(coefficients + 7)
    else:
        before_at = before_ptr + token[:, None] * C + channel[None, :]
        y += tl.load(coefficients + 8) * tl.load(before_at, mask=there, other=0.0)
        tl.store(before_at, x0, mask=there)
    tl.store(x_at, y, mask=there)

    seen = y.to(h0_ptr.dtype.element_ty)
    if GUIDED:
        seen = tl.reshape(tl.permute(tl.join(seen, seen), (2, 0, 1)), (ROWS, BLOCK_C))
    _begin(seen, in_weight_ptr, in_bias_ptr, h0_ptr + row * W, inside, W, C, BLOCK_C, BLOCK_N)
    if close > 0 and tl.program_id(0) == 0:  # nobody reads this cell here
        tl.store(clock_ptr, now - close)


@triton.jit
def _final(
    h_at,  # (ROWS): where rows begin; scale_at alike
    scale_at,
    weight_ptr,
    inside,
    eps,
    W: tl.constexpr,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAT: tl.constexpr,
):
    """(LN(h) (1 + scale)) W^T, (ROWS, 2 BLOCK_C) float32: eps and v, each padded."""
    mean, variance = moments(h_at, W, ROWS, STAT)
    inverse = tl.rsqrt(variance + eps)
    column = tl.arange(0, 2 * BLOCK_C)
    known = column % BLOCK_C < C
    weight_at = weight_ptr + (column // BLOCK_C * C + column % BLOCK_C)[None, :] * W
    out = tl.zeros((ROWS, 2 * BLOCK_C), tl.float32)
    for start in range(0, W, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        there = inside[:, None] & (k < W)[None, :]
        a = tl.load(h_at[:, None] + k[None, :], mask=there, other=0.0).to(tl.float32)
        scale = tl.load(scale_at[:, None] + k[None, :], mask=there, other=0.0).to(tl.float32)
        a = ((a - mean[:, None]) * inverse[:, None] * (1 + scale)).to(weight_ptr.dtype.element_ty)
        weight = tl.load(weight_at + k[:, None], mask=(k < W)[:, None] & known[None, :], other=0.0)
        out = tl.dot(a, weight, out, input_precision="ieee")
    return out


@triton.jit
def _begin(
    seen,  # (ROWS, BLOCK_C)
    in_weight_ptr,
    in_bias_ptr,
    h0_at,  # (ROWS): where rows begin
    inside,
    W: tl.constexpr,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Store seen W_in^T + b_in."""
    channel = tl.arange(0, BLOCK_C)
    for left in range(0, W, BLOCK_N):
        col = left + tl.arange(0, BLOCK_N)
        known = (channel < C)[:, None] & (col < W)[None, :]
        in_weight = tl.load(in_weight_ptr + col[None, :] * C + channel[:, None], mask=known, other=0.0)
        h0 = tl.dot(seen, in_weight, input_precision="ieee")
        h0 += tl.load(in_bias_ptr + col, mask=col < W, other=0.0).to(tl.float32)[None, :]
        to = h0_at[:, None] + col[None, :]
        tl.store(to, h0.to(in_weight_ptr.dtype.element_ty), mask=inside[:, None] & (col < W)[None, :])


@triton.jit
def _both(y, TOKENS: tl.constexpr):
    """The rows of both guidance halves of y (2 TOKENS, columns), each (TOKENS, columns)."""
    return tl.split(tl.permute(tl.reshape(y, (2, TOKENS, y.shape[1])), (1, 2, 0)))


def _head_step_triton(
    h, scale, offset, eps, weight, in_weight, in_bias, x, before, h0, clock, table, key, position, stream, ahead, close
) -> None:
    h, scale, offset = unit_rows(h), unit_rows(scale), unit_rows(offset)
    (tokens, channels), width, guided = x.shape, h.shape[1], len(h) != len(x)
    block = 32 if h.dtype == torch.float32 else 128  # no tensor cores for float32: more would spill
    launch(
        _head_step_kernel,
        (cdiv(tokens, ROWS // 2 if guided else ROWS),),
        *(h, scale, offset, weight.contiguous(), in_weight.contiguous(), in_bias, x, before, h0, clock, table),
        *(key if key is None else key.contiguous(), position if position is None else position.contiguous()),
        *(h.stride(0), scale.stride(0), offset.stride(0), eps),
        *(stream, ahead, close, tokens),
        W=width,
        C=channels,
        BLOCK_C=max(16, next_power_of_2(channels)),
        ROWS=ROWS,
        GUIDED=guided,
        DRAWS=before is None,
        COLUMNS=COLUMNS,
        BLOCK_K=block,
        BLOCK_N=block,
        STAT=256,  # 32 values a thread
        num_warps=4,  # heuristic
        num_stages=3,
    )


def head_step_cost(
    h, scale, offset, eps, weight, in_weight, in_bias, x, before, h0, clock, table, key, position, stream, ahead, close
) -> Cost:
    flop = (
        2 * len(h) * (weight.numel() + in_weight.numel()) + 7 * h.numel() + (120 if before is None else 9) * x.numel()
    )
    mine = (key, position) if before is None else (before, before)
    read = (h, scale, offset, weight, in_weight, in_bias, x, x, h0, *mine)
    return Cost(flop, sum(t.nbytes for t in read) + 4 * COLUMNS + 32)


_head_step = Operator(
    "head_step(Tensor h, Tensor scale, Tensor offset, float eps, Tensor weight, Tensor in_weight, Tensor in_bias, "
    "Tensor(a!) x, Tensor(d!)? before, Tensor(b!) h0, Tensor(c!) clock, Tensor table, Tensor? key, Tensor? position, "
    "int stream, int ahead, int close) -> ()",
    torch=head_step_ref,
    triton=_head_step_triton,
    cost=head_step_cost,
)


def head_step(
    h: Tensor,
    scale: Tensor,
    offset: Tensor,
    eps: float,
    weight: Tensor,
    in_weight: Tensor,
    in_bias: Tensor,
    x: Tensor,
    before: Tensor | None,
    h0: Tensor,
    clock: Tensor,
    table: Tensor,
    drawn: Drawn | None,
    ahead: int,
    close: int,
) -> None:
    """The step of index clock[1] - ahead, in place: x (N, C) float32 and h0 (M, W), what the network goes on with.

    h and scale (M, W), offset (M, 2C), conditional rows first; weight (2C, W), in_weight (W, C), in_bias (W); table
    (T, 9) as `step_table` makes it. Either noise is `drawn`, or there is `before` (N, C) float32, in place, of an ODE's
    solver. clock (3) int64 is [index of the next step to begin with, index that was begun with, index of the first
    step]; the last of several steps closes all of them at once: close is their number, else 0. The step of index i
    draws the noise of step clock[2] - i, that of index 0 none.
    """
    key, position, stream = drawn or (None, None, 0)
    given = h, scale, offset, eps, weight, in_weight, in_bias, x, before, h0, clock, table
    _head_step(*given, key, position, stream, ahead, close)


def head_step_cases() -> list[Case]:
    def make(
        tokens: int,
        width: int,
        guided: bool,
        index: int,
        ahead: int,
        dtype=torch.bfloat16,
        channels: int = 16,
        draws: bool = True,
    ):
        def arguments(device):
            noise = torch.Generator().manual_seed(index)

            def random(*shape: int, kind: torch.dtype = dtype) -> Tensor:
                return torch.randn(*shape, generator=noise).to(device, kind)

            rows = tokens * (2 if guided else 1)
            made = random(rows, width + 2 * channels)  # of one product
            weight, in_weight = random(2 * channels, width) * width**-0.5, random(width, channels)
            table = torch.rand(6, COLUMNS, generator=noise) - torch.tensor([0, 0, 0, 0, 3, 4, 0, 0, 0])
            key = torch.randint(2**32, (tokens, 2), generator=noise).to(device)
            position = torch.randperm(4096, generator=noise)[:tokens].to(device)
            clock, x = torch.tensor([7, index + ahead, 5]).to(device), random(tokens, channels, kind=torch.float32)
            h, in_bias, h0 = random(rows, width), random(width), torch.zeros(rows, width).to(device, dtype)
            before = None if draws else random(tokens, channels, kind=torch.float32)
            given = h, made[:, :width], made[:, width:], 1e-6, weight, in_weight, in_bias, x, before, h0
            drawn = (key, position, 2) if draws else (None, None, 0)
            return *given, clock, table.to(device), *drawn, ahead, ahead + 1 if ahead else 0

        return arguments

    single = torch.float32
    return [
        Case("400 tokens with guidance", make(400, 1536, True, 4, 0), "aot gpu"),
        Case("400 tokens without, float32", make(400, 1536, False, 4, 0, single), "aot gpu"),
        Case("10 tokens with guidance, float32", make(10, 1536, True, 4, 0, single), "aot gpu"),
        Case("400 tokens with guidance, of an ODE", make(400, 1536, True, 4, 0, draws=False), "aot gpu"),
        Case("400 tokens without, float32, of an ODE", make(400, 1536, False, 4, 0, single, draws=False), "aot gpu"),
        Case("with guidance, two programs", make(11, 160, True, 4, 0)),
        Case("with guidance, two programs, of an ODE", make(11, 48, True, 4, 0, draws=False)),
        Case("without guidance, float32, odd widths, of an ODE", make(19, 37, False, 0, 0, single, 6, draws=False)),
        Case("closing a chunk", make(11, 48, True, 2, 3)),
        Case("the last step draws nothing", make(5, 32, True, 0, 1)),
        Case("without guidance, float32, odd widths", make(19, 37, False, 3, 0, single, channels=6)),
        Case("one token", make(1, 16, False, 1, 0)),
        Case("no tokens", make(0, 16, True, 1, 0)),
    ]
