"""Norm, projections and attention of a block whose weights and scores are int8: no queries, keys or values as floats.

Only where the attention backend is int8-qk, whose kernels read whole numbers. Letters: B pictures, or R rows behind
prompts, L rows of a picture or tokens, D width, H query and K key/value heads, d head dim.
"""

from torch import Tensor, nn

from ...kernels.attention_int8 import attention_int8_heads
from ...kernels.int8_of_groups import int8_linear_of_groups
from ...kernels.int8_to_heads import HEAD_DIMS, int8_linear_to_heads
from ...kernels.int8_to_rotary import WIDTH, int8_linear_to_rotary
from ...kernels.keys_off import keys_off
from ...kernels.norms import norm_int8
from ...kernels.prefix_attention_int8 import prefix_attention_int8
from ...kernels.rotary_keys import rotary_keys_off
from ...quant.int8 import ALL, Int8Linear
from .attention import Attention
from .linear import norm_arguments

Rotary = tuple[Tensor, Tensor]  # cos, sin (R, L, d / 2)
Prefix = tuple[Tensor, Tensor, Tensor, Tensor]  # a layer's, as kernels/prefix_attention.py reads it


def attends_in_int8(attention: Attention, qkv: nn.Module, proj: nn.Module, x: Tensor, heads: int) -> bool:
    """Whether `norm_attention_int8` is for these."""
    return x.shape[-1] // heads in HEAD_DIMS and all(_in_whole_numbers(attention, layer, x) for layer in (qkv, proj))


def continues_in_int8(attention: Attention, qkv: nn.Module, o: nn.Module, x: Tensor, head_dim: int) -> bool:
    """Whether `norm_prefix_attention_int8` is for these."""
    return head_dim == WIDTH and all(_in_whole_numbers(attention, layer, x) for layer in (qkv, o))


def _in_whole_numbers(attention: Attention, layer: nn.Module, x: Tensor) -> bool:
    return attention.backend == "int8-qk" and isinstance(layer, Int8Linear) and layer.group == 1 and not layer.few(x)


def norm_attention_int8(
    x: Tensor, picked: Tensor, norm: nn.Module, qkv: Int8Linear, proj: Int8Linear, heads: int
) -> Tensor:
    """picked + proj(bidirectional attention of the rows `picked` (B, L or N, D) to all rows of x (B, L, D)).

    `qkv` makes queries, keys and values of norm(x), D columns each; `picked` may be x itself.
    """
    width = x.shape[-1]
    if picked is x:
        (q, k), (q_scale, k_scale), (v,) = _heads(x, norm, qkv, ALL, heads, keys=width)
    else:
        (k,), (k_scale,), (v,) = _heads(x, norm, qkv, slice(width, None), heads, keys=0)
        (q,), (q_scale,), _ = _heads(picked, norm, qkv, slice(width), heads, keys=None)
    groups = attention_int8_heads(q, q_scale, k, k_scale, v)
    return int8_linear_of_groups(*groups, *proj.part(ALL), residual=picked, dtype=x.dtype)


def _heads(
    x: Tensor, norm: nn.Module, qkv: Int8Linear, rows: slice, heads: int, keys: int | None
) -> tuple[Tensor, ...]:
    """Of some outputs of qkv(norm(x)), of which keys begin at `keys`: (int8 parts, their scales, float16 parts)."""
    (numbers, scale), (weight, weight_scale, bias) = norm_int8(*norm_arguments(x, norm)), qkv.part(rows)
    width, whole = x.shape[-1], 1
    if keys is not None:
        bias, whole = keys_off(numbers, scale, weight, weight_scale, bias, keys, keys + width), 1 + keys // width
    return int8_linear_to_heads(numbers, scale, weight, weight_scale, bias, heads, whole)


def norm_prefix_attention_int8(
    x: Tensor, norm: nn.Module, qkv: Int8Linear, o: Int8Linear, rotary: Rotary, prefix: Prefix, heads: int
) -> Tensor:
    """x + o(causal attention of norm(x) behind prompts), x (R, L, D); `qkv` makes H, K and K heads of 128."""
    numbers, scale = norm_int8(*norm_arguments(x, norm))
    queries = heads * WIDTH
    keys = slice(queries, queries + (qkv.out_features - queries) // 2)
    off = rotary_keys_off(numbers, scale, *qkv.part(keys), *rotary)
    mixed, mixed_scale, values = int8_linear_to_rotary(numbers, scale, *qkv.part(ALL), *rotary, off, heads)
    groups = prefix_attention_int8(mixed, mixed_scale, values, off, *prefix)
    return int8_linear_of_groups(*groups, *o.part(ALL), residual=x, dtype=x.dtype)
