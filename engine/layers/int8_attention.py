"""Norm, projections and attention of a block whose weights and scores are int8: no queries, keys or values as floats.

Only where the attention backend is int8-qk, whose kernel reads whole numbers. Letters: B pictures, L rows, D width.
"""

from torch import Tensor, nn

from ...kernels.attention_int8 import operator as attend
from ...kernels.int8_to_heads import HEAD_DIMS, int8_linear_to_heads
from ...kernels.keys_off import keys_off
from ...kernels.norms import norm_int8
from ...quant.int8 import ALL, Int8Linear
from .attention import Attention
from .linear import norm_arguments


def attends_in_int8(attention: Attention, qkv: nn.Module, x: Tensor, heads: int) -> bool:
    """Whether `norm_attention_int8` is for these."""
    whole = isinstance(qkv, Int8Linear) and qkv.group == 1 and not qkv.few(x)
    return whole and attention.backend == "int8-qk" and x.shape[-1] // heads in HEAD_DIMS


def norm_attention_int8(x: Tensor, picked: Tensor, norm: nn.Module, qkv: Int8Linear, heads: int) -> Tensor:
    """Bidirectional attention of the rows `picked` (B, L or N, D) to all rows of x (B, L, D), (B, L or N, D).

    `qkv` makes queries, keys and values of norm(x), D columns each; `picked` may be x itself.
    """
    width = x.shape[-1]
    if picked is x:
        (q, k), (q_scale, k_scale), (v,) = _heads(x, norm, qkv, ALL, heads, keys=width)
    else:
        (k,), (k_scale,), (v,) = _heads(x, norm, qkv, slice(width, None), heads, keys=0)
        (q,), (q_scale,), _ = _heads(picked, norm, qkv, slice(width), heads, keys=None)
    return attend(q, q_scale, k, k_scale, v, x.dtype).transpose(1, 2).flatten(2)


def _heads(
    x: Tensor, norm: nn.Module, qkv: Int8Linear, rows: slice, heads: int, keys: int | None
) -> tuple[Tensor, ...]:
    """Of some outputs of qkv(norm(x)), of which keys begin at `keys`: (int8 parts, their scales, float16 parts)."""
    (numbers, scale), (weight, weight_scale, bias) = norm_int8(*norm_arguments(x, norm)), qkv.part(rows)
    width, whole = x.shape[-1], 1
    if keys is not None:
        bias, whole = keys_off(numbers, scale, weight, weight_scale, bias, keys, keys + width), 1 + keys // width
    return int8_linear_to_heads(numbers, scale, weight, weight_scale, bias, heads, whole)
