"""Carries a placement out on a model: the only code that moves weights.

    mover = Mover(model, lanes(device))
    mover.place(placement)              # between requests: what is resident comes, all else leaves
    with mover.running():               # whatever happens inside, what was there before is there again
        mover.enter("sample")           # what the stage needs comes, what it does not need goes

How, and why nothing is used before it is there, is written in `transfer.py`.
"""

from collections import deque
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from ..quant.bnb import is_packed
from .residency import Part, Placement, Where
from .transfer import Berth, Lanes, Pack, room_of, tensors_of


class StreamedLayers(nn.ModuleList):
    """A stack to be gone through layer by layer, any number of times, one pass at a time; it has no slices.

    Of two berths one holds the layer that is computed while the next one comes to the other. Behind the last layer
    comes the first. A pass that ends with the first layer has moved nothing: the next one finds it where it is.
    """

    def __init__(self, layers: nn.ModuleList, packs: Sequence[Pack], lanes: Lanes) -> None:
        super().__init__(layers)
        self.packs, self.lanes = packs, lanes
        self.berths: list[Berth] = []
        self.coming: deque[tuple[int, Berth]] = deque()

    __repr__ = nn.Module.__repr__  # which does not go through the layers

    def __getitem__(self, index: Any) -> nn.Module:
        raise TypeError("streamed layers come one by one: go through them from the first to the last")

    def __iter__(self) -> Iterator[nn.Module]:
        if not self.berths:
            raise RuntimeError("streamed layers are used in a stage that does not bring them")
        if len(self.coming) < 2 or self.coming[0][0] != 0:  # the pass before was given up
            self._begin()
        for layer in self._modules.values():
            index, berth = self.coming[0]
            berth.show()
            yield layer
            berth.pack.hide()
            self.coming.popleft()
            self._call((index + 2) % len(self), berth)

    def arrive(self) -> None:
        nbytes = max(pack.nbytes for pack in self.packs)
        self.berths = [Berth(self.lanes, nbytes) for _ in range(2)]
        self._begin()

    def leave(self) -> None:
        for berth in self.berths:
            berth.free()
        self.coming.clear()
        self.berths.clear()

    def _begin(self) -> None:
        for pack in self.packs:
            pack.hide()
        self.coming.clear()
        for index, berth in enumerate(self.berths):
            self._call(index, berth)

    def _call(self, index: int, berth: Berth) -> None:
        berth.load(self.packs[index])
        self.coming.append((index, berth))


class Guest:
    """A part that is on the card for a while: all of it or, given the layers of its stack, two of them at a time."""

    def __init__(self, packs: Sequence[Pack], lanes: Lanes, layers: StreamedLayers | None = None) -> None:
        self.packs, self.lanes, self.layers = packs, lanes, layers
        self.berths: list[Berth] = []

    def arrive(self) -> None:
        """Where it fails, `leave` sets it right."""
        for pack in self.packs:
            self.berths.append(Berth(self.lanes, pack.nbytes))
            self.berths[-1].load(pack)
        if self.layers is not None:
            self.layers.arrive()

    def show(self) -> None:
        for berth in self.berths:
            berth.show()

    def leave(self) -> None:
        if self.layers is not None:
            self.layers.leave()
        for berth in self.berths:
            berth.free()
        self.berths.clear()


