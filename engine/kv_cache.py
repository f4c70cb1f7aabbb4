"""Static key/value cache of one prompt, cut back to a prefix in O(1)."""

import torch
from torch import Tensor


class KVCache:
    """Keys and values of one text, behind those of an optional shared `base` (a picture that several prompts speak of).

    Own keys and values are (layers, K, capacity, d), valid up to `own`. The base is only read and must not change
    meanwhile. Writing is in place, so nothing can be trained through `extend`.
    """

    def __init__(
        self,
        layers: int,
        heads: int,
        capacity: int,
        width: int,
        dtype: torch.dtype,
        device: torch.device,
        base: "KVCache | None" = None,
    ) -> None:
        self.keys = torch.empty(layers, heads, capacity, width, dtype=dtype, device=device)
        self.values = torch.empty_like(self.keys)
        self.base, self.own = base, 0

    @property
    def length(self) -> int:
        """Valid positions, those of the base included."""
        return self.own + (self.base.length if self.base else 0)

    def prefix(self, layer: int) -> tuple[Tensor, Tensor]:
        """Valid keys and values of one layer, (K, length, d); views, unless a base has to be put in front."""
        return self._upto(layer, self.own)

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write k, v (K, L, d) behind the valid part and return both together, (K, length + L, d).

        `length` moves only with `advance`, once every layer has written.
        """
        end, capacity = self.own + k.shape[1], self.keys.shape[2]
        if end > capacity:
            raise ValueError(f"{end} positions do not fit a cache of {capacity}")
        self.keys[layer, :, self.own : end] = k
        self.values[layer, :, self.own : end] = v
        return self._upto(layer, end)

    def advance(self, count: int) -> None:
        self.own += count

    def cut(self, length: int) -> None:
        """Forget everything from position `length` on, which must not lie in the base."""
        own = length - (self.length - self.own)
        if not 0 <= own <= self.own:
            raise ValueError(f"cannot cut a cache of {self.own} own and {self.length} positions to {length}")
        self.own = own

    def _upto(self, layer: int, end: int) -> tuple[Tensor, Tensor]:
        keys, values = self.keys[layer, :, :end], self.values[layer, :, :end]
        if self.base is None:
            return keys, values
        before = self.base.prefix(layer)
        return torch.cat([before[0], keys], dim=1), torch.cat([before[1], values], dim=1)
