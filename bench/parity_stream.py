"""The language model's residual stream as records have it, whichever basis a model keeps it in.

An int8 model keeps x Q in place of x, and its last norm has no gain (quant/rotate.py): M = Q^T diag(gain) Q is what
then stands between that norm and the logits.
"""

import torch
from torch import Tensor, nn
from unipic_run.quant.rotate import RotatedEmbedding, rotate


class Stream:
    """All take (..., D) and return the same shape and dtype; where nothing is rotated, x itself."""

    def __init__(self, model: nn.Module) -> None:
        table = model.embed
        self.turned, self.width = isinstance(table, RotatedEmbedding), table.embedding_dim
        if self.turned:
            self.q = rotate(torch.eye(table.embedding_dim, dtype=torch.float64))
            self.m = table.mix.detach().cpu().double()

    def inner(self, x: Tensor) -> Tensor:
        """What the model has where a record has x in the stream."""
        return _product(x, self.q) if self.turned else x

    def plain(self, x: Tensor) -> Tensor:
        """What a record has where the model has x in the stream."""
        return _product(x, self.q.T) if self.turned else x

    def plain_taps(self, x: Tensor) -> Tensor:
        """`plain` of the stream behind several layers, side by side: x (..., taps * D)."""
        return self.plain(x.unflatten(-1, (-1, self.width))).flatten(-2)

    def inner_taps(self, x: Tensor) -> Tensor:
        return self.inner(x.unflatten(-1, (-1, self.width))).flatten(-2)

    def plain_normed(self, x: Tensor) -> Tensor:
        """`plain` of what the last norm returns."""
        return _product(x, self.m @ self.q.T) if self.turned else x

    def inner_normed(self, x: Tensor) -> Tensor:
        """What the model's last norm returns where a record has x."""
        return _product(x, self.q @ self.m.inverse()) if self.turned else x


def _product(x: Tensor, matrix: Tensor) -> Tensor:
    return (x.double() @ matrix.to(x.device)).to(x.dtype)