class Mover:
    """The weights of one model. A part stays on the card as long as somebody holds one of its tensors."""

    def __init__(
        self,
        model: nn.Module,
        lanes: Lanes,
        on_leave: Callable[[str], None] = lambda part: None,
        reread: Callable[[str], None] | None = None,
    ) -> None:
        """Until the first `place` everything stays where it is. `on_leave` hears whose addresses are void.

        `reread(part)` fills a part anew, in the memory of the host: with it, idle parts are not kept there.
        """
        self.model, self.lanes, self.on_leave, self.reread = model, lanes, on_leave, reread
        self.stage: str | None = None
        self.placement: Placement | None = None
        self.packs: dict[str, list[Pack]] = {}  # of the parts that left; the second and all later ones are layers
        self.guests: dict[str, Guest] = {}
        self.here: list[str] = []  # guests that are on the card, or are coming
        self.dropped: set[str] = set()
        self._undo: dict[str, list[Callable[[], None]]] = {}

    def place(self, placement: Placement) -> None:
        """Where it fails nothing is lost, and it can be called again with another placement."""
        self.leave()
        self.placement = None
        turns = {"idle": 0, "resident": 2}  # those that leave their memory go first
        for name, part in sorted(self.model.named_children(), key=lambda one: turns.get(placement.where[one[0]], 1)):
            self._settle(name, part, placement.where[name])
        self.placement = placement

    def forget(self, names: Iterable[str]) -> None:
        """Parts that are about to be filled anew, in the memory of the host; the model then needs another placement."""
        self.leave()
        self.placement = None
        for name in names:
            self._release(name)
            self.packs.pop(name, None)
            self.dropped.discard(name)

    def _release(self, name: str) -> None:
        """The part's own layers and forward pass again."""
        self.guests.pop(name, None)
        for undo in self._undo.pop(name, ()):
            undo()

    def _settle(self, name: str, part: nn.Module, where: Where) -> None:
        self._release(name)
        if where == "idle" and self.reread:
            part.to("meta")
            self.packs.pop(name, None)
            self.dropped.add(name)
            return
        if name in self.dropped:
            self.reread(name)
            self.dropped.remove(name)
        if where in ("staged", "streamed"):
            self.guests[name] = self._guest(name, part, where == "streamed")
            return
        device = self.lanes.device if where == "resident" else self.lanes.host
        for pack in self.packs.get(name, ()):
            pack.settle(device)
        part.to(device)
        self.packs.pop(name, None)
        if where == "host":
            hooks = part.register_forward_pre_hook(self._ids_down), part.register_forward_hook(self._rows_up)
            self._undo[name] = [hook.remove for hook in hooks]

    def _guest(self, name: str, part: nn.Module, streamed: bool) -> Guest:
        packs, stack = self.packs.setdefault(name, []), stack_of(part)
        for modules in groups(part)[len(packs) :]:
            packs.append(Pack(modules, self.lanes))
        for pack in packs:  # which a failure may have left on the card
            pack.hide()
        if not streamed:
            return Guest(packs, self.lanes)
        layers = getattr(part, stack)
        self._undo[name] = [partial(setattr, part, stack, layers)]
        setattr(part, stack, StreamedLayers(layers, packs[1:], self.lanes))
        return Guest(packs[:1], self.lanes, getattr(part, stack))

    def _ids_down(self, part: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(x.to(self.lanes.host) for x in given)

    def _rows_up(self, part: nn.Module, given: tuple[Tensor, ...], rows: Tensor) -> Tensor:
        return rows.to(self.lanes.device)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Inside, parts come and go; afterwards only what is resident is on the card, whatever happened."""
        try:
            yield
        finally:
            self.leave()

    def enter(self, stage: str) -> None:
        """Bring what the stage needs, and send away what it does not; then bring what the next one may find there."""
        if self.placement is None and self.packs:
            raise RuntimeError("the last placement failed: the model needs another one")
        if self.placement is None or stage == self.stage:
            return
        self.stage = None  # until all is there
        wanted, order = self.placement.stages[stage], [*self.placement.stages]
        for name in [name for name in self.here if name not in wanted]:
            self._send(name)
        self._bring(wanted)
        for name in wanted:
            self.guests[name].show()
        following = order[order.index(stage) + 1 :][:1]
        for then in self.placement.early.intersection(following):
            self._bring(self.placement.stages[then])
        self.stage = stage

    def leave(self) -> None:
        """Send all guests away."""
        self.stage = None
        while self.here:
            self._send(self.here[-1])

    def _bring(self, names: Iterable[str]) -> None:
        for name in names:
            if name not in self.here:
                self.here.append(name)
                self.guests[name].arrive()

    def _send(self, name: str) -> None:
        self.here.remove(name)
        self.guests[name].leave()
        self.on_leave(name)


def parts_of(model: nn.Module, streamed: Container[str]) -> tuple[Part, ...]:
    """The parts as `residency` wants them; `streamed` names those whose stack may be."""
    found = []
    for name, part in model.named_children():
        first, *layers = [sum(map(room_in, modules)) for modules in groups(part)]
        stack = (sum(layers), max(layers)) if layers and name in streamed else (0, 0)
        fixed = any(map(is_packed, part.modules()))
        found.append(Part(name, first + sum(layers), *stack, fixed=fixed))
    return tuple(found)


def room_in(module: nn.Module) -> int:
    """Bytes of its own tensors; in a format of bitsandbytes, with the scales that it keeps beside them."""
    tensors = {name: tensor for _, name, tensor in tensors_of([module])}
    if not is_packed(module):
        return sum(map(room_of, tensors.values()))
    bits = 4 + 32 / 64 if "4bit" in type(module).__name__ else 8 + 32 / module.in_features
    weight = round(module.in_features * module.out_features * bits / 8)
    return weight + sum(room_of(tensor) for name, tensor in tensors.items() if name != "weight")


def stack_of(part: nn.Module) -> str | None:
    """The name of its largest list of modules."""
    lists = {name: child for name, child in part.named_children() if isinstance(child, nn.ModuleList)}
    return max(lists, key=lambda name: sum(x.numel() for *_, x in tensors_of(lists[name].modules())), default=None)


def groups(part: nn.Module) -> list[list[nn.Module]]:
    """What comes and goes together: all but the stack, then each layer of it."""
    stack = stack_of(part)
    layers = [] if stack is None else [[*layer.modules()] for layer in part.get_submodule(stack).children()]
    inside = {module for layer in layers for module in layer}
    return [[module for module in part.modules() if module not in inside], *layers]
