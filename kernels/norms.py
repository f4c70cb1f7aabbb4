"""Normalisations: RMSNorm (LLM) and LayerNorm followed by an adaLN modulation (diffusion head)."""

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight over the last dimension: statistics in float32, rounded to x's dtype before the weight."""
    wide = x.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return normed.to(x.dtype) * weight


def modulated_layer_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, shift: Tensor, scale: Tensor, eps: float
) -> Tensor:
    """LN(x) (1 + scale) + shift; x, shift, scale (N, D); weight, bias (D) or None for a plain normalisation."""
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps) * (1 + scale) + shift
