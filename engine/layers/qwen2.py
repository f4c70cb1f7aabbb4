"""Qwen2 decoder (arXiv 2407.10671) with a prompt cache.

Letters: R rows, L tokens of this block, D width, H query heads, K key/value heads, d head dim.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels.norms import rms_norm
from ...kernels.rope import rope
from ..kv_cache import KVCache
from .attention import Attention, prefix_attention
from .linear import Linear


@dataclass(frozen=True)
class Qwen2Config:
    vocab: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    rope_theta: float
    norm_eps: float
    max_positions: int


Mix = Callable[[Tensor, Tensor, Tensor], Tensor]


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class Qwen2Layer(nn.Module):
    def __init__(self, config: Qwen2Config) -> None:
        super().__init__()
        self.config = config
        query, key = config.heads * config.head_dim, config.kv_heads * config.head_dim
        self.input_norm = RMSNorm(config.width, config.norm_eps)
        self.qkv = Linear(config.width, query + 2 * key)
        self.o = Linear(query, config.width, bias=False)
        self.post_norm = RMSNorm(config.width, config.norm_eps)
        self.gate_up = Linear(config.width, 2 * config.mlp, bias=False)
        self.down = Linear(config.mlp, config.width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mix: Mix) -> Tensor:
        """x (R, L, D); `mix` maps rotated q (R, H, L, d), k and v (R, K, L, d) to attention's output, shaped as q."""
        c = self.config
        heads = self.qkv(self.input_norm(x)).unflatten(-1, (c.heads + 2 * c.kv_heads, c.head_dim)).transpose(1, 2)
        q, k, v = heads.split([c.heads, c.kv_heads, c.kv_heads], dim=1)
        mixed = mix(rope(q, cos, sin), rope(k, cos, sin), v)
        x = x + self.o(mixed.transpose(1, 2).flatten(2))
        gate, up = self.gate_up(self.post_norm(x)).chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * up)


class Qwen2(nn.Module):
    """Embeddings in, final-norm hidden states out; embedding table and logits belong to the caller."""

    def __init__(self, config: Qwen2Config, attend: Attention, round_inv_freq: bool) -> None:
        super().__init__()
        self.config, self.attend, self.round_inv_freq = config, attend, round_inv_freq
        self.layers = nn.ModuleList(Qwen2Layer(config) for _ in range(config.layers))
        self.norm = RMSNorm(config.width, config.norm_eps)

    def forward(self, x: Tensor, positions: Tensor, prompts: Sequence[tuple[KVCache, int]]) -> Tensor:
        """Continue cached prompts by one block and leave the caches as they are.

        x (R, L, D), positions (R, L); `prompts`: (cache, rows) in row order. Returns (R, L, D).
        """
        cos, sin = self.rotary(positions, x.dtype)
        for index, layer in enumerate(self.layers):
            prefixes = [(*cache.prefix(index), rows) for cache, rows in prompts]
            x = layer(x, cos, sin, partial(prefix_attention, self.attend, prefixes))
        return self.norm(x)

    def extend(self, x: Tensor, cache: KVCache) -> Tensor:
        """Run one row x (1, L, D) behind the cache and keep its keys and values there. Returns (1, L, D)."""
        positions = torch.arange(cache.length, cache.length + x.shape[1], device=x.device)[None]
        cos, sin = self.rotary(positions, x.dtype)
        for index, layer in enumerate(self.layers):
            x = layer(x, cos, sin, partial(self.attend_cached, cache, index))
        cache.advance(x.shape[1])
        return self.norm(x)

    def attend_cached(self, cache: KVCache, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys, values = cache.extend(layer, k[0], v[0])
        return self.attend(q, keys[None], values[None], causal=True)

    def rotary(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin (R, 1, L, d) for positions (R, L), angles in float32."""
        inv_freq = inverse_frequencies(self.config, positions.device)
        if self.round_inv_freq and dtype == torch.bfloat16:
            inv_freq = inv_freq.to(dtype).float()
        angle = positions[:, None, :, None].float() * inv_freq.repeat(2)  # (R, 1, L, d)
        return angle.cos().to(dtype), angle.sin().to(dtype)


def inverse_frequencies(config: Qwen2Config, device: torch.device) -> Tensor:
    """theta^(-2i/d), (d/2) float32."""
    exponent = torch.arange(0, config.head_dim, 2, device=device).float() / config.head_dim
    return 1.0 / config.rope_theta**exponent
