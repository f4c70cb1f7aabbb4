"""One ancestral step of the diffusion head's sampler, fused with guidance (Nichol & Dhariwal 2021, learned range).

    eps = eps_u + c (eps_c - eps_u)                    guidance acts on eps only
    x0  = sqrt(1/a) x - sqrt(1/a - 1) eps              a: cumulative alpha; x0 is not clipped
    x  <- c1 x0 + c2 x + exp(logvar / 2) * noise * temperature
    logvar = f log(beta) + (1 - f) log(beta~),  f = (v + 1) / 2,  v from the conditional half

Called by `models/unipic/head.py`, once per denoising step. The state x is float32 whatever the network's dtype.
`ddpm_step` takes recorded noise; kernels/head_step.py is the same with what the network does around it, draws its own
and takes everything else from device memory. Letters: N tokens, C channels.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

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
    """What kernels/head_step.py reads of a table: (T, 8) float32, [the six coefficients, guidance, temperature]."""
    return torch.tensor([[*step[:6], guidance, temperature] for step in table], dtype=torch.float32)
