"""Timesteps as a network sees them (arXiv 1706.03762, 2006.11239)."""

import math

import torch
from torch import Tensor


def timestep_features(timesteps: Tensor, width: int) -> Tensor:
    """Sinusoid of timesteps (T), 0 .. 1000, whole or not: (T, width) float32, cosines first."""
    half = width // 2
    frequencies = torch.exp(-math.log(10000) * torch.arange(half, device=timesteps.device).float() / half)
    angle = timesteps.float()[:, None] * frequencies
    return torch.cat([angle.cos(), angle.sin()], dim=-1)
