"""Qwen2 decoder (arXiv 2407.10671) with a prompt cache, or without one, layer by layer.

Positions are (R, L); where a model reads pictures they may have several axes, (A, R, L), and each frequency turns with
one of them (M-RoPE, arXiv 2409.12191).
Letters: R rows, L tokens of this block, D width, H query heads, K key/value heads, d head dim, A axes.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from ...kernels.decode_attention import decode_attention
from ...kernels.norms import rms_norm
from ...kernels.rope import rope, rope_split, rotary_halves, rotary_tables, split_heads
from ..kv_cache import KVCache, Prompts
from .attention import Attention, prefix_attention
from .int8_attention import Prefix, Rotary, continues_in_int8, norm_prefix_attention_int8
from .linear import Linear, linear_add, norm_linear, norm_mlp


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
Room = tuple[Tensor, Tensor]  # for keys and values (R, K, L, d)


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
        """x (R, L, D); `mix` maps rotated q (R, H, L, d), k and v (R, K, L, d) to attention's output, shaped as q.

        From tables cos, sin (R, 1, L, d), so that gradients pass; inference takes `follow`.
        """
        c = self.config
        q, k, v = split_heads(norm_linear(x, self.input_norm, self.qkv), c.heads, c.kv_heads)
        return self.after(x, mix(rope(q, cos, sin), rope(k, cos, sin), v))

    def follow(
        self,
        x: Tensor,
        positions: Tensor,
        inv_freq: Tensor,
        mix: Mix,
        into: Room | None = None,
        ends: Tensor | None = None,
    ) -> Tensor:
        """The same from positions (R, L) and inv_freq (d/2) float32; k and v are written `into` a cache's room.

        With `ends`, as `rope_split` takes them, the room is a whole cache, and `mix` gets it instead of k and v.
        Of several axes: positions (A, R, L) and inv_freq (A, d/2), 0 where a frequency does not turn with the axis.
        """
        qkv = norm_linear(x, self.input_norm, self.qkv)
        split = partial(rope_split, ends=ends) if positions.dim() == 2 else axes_split
        return self.after(x, mix(*split(qkv, positions, inv_freq, self.config.heads, self.config.kv_heads, into)))

    def unattended(self, x: Tensor, spent: bool = False) -> Tensor:
        """Of a position that attends to nothing, as a pad that is masked: x (..., D), `spent` as in `norm_mlp`."""
        return norm_mlp(x, self.post_norm, self.gate_up, self.down, act="swiglu", spent=spent)

    def follow_in_int8(self, x: Tensor, rotary: Rotary, prefix: Prefix) -> Tensor:
        """The layer behind prompts, as `forward`, with whole numbers throughout, where `continues_in_int8` says so."""
        x = norm_prefix_attention_int8(x, self.input_norm, self.qkv, self.o, rotary, prefix, self.config.heads)
        return self.unattended(x)

    def after(self, x: Tensor, mixed: Tensor) -> Tensor:
        """What follows attention; mixed (R, H, L, d)."""
        return self.unattended(linear_add(mixed.transpose(1, 2).flatten(2), self.o, residual=x), spent=True)


class Qwen2(nn.Module):
    """Embeddings in, final-norm hidden states out; embedding table and logits belong to the caller.

    `sections`: how many frequencies, from the fastest on, turn with each axis of positions that have several.
    """

    def __init__(
        self, config: Qwen2Config, attend: Attention, round_inv_freq: bool, sections: tuple[int, ...] = ()
    ) -> None:
        super().__init__()
        self.config, self.attend, self.round_inv_freq, self.sections = config, attend, round_inv_freq, sections
        self.layers = nn.ModuleList(Qwen2Layer(config) for _ in range(config.layers))
        self.norm = RMSNorm(config.width, config.norm_eps)

    def forward(self, x: Tensor, prompts: Prompts) -> Tensor:
        """Continue the cached prompts of R rows by one block x (R, L, D) and leave the caches as they are."""
        positions, inv_freq = prompts.positions(x.shape[1]), self.frequencies(x.device, x.dtype)
        rotary = None
        for index, layer in enumerate(self.layers):
            if continues_in_int8(self.attend, layer.qkv, layer.o, x, self.config.head_dim):
                rotary = rotary or rotary_halves(positions, inv_freq, x.dtype)
                x = layer.follow_in_int8(x, rotary, prompts.of_layer(index))
            else:
                x = layer.follow(x, positions, inv_freq, partial(prefix_attention, self.attend, prompts, index))
        return self.norm(x)

    def outputs(self, rows: Sequence[Tensor], positions: Sequence[Tensor | None]) -> Iterator[list[Tensor]]:
        """Of the layers in turn, for rows (1, L, D) of any lengths at positions (1, L) or (A, 1, L), without a cache.

        A row without positions attends to nothing, as pads do. A layer runs when its output is asked for, and for all
        rows: layers that are streamed come once.
        """
        attend = partial(self.attend, causal=True)
        turns = [
            at if at is None else (at, self.frequencies_of(at, x.dtype)) for x, at in zip(rows, positions, strict=True)
        ]
        for layer in self.layers:
            rows = [
                layer.follow(x, *turn, attend) if turn else layer.unattended(x)
                for x, turn in zip(rows, turns, strict=True)
            ]
            yield rows

    def extend(self, x: Tensor, cache: KVCache, positions: Tensor | None = None) -> Tensor:
        """Run one row x (1, L, D) behind the cache and keep its keys and values there. Returns (1, L, D).

        positions (1, L) or (A, 1, L), by default the next ones.
        """
        count = x.shape[1]
        if positions is None:
            positions = torch.arange(cache.position, cache.position + count, device=x.device)[None]
        inv_freq, attend = self.frequencies_of(positions, x.dtype), partial(self.attend_cached, cache)
        for index, layer in enumerate(self.layers):
            x = layer.follow(x, positions, inv_freq, partial(attend, index), cache.room(index, count))
        cache.advance(count)
        return self.norm(x)

    def step(self, x: Tensor, positions: Tensor, keys: Tensor, values: Tensor, lengths: Tensor) -> Tensor:
        """`extend` of one token x (1, 1, D) with nothing but tensors: a graph of it serves every token.

        positions (1, 1); keys, values (layers, K, capacity, d) are changed in place; lengths (1) int32: valid positions
        in them with this one. Many programs share the keys. For `Attention.ours`.
        """
        inv_freq, mix = self.frequencies(x.device, x.dtype), partial(decode_attention, lengths=lengths)
        for index, layer in enumerate(self.layers):
            x = layer.follow(x, positions, inv_freq, mix, (keys[index][None], values[index][None]), lengths)
        return self.norm(x)

    def attend_cached(self, cache: KVCache, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Of L queries whose keys and values are the last in the cache."""
        keys, values = cache.upto(layer, q.shape[2])
        return self.attend(q, keys[None], values[None], causal=True)

    def rotary(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin (R, 1, L, d) for positions (R, L), angles in float32."""
        return rotary_tables(positions, self.frequencies(positions.device, dtype), dtype)

    def frequencies_of(self, positions: Tensor, dtype: torch.dtype) -> Tensor:
        """What `Qwen2Layer.follow` takes with positions (R, L) or (A, R, L)."""
        inv_freq = self.frequencies(positions.device, dtype)
        return inv_freq if positions.dim() == 2 else torch.block_diag(*inv_freq.split(self.sections))

    def frequencies(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Inverse frequencies (d/2) float32, as a model of this dtype was trained with them."""
        inv_freq = inverse_frequencies(self.config, device)
        return inv_freq.to(dtype).float() if self.round_inv_freq and dtype == torch.bfloat16 else inv_freq


def inverse_frequencies(config: Qwen2Config, device: torch.device) -> Tensor:
    """theta^(-2i/d), (d/2) float32."""
    exponent = torch.arange(0, config.head_dim, 2, device=device).float() / config.head_dim
    return 1.0 / config.rope_theta**exponent


def axes_split(
    qkv: Tensor, positions: Tensor, inv_freq: Tensor, heads: int, kv_heads: int, into: Room | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """`rope_split` of positions (A, R, L) and inv_freq (A, d/2)."""
    cos, sin = axes_tables(positions, inv_freq, qkv.dtype)
    q, k, v = split_heads(qkv, heads, kv_heads)
    q, k = rope(q, cos, sin), rope(k, cos, sin)
    return (q, k, v) if into is None else (q, into[0].copy_(k), into[1].copy_(v))


def axes_tables(positions: Tensor, inv_freq: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin (R, 1, L, d) for positions (A, R, L) and inv_freq (A, d/2) float32, one axis a frequency."""
    angle = (positions[..., None] * inv_freq[:, None, None]).sum(0)  # (R, L, d/2); the other axes add an exact 0
    angle = angle.repeat(1, 1, 2)[:, None]  # (R, 1, L, d)
    return angle.cos().to(dtype), angle.sin().to(dtype)
