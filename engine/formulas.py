"""What operations of torch cost, by their names and shapes: multiply-adds count two, bytes are what they touch once."""

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

# Kinds of work by the names of torch's operations; whatever is not named is elementwise.
KINDS = {
    "matmul": "mm addmm addmm_ bmm baddbmm _int_mm convolution",
    "attention": "scaled_dot_product_attention",
    "norm": "native_layer_norm native_group_norm native_batch_norm cudnn_batch_norm",
    "movement": "copy_ clone _to_copy cat stack repeat index index_put index_put_ index_select gather scatter scatter_ "
    "embedding fill_ zero_ constant_pad_nd upsample_nearest2d upsample_bilinear2d zeros ones full arange",
}
KIND = {name: kind for kind, names in KINDS.items() for name in names.split()}
LOOKUPS = {"index", "index_select", "gather", "embedding"}  # read as much as they return, not the whole table
BLIND = {"copy_", "fill_", "zero_", "new_zeros", "new_ones", "new_full", "zeros_like", "ones_like", "full_like"}
# Ours, by what their names contain.
OUR_KINDS = {"attention": "attention", "linear": "matmul", "int8_weight": "matmul", "norm": "norm"}


def bytes_of(name: str, read: Sequence[Tensor], written: Sequence[Tensor]) -> int:
    """What an operation reads and writes."""
    moved = sum(touched(x) for x in written)
    if name in LOOKUPS:
        return 2 * moved
    return moved + sum(touched(x) for x in read[name in BLIND :])


def kind_of_ours(name: str) -> str:
    return next((kind for part, kind in OUR_KINDS.items() if part in name), "elementwise")


def touched(x: Tensor) -> int:
    """Bytes that x covers in memory, an expanded dimension counting once."""
    return x.element_size() * prod(size for size, stride in zip(x.shape, x.stride(), strict=True) if stride)


def precision(tensors: list[Tensor]) -> str:
    """By the first tensor: in a product the activations, whose type the tensor cores multiply in."""
    names = {torch.int8: "int8", torch.bfloat16: "bf16", torch.float16: "fp16"}
    return names.get(tensors[0].dtype, "fp32") if tensors else "fp32"


def _product(left: int, right: int) -> Callable[..., int]:
    """The formula of a matrix product of the arguments at these places, (..., M, K) and (..., K, N)."""

    def flop(args: Sequence[Any], kwargs: dict[str, Any], result: Tensor) -> int:
        return 2 * args[left].numel() * args[right].shape[-1]

    return flop


def _convolution(args: Sequence[Any], kwargs: dict[str, Any], result: Tensor) -> int:
    x, weight, transposed = args[0], args[1], args[6]
    return 2 * (x if transposed else result).numel() * weight[0].numel()


def _attention(args: Sequence[Any], kwargs: dict[str, Any], result: Tensor) -> int:
    """Both products, q (..., L, d), k (..., S, d), v (..., S, e); of a causal mask only what it lets through."""
    q, k, v = args[:3]
    queries, keys = q.shape[-2], k.shape[-2]
    pairs = queries * keys
    if args[5] if len(args) > 5 else kwargs.get("is_causal", False):
        pairs = sum(min(row + 1, keys) for row in range(queries))
    return 2 * q[..., 0, 0].numel() * pairs * (q.shape[-1] + v.shape[-1])


FORMULAS = {
    "mm": _product(0, 1),
    "addmm": _product(1, 2),
    "addmm_": _product(1, 2),
    "bmm": _product(0, 1),
    "baddbmm": _product(1, 2),
    "_int_mm": _product(0, 1),
    "convolution": _convolution,
    "scaled_dot_product_attention": _attention,
}
