"""One step of the diffusion head's sampler, fused with guidance: ancestral (Nichol & Dhariwal 2021, learned range), or
of a solver of the ODE with the same marginals (DDIM, arXiv 2010.02502; DPM-Solver++, arXiv 2211.01095), without noise.

    eps = eps_u + c (eps_c - eps_u)                    guidance acts on eps only
    x0  = sqrt(1/a) x - sqrt(1/a - 1) eps              a: cumulative alpha; x0 is not clipped
    x  <- c1 x0 + c2 x + exp(logvar / 2) * noise * temperature
    logvar = f log(beta) + (1 - f) log(beta~),  f = (v + 1) / 2,  v from the conditional half
    x  <- c1 x0 + c2 x + c3 x0'                        an ODE's; x0': that of the step before, v is not looked at

Called by `models/unipic/head.py`, once per denoising step. The state x is float32 whatever the network's dtype.
`ddpm_step` takes recorded noise; kernels/head_step.py is the same with what the network does around it, draws its own
and takes everything else from device memory. Letters: N tokens, C channels.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

COLUMNS = 9  # of a step table
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
    c3: float = 0.0  # of a solver of the ODE


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
    before: Tensor | None = None,
) -> Tensor:
    """x (N, C) float32; out, uncond (N, 2C) = [eps | v] of the guidance halves; noise (N, C), None at the last step.

    `before` (N, C) float32, of an ODE's solver: the last step's x0, finite before the first; this step's replaces it.
    """
    eps, v = out.to(x.dtype).chunk(2, dim=-1)  # (N, C)
    if uncond is not None:
        eps_u = uncond.to(x.dtype).chunk(2, dim=-1)[0]
        eps = eps_u + guidance * (eps - eps_u)
    x0 = step.sqrt_recip * x - step.sqrt_recip_m1 * eps
    mean = step.c1 * x0 + step.c2 * x
    if before is not None:
        mean = mean + step.c3 * before
        before.copy_(x0)
        return mean
    if noise is None:
        return mean
    f = (v + 1) / 2
    log_variance = f * step.log_beta + (1 - f) * step.log_beta_tilde
    return mean + torch.exp(0.5 * log_variance) * noise * temperature


def step_table(table: Sequence[DDPMStep], guidance: float, temperature: float) -> Tensor:
    """What kernels/head_step.py reads of a table: (T, 9) float32, [the first six, guidance, temperature, c3]."""
    return torch.tensor([[*step[:6], guidance, temperature, step.c3] for step in table], dtype=torch.float32)
