"""Attention over the tokens of one or two streams together, whose queries and keys have norms: an MMDiT's.

Each stream has weights of its own. Where those and the scores are int8, its products leave queries, keys and values as
whole numbers for an attention that reads such; else a pass over what they leave makes the streams one. Letters: R rows,
L tokens of a stream, D width, H heads, d their width.
"""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor, nn

from ...kernels.attention_int8 import operator as attend_int8
from ...kernels.int8_to_joint import WIDTH, int8_linear_to_joint
from ...kernels.joint_keys import joint_keys_off
from ...kernels.joint_qkv import joint_qkv
from ...kernels.norms import norm_int8
from ...quant.int8 import ALL, Int8Linear
from .attention import Attention
from .linear import Modulation, norm_arguments, norm_linear


class Attended(NamedTuple):
    """What a stream brings."""

    x: Tensor  # (R, L, D)
    modulation: Modulation
    norm: nn.Module  # of x, which is modulated then
    qkv: nn.Module  # D to 3 D
    norms: tuple[Tensor, Tensor]  # weights (d) for queries and for keys


def joint_attention(
    attend: Attention, streams: Sequence[Attended], heads: int, eps: float, wanted: int | None = None
) -> Tensor:
    """(R, L, D) of the tokens of one or two streams, one after another, or of the first `wanted`.

    The other queries are made in vain: the products take all or none.
    """
    if all(_in_whole_numbers(attend, stream, heads) for stream in streams):
        mixed = _in_int8(streams, heads, eps, wanted)
    else:
        made = [(norm_linear(s.x, s.norm, s.qkv, s.modulation), s.norms) for s in streams]
        (image, of_image), (text, of_text) = (*made, (None, None))[:2]
        q, k, v = joint_qkv(image, text, of_image, of_text, heads, eps)  # (R, H, L, d)
        mixed = attend(q[:, :, :wanted], k, v)
    return mixed.transpose(1, 2).flatten(2)


def _in_whole_numbers(attend: Attention, stream: Attended, heads: int) -> bool:
    qkv = stream.qkv
    whole = isinstance(qkv, Int8Linear) and qkv.group == 1 and not qkv.few(stream.x)
    return whole and attend.backend == "int8-qk" and stream.x.shape[-1] == heads * WIDTH


def _in_int8(streams: Sequence[Attended], heads: int, eps: float, wanted: int | None) -> Tensor:
    """(R, H, L, d)"""
    operands = [(*norm_int8(*norm_arguments(s.x, s.norm, s.modulation)), *s.qkv.part(ALL), *s.norms) for s in streams]
    first, width = streams[0], heads * WIDTH
    off = joint_keys_off(*operands[0][:2], *first.qkv.part(slice(width, 2 * width)), first.norms[1], eps)
    (q, k), (q_scale, k_scale), v = int8_linear_to_joint(operands[0], *(operands[1:] or [None]), off, heads, eps)
    return attend_int8(q[:, :, :wanted], q_scale[:, :, :wanted], k, k_scale, v, first.x.dtype)
