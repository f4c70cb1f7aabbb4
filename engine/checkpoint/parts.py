"""What our tensors are made of: parts of a released checkpoint, read one at a time, changed and joined.

A part has the name that an error tells, `dtype` and `shape` of what `read` returns, and nothing in memory before that.
What a formula gives is one, too.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..errors import CorruptWeightsError
from .json_files import DOWNLOAD_AGAIN
from .pickle_reader import TensorRecord, TorchCheckpoint
from .safe_files import SafeFiles, SafeRecord

Shape = tuple[int, ...]
CHUNK = 2**24  # elements of a merged weight that are float32 at once


class Part(Protocol):
    @property
    def name(self) -> str: ...
    @property
    def dtype(self) -> torch.dtype | None: ...
    @property
    def shape(self) -> Shape: ...
    def read(self) -> Tensor: ...


class Stored(NamedTuple):
    """A tensor as it lies in a file."""

    file: TorchCheckpoint | SafeFiles
    record: TensorRecord | SafeRecord

    @property
    def name(self) -> str:
        return self.record.name

    @property
    def dtype(self) -> torch.dtype | None:
        return self.record.dtype

    @property
    def shape(self) -> Shape:
        return self.record.shape

    def read(self) -> Tensor:
        return self.file.read(self.record)


@dataclass(frozen=True)
class Shaped:
    """A part whose values are kept, under another shape of as many elements."""

    part: Part
    shape: Shape

    @property
    def name(self) -> str:
        return self.part.name

    @property
    def dtype(self) -> torch.dtype | None:
        return self.part.dtype

    def read(self) -> Tensor:
        return self.part.read().reshape(self.shape)


class Padded(Shaped):
    """With zeros behind it, up to `shape`."""

    def read(self) -> Tensor:
        values = self.part.read()
        padded = values.new_zeros(self.shape)
        padded[tuple(map(slice, values.shape))] = values
        return padded


class Centre(Shaped):
    """The middle of its first dimensions; as much is cut off on both sides, or one more behind."""

    def read(self) -> Tensor:
        values = self.part.read()
        for dim, (size, wanted) in enumerate(zip(values.shape, self.shape, strict=True)):
            values = values.narrow(dim, (size - wanted) // 2, wanted)
        return values


@dataclass(frozen=True)
class Merged:
    """A weight W (N, K) with a low-rank update (arXiv 2106.09685): W + scale B A, B (N, r), A (r, K).

    The arithmetic is float32, and the sum is rounded once, to W's type. `transposed`: the update is (B A)^T instead, as
    for a table whose rows are looked up.
    """

    weight: Part
    a: Part
    b: Part
    scale: float
    transposed: bool

    @property
    def name(self) -> str:
        return self.weight.name

    @property
    def dtype(self) -> torch.dtype | None:
        return self.weight.dtype

    @property
    def shape(self) -> Shape:
        return self.weight.shape

    def read(self) -> Tensor:
        weight, a, b = self.weight.read(), self.a.read().float(), self.b.read().float()
        left, right = (a.T, b.T) if self.transposed else (b, a)
        merged = torch.empty_like(weight)
        rows = max(1, CHUNK // math.prod(self.shape[1:]))
        for into, part, factor in zip(merged.split(rows), weight.split(rows), left.split(rows), strict=True):
            into.copy_(torch.addmm(part.float(), factor, right, alpha=self.scale))
        return merged


@dataclass(frozen=True)
class Sinusoids:
    """Positions of a square of side x side places as waves (arXiv 1706.03762, 2111.06377): (1, side side, D) float32.

    The first half of the channels tells the column, the second the row. A half is [sin(p w), cos(p w)] with
    w_i = 10000^(-i / (D/4)) and p = index * base / side: the square spans `base` places, whatever its own side is.
    """

    name: str
    side: int
    base: int
    width: int  # D, a multiple of 4

    dtype = torch.float32

    @property
    def shape(self) -> Shape:
        return 1, self.side**2, self.width

    def read(self) -> Tensor:
        quarter = self.width // 4
        w = 10000.0 ** -(torch.arange(quarter, dtype=torch.float64) / quarter)
        angle = torch.arange(self.side)[:, None] * self.base / self.side * w  # (side, D/4)
        axis = torch.cat([angle.sin(), angle.cos()], dim=-1).float()
        both = [x.expand(self.side, self.side, -1) for x in (axis, axis[:, None])]  # by column, by row
        return torch.cat(both, dim=-1).view(self.shape)


@dataclass(frozen=True)
class ReleasedTensor:
    """One of our tensors: its parts, joined along dimension 0, in the widest of their types."""

    dtype: torch.dtype
    shape: Shape
    parts: tuple[Part, ...]


def joined(name: str, parts: Sequence[Part]) -> ReleasedTensor:
    """Raises CorruptWeightsError if the parts do not go together."""
    first = parts[0]
    floating = all(part.dtype is not None and part.dtype.is_floating_point for part in parts)
    if not floating or not all(part.shape and part.shape[1:] == first.shape[1:] for part in parts):
        what = f"the parts of {name} differ in shape, or are not floating"
        raise CorruptWeightsError(what, DOWNLOAD_AGAIN)
    shape = (sum(part.shape[0] for part in parts), *first.shape[1:]) if len(parts) > 1 else first.shape
    return ReleasedTensor(functools.reduce(torch.promote_types, (part.dtype for part in parts)), shape, tuple(parts))
