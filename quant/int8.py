"""Our 8-bit linear layer: weights with one scale an output channel, activations with one a token, both symmetric.

    W ~ q_W * s_W,  s_W = max |row of W| / 127        computed once, from float32
    x ~ q_x * s_x,  s_x = max |row of x| / 127        computed where x is made, in the kernel that makes it
    y = s_x (q_x q_W^T) s_W + b                       kernels/int8_linear.py

Between the two layers of an MLP s_x is one for each 128 columns of a token (kernels/int8_to_groups.py).

Where no rotation can be folded into what makes x, a layer may have x R and W R in their place: R mixes `group` columns
at a time and spreads their outliers (kernels/quantise.py). Of the inputs of a language model's `down`, 8960 products of
two factors, it takes the error from 3.0 % to 1.3 %, and with four channels x30 or x100 from 10 and 11 % to about 2 %.

A few rows leave the tensor cores idle and only wait for the weight, so they keep their float values instead
(kernels/int8_weight.py): as fast, one kernel less, and more exact. Letters: K inputs, N outputs.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels.int8_linear import int8_linear
from ..kernels.int8_weight import MOST_ROWS, int8_weight_linear
from ..kernels.quantise import quantise, quantise_torch, rotated

FORMAT = 2  # of the tensors `weight` and `scale` in a file; since 2 a recipe's `rotated_inputs` are rotated
ALL = slice(None)
_CHUNK = 2**22  # elements that are float32 at once while a weight is quantised


class Int8Linear(nn.Module):
    """y = x W^T + b with an int8 weight (N, K), its scale (N) float32, and a bias in the model's dtype.

    What comes after the product is done in its kernel: residual + gate * activation(y), as kernels/int8_linear.py says.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True, group: int = 1) -> None:
        """`group`: the columns of x that are mixed, 1 where x stays as it is."""
        super().__init__()
        self.in_features, self.out_features, self.group = in_features, out_features, group
        self.register_buffer("weight", torch.empty(out_features, in_features, dtype=torch.int8))
        self.register_buffer("scale", torch.empty(out_features, dtype=torch.float32))
        self.bias = nn.Parameter(torch.empty(out_features), requires_grad=False) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """x (..., K) in any floating dtype to (..., N) in the same."""
        if self.few(x):
            return self.of_values(x if self.group == 1 else rotated(x, "none", self.group))
        return self.of_whole(*quantise(x, "none", self.group), x.dtype)

    def few(self, x: Tensor) -> bool:
        """Whether so many rows as x (..., K) has keep their values; a heuristic, never measured."""
        return x.numel() <= MOST_ROWS * x.shape[-1]

    def of_values(self, x: Tensor, rows: slice = ALL, **after: Any) -> Tensor:
        """Of few rows x (..., K), or x R. `rows`: which outputs are wanted; `after`: activation, residual, gate."""
        return int8_weight_linear(x, *self.part(rows), **after)

    def of_whole(self, x: Tensor, x_scale: Tensor, dtype: torch.dtype, rows: slice = ALL, **after: Any) -> Tensor:
        """The same of quantised rows x (..., K) int8, x_scale (...) float32, in `dtype`."""
        return int8_linear(x, x_scale, *self.part(rows), dtype=dtype, **after)

    def part(self, rows: slice) -> tuple[Tensor, Tensor, Tensor | None]:
        """Weight, scale and bias of some outputs, in the same memory."""
        return self.weight[rows], self.scale[rows], None if self.bias is None else self.bias[rows]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Int8Linear":
        scale = self.scale
        super()._apply(fn, recurse)
        if self.scale.dtype != torch.float32:  # a model may become bfloat16, its scales may not
            self.scale = self.scale.float() if scale.is_meta else scale.to(self.scale.device)
        return self


def quantise_weight(weight: Tensor, group: int = 1) -> tuple[Tensor, Tensor]:
    """(int8 (N, K), scale (N) float32) of a floating weight (N, K), for a layer with such a `group`."""
    whole = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    scale = torch.empty(len(weight), dtype=torch.float32, device=weight.device)
    rows = max(1, _CHUNK // weight.shape[1])
    for part in (slice(at, at + rows) for at in range(0, len(weight), rows)):
        whole[part], scale[part] = quantise_torch(weight[part], "none", group)
    return whole, scale
