"""One ancestral step of the diffusion head's sampler, fused with guidance (Nichol & Dhariwal 2021, learned range).

    eps = eps_u + c (eps_c - eps_u)                    guidance acts on eps only
    x0  = sqrt(1/a) x - sqrt(1/a - 1) eps              a: cumulative alpha; x0 is not clipped
    x  <- c1 x0 + c2 x + exp(logvar / 2) * noise * temperature
    logvar = f log(beta) + (1 - f) log(beta~),  f = (v + 1) / 2,  v from the conditional half

Called by `models/unipic/head.py`, once per denoising step. The state x is float32 whatever the network's dtype.
`ddpm_step` takes recorded noise, `ddpm_update` draws its own and takes everything else from device memory, so that
one captured step can be replayed. Letters: N tokens, C channels, M = N rows of the network, or 2N with guidance.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ._device import normal
from ._op import Case, Cost, Operator, launch, tl, triton
from .philox import normals, token_words

COLUMNS = 8  # of a step table
GUIDANCE = 6  # which of them


class DDPMStep(NamedTuple):
    """Coefficients of one step, computed in float64; arithmetic on them is float32."""

    sqrt_recip: float  # sqrt(1/a)
    sqrt_recip_m1: float  # sqrt(1/a - 1)
    c1: float
    c2: float
    log_beta: float
    log_beta_tilde: float
    timestep: int  # index into the training schedule, what the network is told


class Drawn(NamedTuple):
    """Where the noise of N tokens lies in the generator: key (N, 2), the seed's words, and raster position (N)."""

    key: Tensor  # int64
    position: Tensor  # int64
    stream: int


def ddpm_step(
    x: Tensor,
    out: Tensor,
    uncond: Tensor | None,
    noise: Tensor | None,
    step: DDPMStep,
    guidance: float | Tensor,
    temperature: float | Tensor,
) -> Tensor:
    """x (N, C) float32; out, uncond (N, 2C) = [eps | v] of the guidance halves; noise (N, C), None at the last step."""
    eps, v = out.to(x.dtype).chunk(2, dim=-1)  # (N, C)
    if uncond is not None:
        eps_u = uncond.to(x.dtype).chunk(2, dim=-1)[0]
        eps = eps_u + guidance * (eps - eps_u)
    x0 = step.sqrt_recip * x - step.sqrt_recip_m1 * eps
    mean = step.c1 * x0 + step.c2 * x
    if noise is None:
        return mean
    f = (v + 1) / 2
    log_variance = f * step.log_beta + (1 - f) * step.log_beta_tilde
    return mean + torch.exp(0.5 * log_variance) * noise * temperature


def step_table(table: Sequence[DDPMStep], guidance: float, temperature: float) -> Tensor:
    """What `ddpm_update` reads of a table: (T, 8) float32, [the six coefficients, guidance, temperature]."""
    return torch.tensor([[*step[:6], guidance, temperature] for step in table], dtype=torch.float32)


def ddpm_update_ref(x, seen, clock, out, table, key, position, stream, ahead, close) -> None:
    """In x's dtype, without a host synchronisation. What the operator takes is said at `ddpm_update`."""
    index, channels = clock[1:] - ahead, x.shape[1]
    *coefficients, guidance, temperature = table.index_select(0, index)[0].unbind()
    step = DDPMStep(*coefficients, timestep=0)
    cond, uncond = (out, None) if len(out) == len(x) else out.chunk(2)
    taken = len(table) - 1 - index  # noise is numbered in the order of the steps, coefficients from the end
    noise = normals(token_words(key, position, taken, stream, channels), x.dtype).flatten(2)[0, :, :channels]
    last = ddpm_step(x, cond, uncond, None, step, guidance, temperature)
    x.copy_(torch.where(index > 0, ddpm_step(x, cond, uncond, noise, step, guidance, temperature), last))
    seen.copy_(x if uncond is None else x.repeat(2, 1))
    if close:
        clock[:1] = clock[1:] - close


