"""How weights cross the bus: packs in the memory of the host, berths on the card, two streams and their events.

Weights never change, so leaving the card is forgetting the copy there. Where they are not on the card, a module's
tensors are on the meta device: using them fails.

Two streams work side by side: `compute`, the caller's, and `copy`. All memory is taken from the allocator and given
back in the order of `compute`. That makes three rules enough, and the host never waits:

    a copy begins when all that was computed so far is done with the memory it writes      Berth.load
    computing goes on when the copy of what it reads is done                               Berth.show
    memory is given back when the copy into it is done                                     Berth.free
"""

import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .errors import UnipicWarning

ALIGN = 512  # bytes, of each tensor in a buffer, as the allocator does it
LEAST_PIECE = 2**20  # bytes; what is smaller is pinned as it is

Lane = Literal["compute", "copy"]


class Lanes:
    """Streams, events and copies of a device: here of one that does everything at once, the CPU or meta."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.host = torch.device("meta" if device.type == "meta" else "cpu")  # where weights are that left the device

    def empty(self, nbytes: int) -> Tensor:
        """Memory on the device, in the order of `compute`."""
        return torch.empty(nbytes, dtype=torch.uint8, device=self.device)

    def pieces(self, nbytes: int) -> list[Tensor]:
        """Memory of the host, from which copies need not be waited for."""
        return [torch.empty(nbytes, dtype=torch.uint8, device=self.host)]

    def copy(self, target: Tensor, source: Tensor) -> None:
        """Queue a copy of a piece to the device on `copy`."""
        if not source.is_meta:  # else a meter would count it
            target.copy_(source)

    def mark(self, lane: Lane) -> Any:
        """An event: all that is queued on the lane so far is done."""

    def wait(self, lane: Lane, event: Any) -> None:
        """What is queued on the lane from now on begins after the event."""


class CudaLanes(Lanes):
    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.side = torch.cuda.Stream(device)
        self.pins = True  # until the system refuses

    def pieces(self, nbytes: int) -> list[Tensor]:
        """Pinned, or all but pinned; torch rounds such memory up to a power of two, so it is asked for in these."""
        sizes = []
        while left := nbytes - sum(sizes):
            sizes.append(left if left <= LEAST_PIECE else 1 << left.bit_length() - 1)
        return [self._piece(size) for size in sizes]

    def _piece(self, nbytes: int) -> Tensor:
        """Where the system pins no more, ordinary memory: a copy from there is right as well, but the host waits."""
        if self.pins:
            try:
                return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
            except (RuntimeError, MemoryError) as error:
                self.pins = False
                why = str(error).partition("\n")[0] or type(error).__name__
            text = f"no more memory can be pinned ({why}): other weights wait in ordinary memory, and come more slowly"
            warnings.warn(text, UnipicWarning, stacklevel=2)
        return torch.empty(nbytes, dtype=torch.uint8)

    def copy(self, target: Tensor, source: Tensor) -> None:
        with torch.cuda.stream(self.side):
            target.copy_(source, non_blocking=True)

    def mark(self, lane: Lane) -> torch.cuda.Event:
        event = torch.cuda.Event()
        event.record(self._stream(lane))
        return event

    def wait(self, lane: Lane, event: torch.cuda.Event) -> None:
        self._stream(lane).wait_event(event)

    def _stream(self, lane: Lane) -> torch.cuda.Stream:
        return self.side if lane == "copy" else torch.cuda.current_stream(self.device)


def lanes(device: torch.device) -> Lanes:
    return CudaLanes(device) if device.type == "cuda" else Lanes(device)


@dataclass(frozen=True)
class Place:
    """Where a tensor belongs: in its module, and in the bytes of its pack."""

    owner: dict[str, Any]  # a module's parameters or buffers
    name: str
    away: Tensor  # the same on the meta device
    start: int

    def read(self, room: Tensor) -> Tensor:
        """The tensor in the bytes of a pack."""
        like, size = self.away, self.away.nbytes
        found = room[self.start : self.start + size].view(like.dtype).view(like.shape)
        return nn.Parameter(found, requires_grad=False) if isinstance(like, nn.Parameter) else found


class Pack:
    """The tensors of some modules, which leave them for the memory of the host."""

    def __init__(self, modules: Iterable[nn.Module], lanes: Lanes) -> None:
        tensors, self.lanes = list(tensors_of(modules)), lanes
        *starts, self.nbytes = accumulate((room_of(tensor) for *_, tensor in tensors), initial=0)
        self.pieces = lanes.pieces(self.nbytes)
        self.places = []
        for start, (owner, name, tensor) in zip(starts, tensors, strict=True):
            self._store(start, tensor.detach().contiguous().flatten().view(torch.uint8))
            away = torch.empty_like(tensor, device="meta", memory_format=torch.contiguous_format)
            is_parameter = isinstance(tensor, nn.Parameter)
            away = nn.Parameter(away, requires_grad=False) if is_parameter else away
            self.places.append(Place(owner, name, away, start))
        self.hide()

    def _store(self, start: int, raw: Tensor) -> None:
        for at, piece in self._where():
            first, last = max(start, at), min(start + len(raw), at + len(piece))
            if first < last:
                piece[first - at : last - at].copy_(raw[first - start : last - start])

    def _where(self) -> Iterator[tuple[int, Tensor]]:
        return zip(accumulate(map(len, self.pieces), initial=0), self.pieces, strict=False)

    def load(self, room: Tensor) -> None:
        """Queue copies of everything into room (nbytes)."""
        for at, piece in self._where():
            self.lanes.copy(room[at : at + len(piece)], piece)

    def read(self, room: Tensor) -> list[Tensor]:
        return [place.read(room) for place in self.places]

    def show(self, tensors: Sequence[Tensor]) -> None:
        for place, tensor in zip(self.places, tensors, strict=True):
            place.owner[place.name] = tensor

    def hide(self) -> None:
        self.show([place.away for place in self.places])

    def settle(self, device: torch.device) -> None:
        """Give the modules their tensors for good."""
        room = torch.empty(self.nbytes, dtype=torch.uint8, device=device)
        for at, piece in self._where():
            room[at : at + len(piece)].copy_(piece)
        self.show(self.read(room))


class Berth:
    """Room on the card for one pack at a time."""

    def __init__(self, lanes: Lanes, nbytes: int) -> None:
        self.lanes, self.room, self.copied, self.pack = lanes, lanes.empty(nbytes), lanes.mark("copy"), None
        self.tensors: dict[Pack, list[Tensor]] = {}  # made once: a stack goes through here many times

    @torch.inference_mode()  # may write whatever it was allocated in
    def load(self, pack: Pack) -> None:
        self.lanes.wait("copy", self.lanes.mark("compute"))
        self.pack = pack
        try:
            pack.load(self.room)
        finally:
            self.copied = self.lanes.mark("copy")

    def show(self) -> None:
        self.lanes.wait("compute", self.copied)
        if self.pack not in self.tensors:
            self.tensors[self.pack] = self.pack.read(self.room)
        self.pack.show(self.tensors[self.pack])

    def free(self) -> None:
        """To be called before it is forgotten."""
        self.lanes.wait("compute", self.copied)
        if self.pack is not None:
            self.pack.hide()


def tensors_of(modules: Iterable[nn.Module]) -> Iterator[tuple[dict[str, Any], str, Tensor]]:
    """Parameters and buffers of these modules alone, not of those inside them: owner, name, tensor."""
    for module in modules:
        for owner in (module._parameters, module._buffers):
            yield from ((owner, name, tensor) for name, tensor in owner.items() if tensor is not None)


def room_of(tensor: Tensor) -> int:
    """Bytes in a pack."""
    return -(-tensor.nbytes // ALIGN) * ALIGN
