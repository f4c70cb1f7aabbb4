"""The random streams of one image, named; and a Tape that replays recorded randomness instead.

A value depends on (seed, stream, position, step) only: not on batch size, device, or how many rounds there are.
"""

from collections.abc import Mapping, Sequence
from enum import IntEnum
from typing import Protocol

import torch
from torch import Tensor

from ..kernels.philox import WORD, normals, philox, uniform

Shape = Sequence[int]


class Stream(IntEnum):
    """Third word of the Philox counter. Numbers are part of every saved seed: never renumber."""

    ORDER = 0
    HEAD_START = 1
    HEAD_STEP = 2
    FLOW_START = 3
    POSTERIOR = 4
    TEXT = 5


class Noise(Protocol):
    """Randomness of one image. `key`: the counter's, two 32-bit words, or None where all of it is recorded.

    A family asks for what it uses; a recording has what the recorded family has used.
    """

    key: tuple[int, int] | None

    def order(self, count: int) -> Tensor:
        """A permutation of 0 .. count-1, int64 on the CPU."""

    def head_start(self, index: int, positions: Tensor, channels: int) -> Tensor:
        """Start of the head's denoising in round `index` at raster positions (N): (N, channels) float32."""

    def head_steps(self, index: int, positions: Tensor, channels: int, steps: int) -> Tensor:
        """Noise of every denoising step, in the order taken: (steps, N, channels) float32."""

    def flow_start(self, shape: Shape, device: torch.device) -> Tensor:
        """Where flow matching starts: (channels, h, w) float32."""

    def posterior(self, index: int, shape: Shape, device: torch.device) -> Tensor:
        """What the latents of source picture `index` are drawn with: (channels, h, w) float32."""


class PhiloxNoise:
    """The engine's own randomness, from a 64-bit seed."""

    def __init__(self, seed: int) -> None:
        self.key = (seed & WORD, seed >> 32)

    def order(self, count: int) -> Tensor:
        w0, w1, _, _ = self.words(torch.arange(count), torch.zeros(1, dtype=torch.int64), Stream.ORDER)
        return ((w0 << 31) | (w1 >> 1)).argsort(stable=True)  # 63 random bits to sort by

    def head_start(self, index: int, positions: Tensor, channels: int) -> Tensor:
        return self.normal(Stream.HEAD_START, positions, channels, 1)[0]

    def head_steps(self, index: int, positions: Tensor, channels: int, steps: int) -> Tensor:
        return self.normal(Stream.HEAD_STEP, positions, channels, steps)

    def flow_start(self, shape: Shape, device: torch.device) -> Tensor:
        return self.map(Stream.FLOW_START, 0, shape, device)

    def posterior(self, index: int, shape: Shape, device: torch.device) -> Tensor:
        return self.map(Stream.POSTERIOR, index, shape, device)

    def map(self, stream: Stream, step: int, shape: Shape, device: torch.device) -> Tensor:
        """(channels, h, w) float32; positions are raster positions, so a value depends on the map's width too."""
        channels, height, width = shape
        positions = torch.arange(height * width, device=device)
        return self.normal(stream, positions, channels, 1, first=step)[0].T.unflatten(1, (height, width))

    def uniform(self, stream: Stream, step: int) -> float:
        """One number in (0, 1]."""
        zero = torch.zeros(1, dtype=torch.int64)
        return uniform(self.words(zero, zero + step, stream)[0]).item()

    def normal(self, stream: Stream, positions: Tensor, channels: int, steps: int, first: int = 0) -> Tensor:
        """(steps, N, channels): four channels a counter, counter (position * groups + group, step, stream, 0)."""
        groups = -(-channels // 4)
        group = torch.arange(groups, device=positions.device)
        element = positions[:, None] * groups + group  # (N, groups)
        step = torch.arange(first, first + steps, device=positions.device)[:, None, None]
        return normals(self.words(element, step, stream)).flatten(2)[..., :channels]

    def words(self, element: Tensor, step: Tensor, stream: Stream) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        element, step = torch.broadcast_tensors(element, step)
        return philox(self.key, (element, step, torch.full_like(element, stream), torch.zeros_like(element)))


class Tape:
    """Recorded randomness of one image, for replaying a reference run."""

    key = None

    def __init__(self, order: Tensor, starts: Mapping[int, Tensor], steps: Mapping[int, Tensor]) -> None:
        """order (M) int64; starts[round] (N, C); steps[round] (steps, N, C) in the order they were drawn."""
        if not torch.equal(order.sort().values, torch.arange(len(order))):
            raise ValueError(f"a tape's order must be a permutation of 0 .. {len(order) - 1}")
        self._order, self._starts, self._steps = order, starts, steps

    def order(self, count: int) -> Tensor:
        if len(self._order) != count:
            raise ValueError(f"the tape's order has {len(self._order)} tokens, the request {count}")
        return self._order

    def head_start(self, index: int, positions: Tensor, channels: int) -> Tensor:
        shape = len(positions), channels
        return _recorded(self._starts, index, shape, f"round {index}").to(positions.device)

    def head_steps(self, index: int, positions: Tensor, channels: int, steps: int) -> Tensor:
        shape = steps, len(positions), channels
        return _recorded(self._steps, index, shape, f"round {index}").to(positions.device)


class FlowTape:
    """The same of a family that matches flows."""

    key = None

    def __init__(self, start: Tensor, posteriors: Sequence[Tensor] = ()) -> None:
        """start (channels, h, w); posteriors[index] (channels, h, w) of each source picture."""
        self._maps = {"start": start} | dict(enumerate(posteriors))

    def flow_start(self, shape: Shape, device: torch.device) -> Tensor:
        return _recorded(self._maps, "start", tuple(shape), "the start").to(device)

    def posterior(self, index: int, shape: Shape, device: torch.device) -> Tensor:
        return _recorded(self._maps, index, tuple(shape), f"source picture {index}").to(device)


def _recorded(tensors: Mapping[int | str, Tensor], index: int | str, shape: tuple[int, ...], what: str) -> Tensor:
    if index not in tensors or tensors[index].shape != shape:
        found = tuple(tensors[index].shape) if index in tensors else "nothing"
        raise ValueError(f"the tape holds {found} for {what}, the request needs {shape}")
    return tensors[index]