@triton.jit(do_not_specialize=["last", "stream", "ahead", "close", "tokens"])
def _ddpm_update_kernel(
    x_ptr,  # (N, C) float32 contiguous
    seen_ptr,  # (M, C) contiguous
    clock_ptr,  # (2) int64
    out_ptr,  # (M, 2C) contiguous
    table_ptr,  # (T, 8) float32
    key_ptr,  # (N, 2) int64
    position_ptr,  # (N) int64
    last,  # T - 1
    stream,
    ahead,
    close,
    tokens,  # N
    C: tl.constexpr,
    GUIDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < tokens * C
    token, channel = at // C, at % C
    now = tl.load(clock_ptr + 1)
    index = now - ahead
    row = table_ptr + index * 8
    x = tl.load(x_ptr + at, mask=inside, other=0.0)
    here = out_ptr + token * (2 * C) + channel
    eps = tl.load(here, mask=inside, other=0.0).to(tl.float32)
    v = tl.load(here + C, mask=inside, other=0.0).to(tl.float32)
    if GUIDED:
        bare_at = (token + tokens) * (2 * C) + channel
        bare = tl.load(out_ptr + bare_at, mask=inside, other=0.0).to(tl.float32)
        eps = bare + tl.load(row + 6) * (eps - bare)
    x0 = tl.load(row) * x - tl.load(row + 1) * eps
    y = tl.load(row + 2) * x0 + tl.load(row + 3) * x
    if index > 0:
        k0 = tl.load(key_ptr + 2 * token, mask=inside, other=0)
        k1 = tl.load(key_ptr + 2 * token + 1, mask=inside, other=0)
        position = tl.load(position_ptr + token, mask=inside, other=0)
        f = (v + 1) / 2
        log_variance = f * tl.load(row + 4) + (1 - f) * tl.load(row + 5)
        noise = normal(k0, k1, position, channel, last - index, stream, C)  # numbered in the order of the steps
        y += tl.exp(0.5 * log_variance) * noise * tl.load(row + 7)
    tl.store(x_ptr + at, y, mask=inside)
    low = y.to(seen_ptr.dtype.element_ty)
    tl.store(seen_ptr + at, low, mask=inside)
    if GUIDED:
        tl.store(seen_ptr + (token + tokens) * C + channel, low, mask=inside)
    if close > 0 and tl.program_id(0) == 0:  # nobody reads this cell here
        tl.store(clock_ptr, now - close)


def _ddpm_update_triton(x, seen, clock, out, table, key, position, stream, ahead, close) -> None:
    block = 128  # heuristic: a few thousand values, spread over many multiprocessors
    launch(
        _ddpm_update_kernel,
        (triton.cdiv(x.numel(), block),),
        x,
        seen,
        clock,
        out.contiguous(),
        table,
        key.contiguous(),
        position.contiguous(),
        len(table) - 1,
        stream,
        ahead,
        close,
        len(x),
        C=x.shape[1],
        GUIDED=len(out) != len(x),
        BLOCK=block,
        num_warps=4,
    )


def ddpm_update_cost(x, seen, clock, out, table, key, position, stream, ahead, close) -> Cost:
    moved = sum(t.numel() * t.element_size() for t in (x, x, seen, out, key, position))
    return Cost(120 * x.numel(), moved + COLUMNS * 4 + 24)


_ddpm_update = Operator(
    "ddpm_update(Tensor(a!) x, Tensor(b!) seen, Tensor(c!) clock, Tensor out, Tensor table, Tensor key, "
    "Tensor position, int stream, int ahead, int close) -> ()",
    torch=ddpm_update_ref,
    triton=_ddpm_update_triton,
    cost=ddpm_update_cost,
)


def ddpm_update(
    x: Tensor, seen: Tensor, clock: Tensor, out: Tensor, table: Tensor, drawn: Drawn, ahead: int, close: int
) -> None:
    """The step of index clock[1] - ahead, in place: x (N, C) float32, and seen (M, C), what the network reads next.

    out (M, 2C) = [eps | v], conditional rows first; table (T, 8) as `step_table` makes it. clock (2) int64 is [index
    of the next step to begin with, index that was begun with]; the last of several steps closes all of them at once:
    close is their number, else 0. The step of index i draws the noise of step T - 1 - i, that of index 0 none.
    """
    _ddpm_update(x, seen, clock, out, table, *drawn, ahead, close)


def ddpm_update_cases() -> list[Case]:
    def make(tokens: int, guided: bool, index: int, ahead: int, dtype: torch.dtype, channels: int = 16):
        def arguments(device):
            noise = torch.Generator().manual_seed(index)
            x = torch.randn(tokens, channels, generator=noise)
            out = torch.randn(tokens * (2 if guided else 1), 2 * channels, generator=noise).to(device, dtype)
            table = torch.rand(6, COLUMNS, generator=noise) - torch.tensor([0, 0, 0, 0, 3, 4, 0, 0])
            key = torch.randint(2**32, (tokens, 2), generator=noise).to(device)
            position = torch.randperm(4096, generator=noise)[:tokens].to(device)
            clock = torch.tensor([7, index + ahead]).to(device)
            seen = torch.zeros(len(out), channels).to(device, dtype)
            return x.to(device), seen, clock, out, table.to(device), key, position, 2, ahead, ahead + 1 if ahead else 0

        return arguments

    half = torch.bfloat16
    return [
        Case("400 tokens with guidance", make(400, True, 4, 0, half), "aot gpu"),
        Case("with guidance, two programs", make(11, True, 4, 0, half)),
        Case("closing a chunk", make(11, True, 2, 3, half)),
        Case("the last step draws nothing", make(5, True, 0, 1, half)),
        Case("without guidance, float32, odd channels", make(5, False, 3, 0, torch.float32, channels=6)),
        Case("one token", make(1, False, 1, 0, half)),
        Case("no tokens", make(0, True, 1, 0, half)),
    ]
