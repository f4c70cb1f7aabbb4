"""Weights that come and go: the same results, nothing used too early or overwritten too soon, nothing lost in failures.

The order of events is tried on simulated streams. They copy and compute at once, so values are right whenever the
program is; beside that they keep a timetable with random delays, as a card would, in which two operations that touch
the same memory may never overlap or change places.
"""

import random
import sys
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable

import pytest
import torch
from torch import Tensor, nn
from unipic_run.engine.mover import Mover
from unipic_run.engine.residency import Placement
from unipic_run.engine.transfer import Lanes, tensors_of

CPU = torch.device("cpu")
NEEDS = {"read": ("table", "deep"), "think": ("deep", "wide"), "write": ("out",)}
RESIDENT = dict.fromkeys(("table", "deep", "wide", "out"), "resident")
MIXED = {"table": "host", "deep": "streamed", "wide": "staged", "out": "staged"}
PLACEMENTS = [
    RESIDENT,
    RESIDENT | {"table": "host", "out": "staged"},
    RESIDENT | {"deep": "streamed", "wide": "streamed", "table": "staged"},
    MIXED,
]


class Simulation(Lanes):
    """`races` tells which operations met. Memory that is free again is given away at once, whatever is still queued."""

    def __init__(self, seed: int) -> None:
        super().__init__(CPU)
        self.random, self.host_now, self.races = random.Random(seed), 0.0, []
        self.pace = {lane: self.random.choice([0.1, 1.0, 10.0]) for lane in ("compute", "copy", "host")}
        self.free_at = {"compute": 0.0, "copy": 0.0}  # when all that is queued on a stream will be done
        self.written, self.read = defaultdict(float), defaultdict(float)  # until when a block is being written, read
        self.free_blocks, self.blocks, self.storages = [], {}, {}

    def empty(self, nbytes: int) -> Tensor:
        tensor = super().empty(nbytes).fill_(255)  # NaN in any floating type
        storage = tensor.untyped_storage()
        key, free = storage.data_ptr(), self.free_blocks
        block = free.pop(self.random.randrange(len(free))) if free else object()
        self.blocks[key], self.storages[key] = block, weakref.ref(storage, lambda _: self._died(key))
        return tensor

    def _died(self, key: int) -> None:
        self.free_blocks.append(self.blocks.pop(key))
        del self.storages[key]

    def copy(self, target: Tensor, source: Tensor) -> None:
        super().copy(target, source)
        self.run("copy", "copy", writes=[target])

    def mark(self, lane: str) -> float:
        return self.free_at[lane]

    def wait(self, lane: str, event: float) -> None:
        self.free_at[lane] = max(self.free_at[lane], event)

    def run(self, lane: str, what: str, reads: Iterable[Tensor] = (), writes: Iterable[Tensor] = ()) -> None:
        """Queue an operation, which takes any time."""
        self.host_now += self.random.expovariate(10 / self.pace["host"])
        start = max(self.free_at[lane], self.host_now)
        self.free_at[lane] = end = start + self.random.expovariate(1 / self.pace[lane])
        for tensors, earlier, now in ((reads, [self.written], self.read), (writes, [self.written, self.read], None)):
            for block in {self.block(tensor) for tensor in tensors} - {None}:
                if any(start < until[block] for until in earlier):
                    self.races.append(what)
                now = self.written if now is None else now
                now[block] = max(now[block], end)

    def block(self, tensor: Tensor) -> object | None:
        """None for memory that is not ours, such as what is resident."""
        return self.blocks.get(tensor.untyped_storage().data_ptr())


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width, width) / width**0.5, requires_grad=False)
        self.register_buffer("shift", torch.randint(-5, 5, (width,), dtype=torch.int8))
        self.after: Callable[[nn.Module], None] = lambda block: None

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(x @ self.weight + self.shift)
        self.after(self)
        return y


class Stack(nn.Module):
    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.rand(()), requires_grad=False)
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x * self.gain


