"""The linear and convolution layers models are built from, and what surrounds a linear layer in a block.

Models see floating tensors only. `norm_linear`, `linear_add` and `norm_mlp` look at the type of the layer: for an int8
one the norm or the activation in front of it makes the whole numbers, or in an MLP the product in front of that, and
gate and residual are added where its product is made.
In a diffusion head, where every one of few rows has its own modulation and gate, either is one launch with its product.
Anything else that is a module, such as a layer of bitsandbytes, is called as it is.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...kernels.gate import gated_add, swiglu
from ...kernels.head import gated_linear, modulated_linear
from ...kernels.head_int8 import modulated_linear_int8
from ...kernels.int8_of_groups import GROUP, int8_linear_of_groups
from ...kernels.int8_to_groups import int8_linear_to_groups
from ...kernels.linear import conv2d, linear, linear_onto
from ...kernels.norms import norm as norm_op
from ...kernels.norms import norm_int8
from ...kernels.quantise import activated, quantise, rotated
from ...quant.int8 import ALL, Int8Linear
from ...quant.rotate import RotatedEmbedding

Modulation = tuple[Tensor, Tensor]  # shift, scale (M, D), each row for N / M rows
# Up to here, the rows of five pictures in a batch, kernels/head*.py have one launch for two or three. The more rows,
# the more often they make one anew, out of a cache; beyond, launches no longer count. Heuristic, never measured.
FUSED_ROWS = 2048


class Linear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class Conv2d(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return conv2d(x, self.weight, self.bias, self.stride[0], self.padding[0])


def norm_linear(
    x: Tensor,
    norm: nn.Module,
    layer: nn.Module,
    modulation: Modulation | None = None,
    act: str = "none",
    rows: slice = ALL,
) -> Tensor:
    """act(layer(norm(x) (1 + scale) + shift)), x (..., K) to (..., N); `rows` are the only outputs wanted of `layer`.

    `norm`: nn.LayerNorm, with or without weight and bias, or an RMSNorm with `weight` and `eps`.
    act: none, gelu, gelu_tanh, silu, or swiglu, which halves the width.
    """
    how = norm_arguments(x, norm, modulation)
    if modulation and norm.weight is not None and act == "silu" and rows == ALL and _fuses(layer, x, modulation[0]):
        return modulated_linear(x, *modulation, norm.weight, norm.bias, norm.eps, layer.weight, layer.bias)
    if isinstance(layer, Int8Linear) and layer.group == 1:
        if layer.few(x):
            return layer.of_values(norm_op(*how), rows, activation=act)
        return layer.of_whole(*norm_int8(*how), x.dtype, rows, activation=act)
    return _activated(_outputs(layer, norm_op(*how), rows), act)


def linear_add(
    x: Tensor,
    layer: nn.Module,
    residual: Tensor,
    gate: Tensor | None = None,
    act: str = "none",
    spent: bool = False,
) -> Tensor:
    """residual + gate * layer(act(x)); x (..., K), residual (..., N), gate (M, N), each row for as many rows of x.

    spent: nobody reads `residual` afterwards, so the sum may be made in its place.
    """
    if isinstance(layer, Int8Linear):
        if layer.few(x):
            values = _activated(x, act) if layer.group == 1 else rotated(x, act, layer.group)
            return layer.of_values(values, residual=residual, gate=gate)
        return layer.of_whole(*quantise(x, act, layer.group), x.dtype, residual=residual, gate=gate)
    x = _activated(x, act)
    if gate is not None and _fuses(layer, residual, gate):
        return gated_linear(x, layer.weight, layer.bias, gate, residual)
    if spent and gate is None and isinstance(layer, Linear) and layer.bias is None:
        return linear_onto(residual, x, layer.weight)
    return residual + layer(x) if gate is None else gated_add(residual, gate, layer(x))


def norm_mlp(
    x: Tensor,
    norm: nn.Module,
    wide: nn.Module,
    narrow: nn.Module,
    act: str,
    modulation: Modulation | None = None,
    gate: Tensor | None = None,
    spent: bool = False,
) -> Tensor:
    """x + gate * narrow(act(wide(norm(x) (1 + scale) + shift))), x (..., D).

    norm, act and modulation as for `norm_linear`, gate (M, D) and spent, here of x, as for `linear_add`.
    """
    if act == "silu" and modulation and norm.weight is not None and _fuses_in_int8(wide, narrow, x, modulation[0]):
        between = modulated_linear_int8(x, *modulation, norm.weight, norm.bias, norm.eps, *wide.part(ALL))
        return int8_linear_of_groups(*between, *narrow.part(ALL), residual=x, gate=gate, dtype=x.dtype)
    if _hands_over(wide, narrow) and not wide.few(x):
        whole = norm_int8(*norm_arguments(x, norm, modulation))
        between = int8_linear_to_groups(*whole, *wide.part(ALL), act, narrow.group)
        return int8_linear_of_groups(*between, *narrow.part(ALL), residual=x, gate=gate, dtype=x.dtype)
    return linear_add(norm_linear(x, norm, wide, modulation, act), narrow, residual=x, gate=gate, spent=spent)


def linear_each(x: Tensor, layers: Iterable[nn.Module]) -> Iterator[Tensor]:
    """layer(x) for each layer; int8 ones share the whole numbers of x, unless they rotate it."""
    whole = None
    for layer in layers:
        if isinstance(layer, Int8Linear) and layer.group == 1 and not layer.few(x):
            whole = whole or quantise(x)
            yield layer.of_whole(*whole, x.dtype)
        else:
            yield layer(x)


def table(words: int, width: int) -> nn.Embedding:
    """Of embedded words, without values: to draw them, even on the meta device, torch would load its compiler."""
    return nn.Embedding.from_pretrained(torch.empty(words, width), freeze=False)


def as_row(ids: Sequence[int], table: nn.Embedding) -> Tensor:
    """ids (1, S) int64 where the table is."""
    return torch.tensor([ids], dtype=torch.long, device=table.weight.device)


def logits(x: Tensor, table: nn.Embedding) -> Tensor:
    """x E^T of hidden states x (..., D) and the table E (vocab, D) that also embeds the words."""
    return table.logits(x) if isinstance(table, RotatedEmbedding) else linear(x, table.weight)


def norm_arguments(x: Tensor, norm: nn.Module, modulation: Modulation | None = None) -> tuple[Any, ...]:
    """What the operators of kernels/norms.py take."""
    rms = not isinstance(norm, nn.LayerNorm)
    return x, norm.weight, None if rms else norm.bias, *(modulation or (None, None)), norm.eps, rms


def _fuses(layer: nn.Module, x: Tensor, modulation: Tensor) -> bool:
    """Whether kernels/head.py is for this: a modulation for every row, and few rows."""
    return isinstance(layer, Linear) and layer.bias is not None and _each_of_few(x, modulation)


def _fuses_in_int8(wide: nn.Module, narrow: nn.Module, x: Tensor, modulation: Tensor) -> bool:
    """The same of kernels/head_int8.py; the fewest rows as well, though it rounds them: one launch, not two."""
    fits = _hands_over(wide, narrow) and narrow.group == 1 and wide.in_features % GROUP == 0
    return fits and _each_of_few(x, modulation)


def _each_of_few(x: Tensor, modulation: Tensor) -> bool:
    return x.dim() == 2 and x.shape == modulation.shape and len(x) <= FUSED_ROWS


def _hands_over(wide: nn.Module, narrow: nn.Module) -> bool:
    """Whether what is between these layers can be whole numbers with a scale for each group of columns."""
    fits = isinstance(wide, Int8Linear) and isinstance(narrow, Int8Linear) and wide.group == 1
    return fits and narrow.group in (1, GROUP) and narrow.in_features % GROUP == 0


def _outputs(layer: nn.Module, x: Tensor, rows: slice) -> Tensor:
    """These outputs of layer(x)."""
    if rows == ALL:
        return layer(x)
    if isinstance(layer, Linear):
        return linear(x, layer.weight[rows], None if layer.bias is None else layer.bias[rows])
    return layer(x)[..., rows]


def _activated(x: Tensor, act: str) -> Tensor:
    return swiglu(x) if act == "swiglu" else activated(x, act)
