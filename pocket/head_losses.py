"""What the diffusion head is trained on: the error of the noise it predicts, and the bound's term for its variance."""

import math
from functools import cache

import torch
from torch import Tensor

from ..engine.layers.timesteps import timestep_features
from ..engine.models.unipic.head import DiffusionHead
from ..engine.schedules import cosine_betas
from .sitting import Losses

DRAWS = 4  # noise levels per token
LEVELS = 64  # timesteps a step; each is embedded once


def head_losses(head: DiffusionHead, z: Tensor, x: Tensor, weights: Tensor, noise: torch.Generator) -> Losses:
    """Error of the predicted noise, and the bound's term for its variance; z (N, D), x (N, C), weights (N).

    As in Improved DDPM (arXiv 2102.09672) the variance does not move the mean. Random numbers are the CPU's, so that
    they are the same on every device.
    """
    config, device = head.config, x.device
    process = process_of(config.train_steps, config.max_beta, device)
    levels = stratified(LEVELS, config.train_steps, noise).to(device)  # (T)
    embedded = head.time_embed(timestep_features(levels, config.frequencies))
    which = torch.randint(LEVELS, (DRAWS * len(x),), generator=noise).to(device)
    t = levels[which]
    clean, weights = x.repeat(DRAWS, 1), weights.repeat(DRAWS)
    true = torch.randn(clean.shape, generator=noise).to(device)
    noisy = process.signal[t] * clean + process.noise[t] * true
    eps, v = head(noisy, embedded[which], head.cond_embed(z).repeat(DRAWS, 1)).chunk(2, dim=-1)
    bound = process.bound(clean, noisy, eps.detach(), v, t)
    return {"noise": weighted_mean((eps - true).square().mean(1), weights), "variance": weighted_mean(bound, weights)}


def stratified(count: int, steps: int, noise: torch.Generator) -> Tensor:
    """`count` timesteps, one from each equal part of the schedule."""
    spread = (torch.arange(count) + torch.rand(count, generator=noise)) * steps / count
    return spread.long().clamp(max=steps - 1)


class Process:
    """The full noising process; tensors (steps, 1) float32."""

    def __init__(self, steps: int, max_beta: float, device: torch.device) -> None:
        betas = cosine_betas(steps, max_beta)
        kept = torch.cumprod(1 - betas, 0)
        before = torch.cat([torch.ones(1, dtype=torch.float64), kept[:-1]])
        variance = betas * (1 - before) / (1 - kept)
        variance[0] = variance[1]  # as the sampler does

        def column(values: Tensor) -> Tensor:
            return values.float()[:, None].to(device)

        self.signal, self.noise = column(kept.sqrt()), column((1 - kept).sqrt())
        self.least, self.most = column(variance.log()), column(betas.log())
        self.c1 = column(betas * before.sqrt() / (1 - kept))

    def bound(self, clean: Tensor, noisy: Tensor, eps: Tensor, v: Tensor, t: Tensor) -> Tensor:
        """KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)) in bits, the mean of a token's channels (N)."""
        guess = (noisy - self.noise[t] * eps) / self.signal[t]
        between = self.c1[t] * (clean - guess)  # of the two means
        f = (v + 1) / 2
        log_variance = f * self.most[t] + (1 - f) * self.least[t]
        kl = 0.5 * (log_variance - self.least[t] - 1 + (self.least[t] - log_variance).exp())
        return (kl + 0.5 * between.square() * (-log_variance).exp()).mean(1) / math.log(2)


@cache
def process_of(steps: int, max_beta: float, device: torch.device) -> Process:
    return Process(steps, max_beta, device)


def weighted_mean(errors: Tensor, weights: Tensor) -> Tensor:
    """Of errors with weights of the same shape; zero when nothing has weight."""
    return (errors * weights).sum() / weights.sum().clamp(min=1e-6)