class Model(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.table = nn.Embedding(20, width).requires_grad_(False)
        self.deep, self.wide, self.out = Stack(width, 5), Stack(width, 4), Block(width)

    def run(self, enter: Callable[[str], None] = lambda stage: None, passes: int = 3) -> Tensor:
        with torch.inference_mode():
            enter("read")
            x = self.deep(self.table(torch.arange(4, device=self.table.weight.device)))
            enter("think")
            for _ in range(passes):
                x = self.wide(self.deep(x))
            enter("write")
            return self.out(x)


def placement(where: dict[str, str], early: Iterable[str] = ("think", "write")) -> Placement:
    moving = {name for name, home in where.items() if home in ("staged", "streamed")}
    stages = {stage: tuple(name for name in needs if name in moving) for stage, needs in NEEDS.items()}
    early = frozenset(early)
    return Placement(
        where, stages, early, banded=(), at_once=1, apart=False, peaks={}, seconds=0.0, split=False, budget=0
    )


def made(lanes: Lanes, on_leave: Callable[[str], None] = lambda part: None) -> tuple[Model, Mover, Tensor]:
    """A model, its mover, and what it computes where nothing moves."""
    torch.manual_seed(0)
    model = Model()
    expected = model.run()
    return model, Mover(model, lanes, on_leave), expected


def watched(model: Model, simulation: Simulation) -> Model:
    """Every block is an operation on the simulated card, and so is its use of some memory of its own."""

    def after(block: nn.Module) -> None:
        scratch = simulation.empty(64)
        simulation.run("compute", "block", reads=[block.weight, block.shift], writes=[scratch])

    for block in model.modules():
        if isinstance(block, Block):
            block.after = after
    return model


def away(model: nn.Module, name: str) -> bool:
    return all(tensor.is_meta for *_, tensor in tensors_of(model.get_submodule(name).modules()))


def test_results_are_the_same_wherever_weights_are_and_however_often_they_moved() -> None:
    left = []
    model, mover, expected = made(Lanes(CPU), left.append)
    names = [*model.state_dict()]
    for where in [*PLACEMENTS, *reversed(PLACEMENTS)]:
        mover.place(placement(where))
        for _ in range(2):
            with mover.running():
                assert model.run(mover.enter).equal(expected), where
        assert all(away(model, name) == (where[name] in ("staged", "streamed")) for name in where)
        assert [*model.state_dict()] == names
    assert model.run().equal(expected), "all resident again"
    assert type(model.deep.blocks) is nn.ModuleList and set(left) == {"table", "deep", "wide", "out"}


def races(seed: int, where: dict[str, str]) -> list[str]:
    """Of two requests, with one between them that is cancelled while its weights come."""
    model, mover, expected = made(simulation := Simulation(seed))
    watched(model, simulation)
    mover.place(placement(where, early=simulation.random.choice([(), ("think",), ("think", "write")])))
    for stages in (0, simulation.random.randint(1, 3), 0):
        with mover.running():
            if not stages:
                assert model.run(mover.enter).equal(expected)
            for stage in [*NEEDS][:stages]:
                mover.enter(stage)
        for scratch in [simulation.empty(64) for _ in range(5)]:
            simulation.run("compute", "something else", writes=[scratch])
        del scratch
    assert not simulation.blocks, "everything was given back"
    return simulation.races


@pytest.mark.parametrize("where", PLACEMENTS[1:])
def test_no_order_of_events_lets_a_copy_meet_what_uses_the_same_memory(where: dict[str, str]) -> None:
    for seed in range(60):
        assert not races(seed, where), f"seed {seed}"


@pytest.mark.parametrize("rule", ["load", "show", "free"])
def test_each_of_the_three_rules_is_needed(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mover that forgets to wait in one place is caught."""
    wait = Simulation.wait

    def forgetful(self: Simulation, lane: str, event: float) -> None:
        if sys._getframe(1).f_code.co_name != rule:
            wait(self, lane, event)

    monkeypatch.setattr(Simulation, "wait", forgetful)
    assert sum(bool(races(seed, MIXED)) for seed in range(20)) > 5


class Failing(Simulation):
    """Out of memory at one request for memory or one copy, counted from the start."""

    def __init__(self, at: int) -> None:
        super().__init__(at)
        self.left = at

    def count(self) -> None:
        self.left -= 1
        if not self.left:
            raise torch.OutOfMemoryError("injected")

    def empty(self, nbytes: int) -> Tensor:
        self.count()
        return super().empty(nbytes)

    def copy(self, target: Tensor, source: Tensor) -> None:
        self.count()
        super().copy(target, source)

    def pieces(self, nbytes: int) -> list[Tensor]:
        self.count()
        return super().pieces(nbytes)


def test_memory_that_runs_out_anywhere_costs_the_request_and_nothing_else() -> None:
    failures = 0
    for at in range(1, 201):
        model, mover, expected = made(simulation := Failing(at))
        watched(model, simulation)
        try:
            mover.place(placement(MIXED))
            with mover.running():
                model.run(mover.enter)
        except torch.OutOfMemoryError:
            failures += 1
            if mover.placement is None:
                with pytest.raises(RuntimeError, match="placement"):
                    mover.enter("read")
        simulation.left = 0  # enough of it
        assert not mover.here and not simulation.blocks
        for where in (RESIDENT | {"deep": "streamed"}, RESIDENT):
            mover.place(placement(where))
            with mover.running():
                assert model.run(mover.enter).equal(expected), at
        assert not simulation.races
    assert failures > 60


def test_a_pass_that_is_given_up_leaves_the_next_one_right() -> None:
    model, mover, expected = made(simulation := Simulation(5))
    watched(model, simulation)
    mover.place(placement(MIXED))
    with mover.running():
        mover.enter("read")
        for stop in range(5):
            layers = iter(model.deep.blocks)
            for _ in range(stop + 1):
                next(layers)(torch.zeros(1, 8))
            if stop % 2:
                del layers
        assert model.run(mover.enter).equal(expected)
    with pytest.raises(RuntimeError, match="does not bring"):
        model.deep(torch.zeros(1, 8))
    with pytest.raises(TypeError, match="one by one"):
        model.deep.blocks[:-1]
    assert "Block" in repr(model) and not simulation.races


def test_idle_parts_are_dropped_and_read_again_where_that_is_asked_for() -> None:
    torch.manual_seed(0)
    model, asked = Model(), []
    expected, stored = model.run(), {name: dict(part.state_dict()) for name, part in model.named_children()}

    def reread(part: str) -> None:
        asked.append(part)
        if len(asked) == 1:
            raise OSError("the disk is away")
        model.get_submodule(part).load_state_dict(stored[part], assign=True)

    mover, idle = Mover(model, Lanes(CPU), reread=reread), RESIDENT | {"wide": "idle", "out": "staged"}
    mover.place(placement(idle))
    assert away(model, "wide") and "wide" not in mover.packs and not asked
    with pytest.raises(OSError, match="disk"):
        mover.place(placement(MIXED))
    for where in (MIXED, RESIDENT, idle, RESIDENT | {"wide": "streamed"}):
        mover.place(placement(where))
        assert away(model, "wide") == (where["wide"] != "resident")
        if where is not idle:
            with mover.running():
                assert model.run(mover.enter).equal(expected)
    assert asked == ["wide"] * 3, "once for each time it was dropped, and once in vain"
