"""Static key/value cache of one prompt, cut back to a prefix in O(1); and the caches of a batch side by side."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Self

import torch
from torch import Tensor

ROUNDED = 64  # positions to which the room for prompts is rounded, so that other prompts may fit the same graph


class KVCache:
    """Keys and values of one text, behind those of an optional shared `base` (a picture that several prompts speak of).

    Own keys and values are (layers, K, capacity, d), valid up to `own`. The base is only read and must not change
    meanwhile. Writing is in place, so nothing can be trained through `extend`.
    """

    def __init__(self, keys: Tensor, values: Tensor, base: "KVCache | None" = None) -> None:
        if base is not None and base.base is not None:
            raise ValueError("the base of a cache has a base itself")
        self.keys, self.values, self.base, self.own = keys, values, base, 0

    @classmethod
    def empty(
        cls,
        layers: int,
        heads: int,
        capacity: int,
        width: int,
        dtype: torch.dtype,
        device: torch.device,
        base: "KVCache | None" = None,
    ) -> Self:
        shape, kind = (layers, heads, capacity, width), {"dtype": dtype, "device": device}
        return cls(torch.empty(shape, **kind), torch.empty(shape, **kind), base)

    @property
    def length(self) -> int:
        """Valid positions, those of the base included."""
        return self.own + (self.base.length if self.base else 0)

    @property
    def position(self) -> int:
        """Of the next token."""
        return self.length

    def room(self, layer: int, count: int) -> tuple[Tensor, Tensor]:
        """Where the next `count` keys and values of a layer belong: two views (1, K, count, d) to be written to.

        `length` moves only with `advance`, once every layer has written.
        """
        here = slice(self.own, self._end(count))
        return self.keys[layer, None, :, here], self.values[layer, None, :, here]

    def next(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What `Qwen2.step` takes with the next token: position, keys and values, valid ones; without a base."""
        if self.base is not None:
            raise ValueError("a cache with a base is not continued token by token")
        device = self.keys.device
        lengths = torch.full((1,), self._end(1), dtype=torch.int32, device=device)
        return torch.full((1, 1), self.position, device=device), self.keys, self.values, lengths

    def _end(self, count: int) -> int:
        end, capacity = self.own + count, self.keys.shape[2]
        if end > capacity:
            raise ValueError(f"{end} positions do not fit a cache of {capacity}")
        return end

    def upto(self, layer: int, ahead: int) -> tuple[Tensor, Tensor]:
        """Valid keys and values of a layer and `ahead` more, (K, length + ahead, d); views where there is no base."""
        keys, values = (x[layer, :, : self.own + ahead] for x in (self.keys, self.values))
        if self.base is None:
            return keys, values
        before = self.base.upto(layer, 0)
        return torch.cat([before[0], keys], dim=1), torch.cat([before[1], values], dim=1)

    def advance(self, count: int) -> None:
        self.own += count

    def cut(self, length: int) -> None:
        """Forget everything from position `length` on, which must not lie in the base."""
        own = length - (self.length - self.own)
        if not 0 <= own <= self.own:
            raise ValueError(f"cannot cut a cache of {self.own} own and {self.length} positions to {length}")
        self.own = own

    def copy_to(self, keys: Tensor, values: Tensor) -> None:
        """Copy all that is valid to the front of keys and values, (layers, K, at least length, d)."""
        if self.base:
            self.base.copy_to(keys, values)
        here = slice(self.length - self.own, self.length)
        keys[:, :, here] = self.keys[:, :, : self.own]
        values[:, :, here] = self.values[:, :, : self.own]


@dataclass(frozen=True)
class Prompts:
    """The caches that R rows continue, as kernels/prefix_attention.py reads them.

    `runs`: (prompt, rows, length) of consecutive rows that share a prompt. `prefix_of` and `lengths` say the same on
    the device.
    """

    keys: Tensor  # (layers, P, K, capacity, d)
    values: Tensor
    prefix_of: Tensor  # (R) int32
    lengths: Tensor  # (P) int32
    runs: tuple[tuple[int, int, int], ...]

    @classmethod
    def of(cls, rows: Sequence[tuple[KVCache, int]]) -> "Prompts":
        """From (cache, number of consecutive rows) in row order. A lone cache is taken as it is, others are copied."""
        caches = list(dict.fromkeys(cache for cache, _ in rows))
        runs = [(caches.index(cache), count, cache.length) for cache, count in rows]
        first, lengths = caches[0], [cache.length for cache in caches]
        if len(caches) == 1 and first.base is None:
            keys, values = first.keys[:, None], first.values[:, None]
        else:
            layers, heads, _, width = first.keys.shape
            capacity = -(-max(lengths) // ROUNDED) * ROUNDED
            keys = first.keys.new_empty(layers, len(caches), heads, capacity, width)
            values = torch.empty_like(keys)
            for slot, cache in enumerate(caches):
                cache.copy_to(keys[:, slot], values[:, slot])
        owners = [prompt for prompt, count, _ in runs for _ in range(count)]
        prefix_of, lengths = (torch.tensor(x, dtype=torch.int32, device=keys.device) for x in (owners, lengths))
        return cls(keys, values, prefix_of, lengths, tuple(runs))

    def first(self, rows: int) -> "Prompts":
        """Of the first rows alone; the caches are the same."""
        runs, left = [], rows
        for prompt, count, length in self.runs:
            if left > 0:
                runs.append((prompt, min(count, left), length))
            left -= count
        return replace(self, prefix_of=self.prefix_of[:rows], runs=tuple(runs))

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.keys, self.values, self.prefix_of, self.lengths

    def of_layer(self, layer: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The same of one layer, keys and values (P, K, capacity, d)."""
        return self.keys[layer], self.values[layer], self.prefix_of, self.lengths

    @cached_property
    def starts(self) -> Tensor:
        """Position (R, 1) int64 at which each row goes on."""
        return self.lengths.long()[self.prefix_of.long()][:, None]

    def positions(self, count: int) -> Tensor:
        """Of the next `count` tokens of every row, (R, count) int64."""
        return self.starts + torch.arange(count, device=self.starts.device)
