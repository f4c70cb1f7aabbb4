"""Static key/value cache of one prompt, cut back to a prefix in O(1)."""

import torch
from torch import Tensor


class KVCache:
    """Keys and values (layers, K, capacity, d) of which the first `length` positions are valid."""

    def __init__(
        self, layers: int, heads: int, capacity: int, width: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.keys = torch.empty(layers, heads, capacity, width, dtype=dtype, device=device)
        self.values = torch.empty_like(self.keys)
        self.length = 0

    @property
    def capacity(self) -> int:
        return self.keys.shape[2]

    def prefix(self, layer: int) -> tuple[Tensor, Tensor]:
        """Valid keys and values of one layer, (K, length, d) views."""
        return self.keys[layer, :, : self.length], self.values[layer, :, : self.length]

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write k, v (K, L, d) behind the valid part and view both together, (K, length + L, d).

        `length` moves only with `advance`, once every layer has written.
        """
        end = self.length + k.shape[1]
        if end > self.capacity:
            raise ValueError(f"{end} positions do not fit a cache of {self.capacity}")
        self.keys[layer, :, self.length : end] = k
        self.values[layer, :, self.length : end] = v
        return self.keys[layer, :, :end], self.values[layer, :, :end]

    def advance(self, count: int) -> None:
        self.length += count

    def cut(self, length: int) -> None:
        """Forget everything from position `length` on."""
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot cut a cache of {self.length} positions to {length}")
        self.length = length

    def fork(self, capacity: int) -> "KVCache":
        """A new cache of `capacity` positions that starts with a copy of this one's valid part."""
        layers, heads, _, width = self.keys.shape
        copy = KVCache(layers, heads, capacity, width, self.keys.dtype, self.keys.device)
        copy.keys[:, :, : self.length] = self.keys[:, :, : self.length]
        copy.values[:, :, : self.length] = self.values[:, :, : self.length]
        copy.length = self.length
        return copy
