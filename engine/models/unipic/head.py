"""Diffusion head of UniPic 1.0: an adaLN-modulated MLP that denoises each latent token by itself (arXiv 2406.11838).

Letters: N tokens, C latent channels, W head width. With guidance the conditions come as [cond N | uncond N].
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ....kernels.ddpm_step import DDPMStep, ddpm_step
from ....kernels.norms import modulated_layer_norm
from ...layers.linear import Linear
from .config import HeadConfig

NORM_EPS = 1e-6


def timestep_features(timesteps: Tensor, width: int) -> Tensor:
    """Sinusoid of original-step indices (T): (T, width) float32, cosines first."""
    half = width // 2
    frequencies = torch.exp(-math.log(10000) * torch.arange(half, device=timesteps.device).float() / half)
    angle = timesteps.float()[:, None] * frequencies
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


class HeadBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=NORM_EPS)
        self.fc1 = Linear(width, width)
        self.fc2 = Linear(width, width)
        self.modulation = Linear(width, 3 * width)

    def forward(self, h: Tensor, y: Tensor) -> Tensor:
        """h (N, W) state, y (N, W) = SiLU of the condition."""
        shift, scale, gate = self.modulation(y).chunk(3, dim=-1)
        u = modulated_layer_norm(h, self.norm.weight, self.norm.bias, shift, scale, NORM_EPS)
        return h + gate * self.fc2(F.silu(self.fc1(u)))


class FinalLayer(nn.Module):
    def __init__(self, width: int, channels: int) -> None:
        super().__init__()
        self.linear = Linear(width, 2 * channels)
        self.modulation = Linear(width, 2 * width)

    def forward(self, h: Tensor, y: Tensor) -> Tensor:
        shift, scale = self.modulation(y).chunk(2, dim=-1)
        return self.linear(modulated_layer_norm(h, None, None, shift, scale, NORM_EPS))


class DiffusionHead(nn.Module):
    def __init__(self, config: HeadConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.time_embed = nn.Sequential(Linear(config.frequencies, width), nn.SiLU(), Linear(width, width))
        self.cond_embed = Linear(config.condition, width)
        self.input_proj = Linear(config.channels, width)
        self.blocks = nn.ModuleList(HeadBlock(width) for _ in range(config.depth))
        self.final = FinalLayer(width, config.channels)

    def embed_steps(self, table: Sequence[DDPMStep]) -> Tensor:
        """Embeddings of all timesteps of a table, once per request: (T, W)."""
        parameter = self.time_embed[0].weight
        timesteps = torch.tensor([step.timestep for step in table], device=parameter.device)
        return self.time_embed(timestep_features(timesteps, self.config.frequencies).to(parameter.dtype))

    def forward(self, x: Tensor, t: Tensor, c: Tensor) -> Tensor:
        """x (N, C), t (W) or (N, W) embedded timestep, c (N, W) = cond_embed(z) -> (N, 2C) = [eps | v]."""
        h = self.input_proj(x)
        y = F.silu(t + c)
        for block in self.blocks:
            h = block(h, y)
        return self.final(h, y)

    def sample(
        self,
        z: Tensor,
        start: Tensor,
        noise: Tensor,
        table: Sequence[DDPMStep],
        embedded: Tensor,
        guidance: float,
        temperature: float,
    ) -> Tensor:
        """Denoise N tokens; returns (N, C) float32.

        z (N, D), or (2N, D) with guidance; start (N, C) and noise (steps, N, C) float32; embedded = embed_steps(table).
        Only the conditional state exists: the original's unconditional twin is never read.
        """
        guided = z.shape[0] != start.shape[0]
        c = self.cond_embed(z)
        x = start
        for taken, i in enumerate(reversed(range(len(table)))):
            seen = x.to(c.dtype)
            out = self(seen.repeat(2, 1) if guided else seen, embedded[i], c)
            cond, uncond = out.chunk(2) if guided else (out, None)
            x = ddpm_step(x, cond, uncond, noise[taken] if i else None, table[i], guidance, temperature)
        return x
