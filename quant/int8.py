"""Our 8-bit linear layer: weights with one scale an output channel, activations with one a token, both symmetric.

    W ~ q_W * s_W,  s_W = max |row of W| / 127        computed once, from float32
    x ~ q_x * s_x,  s_x = max |row of x| / 127        computed where x is made, in the kernel that makes it
    y = s_x (q_x q_W^T) s_W + b                       kernels/int8_linear.py

A few rows leave the tensor cores idle and only wait for the weight, so they keep their float values instead
(kernels/int8_weight.py): as fast, one kernel less, and more exact. Letters: K inputs, N outputs.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels.int8_linear import int8_linear
from ..kernels.int8_weight import MOST_ROWS, int8_weight_linear
from ..kernels.quantise import quantise, quantise_rows

FORMAT = 1  # of the tensors `weight` and `scale` in a file
ALL = slice(None)
_CHUNK = 2**22  # elements that are float32 at once while a weight is quantised


class Int8Linear(nn.Module):
    """y = x W^T + b with an int8 weight (N, K), its scale (N) float32, and a bias in the model's dtype.

    What comes after the product is done in its kernel: residual + gate * activation(y), as kernels/int8_linear.py says.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.register_buffer("weight", torch.empty(out_features, in_features, dtype=torch.int8))
        self.register_buffer("scale", torch.empty(out_features, dtype=torch.float32))
        self.bias = nn.Parameter(torch.empty(out_features), requires_grad=False) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """x (..., K) in any floating dtype to (..., N) in the same."""
        return self.of_values(x) if self.few(x) else self.of_whole(*quantise(x), x.dtype)

    def few(self, x: Tensor) -> bool:
        """Whether so many rows as x (..., K) has keep their values; a heuristic, never measured."""
        return x.numel() <= MOST_ROWS * x.shape[-1]

    def of_values(self, x: Tensor, rows: slice = ALL, **after: Any) -> Tensor:
        """Of few rows x (..., K). `rows`: which outputs; `after`: activation, residual, gate."""
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


def quantise_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(int8 (N, K), scale (N) float32) of a floating weight (N, K)."""
    whole = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    scale = torch.empty(len(weight), dtype=torch.float32, device=weight.device)
    rows = max(1, _CHUNK // weight.shape[1])
    for part in (slice(at, at + rows) for at in range(0, len(weight), rows)):
        whole[part], scale[part] = quantise_rows(weight[part])
    return whole, scale
