"""What is captured and replayed when, and what happens where that fails: with a stand-in for CUDA, then on a card."""

import contextlib
import gc
import warnings
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from unipic_run.engine import graphs as file
from unipic_run.engine.errors import UnipicWarning
from unipic_run.engine.graphs import CudaCapture, Graphs, undisturbed
from unipic_run.kernels._op import OPERATORS, Cost, KernelWarning, Operator


class Where(NamedTuple):
    position: Tensor
    stream: int


@dataclass(frozen=True)
class State:
    """Shaped like a run of the diffusion head."""

    x: Tensor
    clock: Tensor
    where: Where
    table: Tensor


class Walk:
    """`advance` changes a state in place, as `DiffusionHead.advance` does."""

    def __init__(self) -> None:
        self.calls = 0

    def advance(self, state: State, steps: int) -> None:
        self.calls += 1
        for _ in range(steps):
            state.x.mul_(0.5).add_(state.table[state.clock].sum() + state.where.position)
            state.clock.sub_(1)

    def whole(self, x: Tensor, table: Tensor) -> Tensor:
        self.calls += 1
        return x * 2 + table.sum()


class Recorder:
    """Captures as CUDA does: the function runs in Python, but nothing is computed until a replay."""

    def __init__(self, *tensors: Tensor) -> None:
        self.watched, self.firsts, self.error = list(tensors), [], None

    def __call__(self, function, device, first):
        self.firsts.append(first)
        if self.error is not None:
            raise self.error
        before = [x.clone() for x in self.watched]
        result = function()
        for x, was in zip(self.watched, before, strict=True):
            x.copy_(was)

        def replay():
            again = function()
            if result is not None:
                result.copy_(again)

        return replay, result


def begin(seed: int, rows: int = 3) -> State:
    noise = torch.Generator().manual_seed(seed)
    where = Where(torch.arange(rows).float() + seed, 2)
    return State(torch.randn(rows, generator=noise), torch.tensor([9]), where, torch.rand(10, generator=noise))


def denoised(walk: Walk, graphs: Graphs, seed: int, rows: int = 3, watch: Recorder | None = None) -> Tensor:
    """Ten steps in chunks of two, as a model would take them."""
    state = graphs.hold("head", rows, begin(seed, rows))
    if watch:
        watch.watched = [state.x, state.clock]
    for _ in range(5):
        graphs.run("head", (rows, 2), walk.advance, (state, 2), after=1)
    return state.x.clone()


def expected(seed: int, rows: int = 3) -> Tensor:
    state = begin(seed, rows)
    Walk().advance(state, 10)
    return state.x


def test_where_there_is_no_cuda_functions_just_run():
    graphs, walk = Graphs(), Walk()
    assert torch.equal(denoised(walk, graphs, 1), expected(1)) and walk.calls == 5
    assert (graphs.counts.captures, graphs.counts.replays, graphs.counts.eager) == (0, 0, 5)
    for device in ("cpu", "meta"):
        assert device in graphs.refusal("head", torch.device(device))
    fresh = begin(2)
    assert graphs.hold("head", 3, fresh) is fresh, "nothing is kept that no graph needs"
    assert graphs.hold("head", 3, begin(3)) is not fresh


def test_storage_is_one_keys_at_a_time_and_no_graph_yet():
    recorder, there = Recorder(), []
    graphs = Graphs(recorder, "cpu")

    def storage(length):
        def make():
            there.append(len(graphs._stored))
            return (torch.zeros(length),)

        return graphs.storage("token", length, make)

    (first,) = storage(3)
    assert storage(3)[0] is first and not graphs.holds and graphs.may_write(first)
    recorder.watched = [first]
    for _ in range(3):
        graphs.run("token", 3, torch.Tensor.add_, (first, 1.0))
    assert first.tolist() == [3.0] * 3 and graphs.counts.captures == 1 and graphs.holds, "changed in place, no copy"
    (other,) = storage(4)
    assert not graphs._graphs and len(graphs._stored) == 1, "a graph goes with what it writes to"
    graphs.failed["token"] = "no"
    (third,) = storage(5)
    assert not graphs._stored and not graphs.may_write(third) and graphs.may_write(other)
    assert there == [0, 0, 0], "the old one goes before there is a new one"


def test_what_is_captured_at_sight_is_replayed_within_the_picture_and_in_the_next():
    recorder, walk = Recorder(), Walk()
    graphs = Graphs(recorder, "cpu")
    for picture, seed in enumerate((1, 2, 3)):
        assert torch.equal(denoised(walk, graphs, seed, watch=recorder), expected(seed))
        counts = graphs.counts
        assert counts.captures == 1 and counts.eager == 1 and counts.replays == 4 + 5 * picture
    assert torch.equal(denoised(walk, graphs, 4, rows=2, watch=recorder), expected(4, rows=2))
    assert counts.captures == 2 and counts.misses == 0 and counts.seconds > 0
    assert recorder.firsts == [True, False], "the second graph shares the first one's memory"


def test_the_first_picture_of_a_shape_captures_no_rounds_and_the_third_none_either():
    graphs, walk, table = Graphs(Recorder(), "cpu"), Walk(), torch.ones(2)
    kept, captures = [], []
    for picture in range(4):
        for rows in (2, 3):  # two rounds, each seen once a picture
            x = torch.full((rows,), float(picture))
            kept.append((x, graphs.run("round", rows, walk.whole, (x, table)).clone()))
        captures.append(graphs.counts.captures)
    assert captures == [0, 2, 2, 2] and graphs.counts.replays == 4 and graphs.counts.eager == 4
    assert all(torch.equal(z, x * 2 + 2) for x, z in kept), "later pictures' inputs are copied to where a graph reads"


@pytest.mark.parametrize(
    "other",
    [
        lambda walk: (walk.whole, (torch.ones(4), torch.ones(2))),
        lambda walk: (walk.whole, (torch.ones(3, dtype=torch.float64), torch.ones(2))),
        lambda walk: (Walk().whole, (torch.ones(3), torch.ones(2))),
        lambda walk: (lambda x, table: x * 2 + table.sum(), (torch.ones(3), torch.ones(2))),
        lambda walk: (lambda x: x * 2 + 2, (torch.ones(3),)),
    ],
    ids=["shape", "dtype", "object", "function", "count"],
)
def test_a_graph_is_never_replayed_for_something_else(other):
    graphs, walk = Graphs(Recorder(), "cpu"), Walk()
    for _ in range(2):
        graphs.run("round", 0, walk.whole, (torch.zeros(3), torch.ones(2)), after=1)
    function, given = other(walk)
    assert torch.equal(graphs.run("round", 0, function, given, after=1), torch.full_like(given[0], 4.0))
    counts = graphs.counts
    assert (counts.misses, counts.captures, counts.replays) == (1, 2, 1), "captured anew, for what it stands for now"
    assert torch.equal(graphs.run("round", 0, function, given), torch.full_like(given[0], 4.0)) and counts.replays == 2


def test_numbers_are_part_of_what_was_captured():
    recorder, walk = Recorder(), Walk()
    graphs = Graphs(recorder, "cpu")
    state = graphs.hold("head", 3, begin(1))
    recorder.watched = [state.x, state.clock]
    for steps in (2, 2, 3, 3):
        graphs.run("head", 3, walk.advance, (state, steps), after=1)  # a key that leaves the steps out
    assert torch.equal(state.x, expected(1)) and graphs.counts.misses == 1


def test_what_is_given_stays_the_callers_and_what_is_held_is_not_copied_again():
    graphs, walk, calls = Graphs(recorder := Recorder(), "cpu"), Walk(), []
    mine = torch.full((1,), 2.0)
    table = graphs.hold("table", 0, mine)
    for value in (1.0, 2.0, 3.0):
        x = torch.tensor([value]).expand(3)  # memory that overlaps itself can be read
        calls.append((x, graphs.run("round", 0, walk.whole, (x, table), after=1).clone()))
        assert graphs.hold("table", 0, torch.full((1,), 2.0)) is table
    assert all(torch.equal(z, x * 2 + 2) for x, z in calls) and graphs.counts.misses == 0
    assert table is not mine and recorder.firsts == [True]
    assert graphs._graphs["round", 0].given[1] is table
    graphs.hold("table", 0, torch.full((1,), 5.0))
    assert mine.item() == 2.0, "whoever made it may go on using it"
    assert torch.equal(graphs.run("round", 0, walk.whole, (x, table)), x * 2 + 5)


@dataclass(frozen=True)
class Prompts:
    lengths: Tensor

    @cached_property
    def starts(self) -> Tensor:
        return self.lengths + 1


def test_what_containers_remember_is_not_what_graphs_read():
    remembered = []

    def started(prompts):
        remembered.append("starts" in vars(prompts))
        return prompts.starts * 2

    graphs = Graphs(Recorder(), "cpu")
    for length in (3.0, 4.0):
        prompts = graphs.hold("prompts", 0, Prompts(torch.tensor([length])))
        assert prompts.starts.item() == length + 1, "not that of the text before"
        graphs.run("round", 0, started, (prompts,))
    assert graphs.counts.captures == 1 and remembered == [True, True, False], "a graph computes it anew"


def test_a_failed_capture_costs_nothing_but_itself():
    recorder, walk = Recorder(), Walk()
    graphs, recorder.error = (
        Graphs(recorder, "cpu"),
        RuntimeError("not permitted when stream is capturing\nCompile ..."),
    )
    with pytest.warns(UnipicWarning) as said:
        assert torch.equal(denoised(walk, graphs, 1), expected(1)) and walk.calls == 5
        graphs.clear()  # weights have moved: it is tried anew, and fails anew
        assert torch.equal(denoised(walk, graphs, 1), expected(1))
    (line,) = (str(one.message) for one in said)
    assert "'head'" in line and "not permitted when stream is capturing)" in line and "runs uncaptured" in line
    assert len(recorder.firsts) == 2, "until then it is not tried again"
    assert graphs.failed == {"head": "RuntimeError: not permitted when stream is capturing"}
    assert graphs.refusal("head", torch.device("cpu")) == graphs.failed["head"]
    recorder.error = None
    for _ in range(2):
        graphs.run("round", 0, walk.whole, (torch.ones(1), torch.ones(1)), after=1)
    assert graphs.counts.captures == graphs.counts.replays == 1, "something else may still be captured"


def test_without_memory_for_it_the_graphs_that_are_there_make_room():
    recorder, walk = Recorder(), Walk()
    graphs = Graphs(recorder, "cpu")
    denoised(walk, graphs, 1, watch=recorder)
    recorder.error = torch.OutOfMemoryError("tried to allocate 2 GiB")
    graphs.run("round", 0, walk.whole, (torch.ones(1), torch.ones(1)), after=1)
    assert "2 GiB" in graphs.failed["round"]
    recorder.error = None
    assert torch.equal(denoised(walk, graphs, 2, watch=recorder), expected(2))
    assert recorder.firsts == [True, False, True], "nothing was left to share memory with"
    assert graphs.counts.captures == 2 and not graphs.off


def test_clear_forgets_everything_and_may_say_why_nothing_is_captured():
    recorder, walk = Recorder(), Walk()
    graphs = Graphs(recorder, "cpu")
    for _ in range(3):  # each picture's parts are moved, so none is ever the second of its shape
        graphs.clear()
        graphs.run("round", 0, walk.whole, (torch.ones(1), torch.ones(1)))
    assert graphs.counts.captures == 0
    denoised(walk, graphs, 1, watch=recorder)
    graphs.clear("layers are streamed")
    assert torch.equal(denoised(walk, graphs, 2), expected(2)) and graphs.counts.captures == 1
    assert graphs.refusal("head", torch.device("cpu")) == "layers are streamed"
    graphs.clear()
    assert torch.equal(denoised(walk, graphs, 3, watch=recorder), expected(3)) and graphs.counts.captures == 2


@pytest.mark.parametrize("when", ["in the middle", "between"])
def test_what_is_dropped_at_any_time_is_made_anew(when):
    """A state that is under way stays the one that graphs change, and none changes an older one."""
    recorder, walk = Recorder(), Walk()
    graphs = Graphs(recorder, "cpu")
    for seed in (1, 2, 3):
        state = graphs.hold("head", 3, begin(seed))
        recorder.watched = [state.x, state.clock]
        for chunk in range(5):
            if chunk == 3 and when == "in the middle":
                graphs.clear()
            graphs.run("head", (3, 2), walk.advance, (state, 2), after=1)
        assert torch.equal(state.x, expected(seed))
        if when == "between":
            graphs.clear()
    assert graphs.counts.replays >= 7 and not graphs.failed


def test_too_many_shapes_begin_anew(monkeypatch):
    monkeypatch.setattr(file, "MOST", 3)
    graphs, walk = Graphs(recorder := Recorder(), "cpu"), Walk()
    for rows in range(1, 8):
        graphs.run("round", rows, walk.whole, (torch.ones(rows), torch.ones(1)), after=1)
    assert recorder.firsts == [True, False, False, True, False, False, True]


class Card:
    """As much of torch.cuda as `CudaCapture` touches; `log` is what was done."""

    def __init__(self, monkeypatch, ending: Exception | None = None, stuck: bool = False) -> None:
        log = self.log = []
        self.current = "main"

        class Graph:
            def capture_begin(self, pool, capture_error_mode):
                log.append(("begin", card.current, pool, capture_error_mode))

            def capture_end(self):
                log.append(("end", card.current))
                if ending:
                    raise ending

            def replay(self):
                log.append(("replay", card.current))

        class Stream:
            def __init__(self, device):
                self.device = device

        @contextlib.contextmanager
        def stream(to):
            card.current = to
            try:
                yield
            finally:
                card.current = "main"

        def still_recording(index, pool):
            log.append(("unwind", index, pool))
            if not stuck:
                raise RuntimeError("endAllocatePool: not currently recording to mempool_id")

        card, pools = self, iter(range(1, 99))
        for name, value in {
            "CUDAGraph": Graph,
            "Stream": Stream,
            "stream": stream,
            "graph_pool_handle": lambda: (0, next(pools)),
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", still_recording, raising=False)


DEVICE = torch.device("cuda", 0)


def test_captures_on_its_own_stream_into_one_pool(monkeypatch):
    card, capture = Card(monkeypatch), CudaCapture()
    seen = []
    for first in (True, False, True):
        replay, result = capture(lambda: seen.append((card.current, gc.isenabled())) or 7, DEVICE, first)
        replay()
        assert result == 7
    (side, *others), collecting = ([x[i] for x in seen] for i in (0, 1))
    assert side != "main" and set(others) == {side} and not any(collecting) and gc.isenabled()
    begun = [entry for entry in card.log if entry[0] == "begin"]
    assert [pool for _, _, pool, _ in begun] == [(0, 1), (0, 1), (0, 2)]
    assert {(stream, mode) for _, stream, _, mode in begun} == {(side, "thread_local")}
    assert [entry for entry in card.log if entry[0] == "replay"] == [("replay", "main")] * 3


def broken_by(error):
    def function():
        raise error

    return function


def test_a_capture_that_python_breaks_off_is_ended(monkeypatch):
    card, capture = Card(monkeypatch), CudaCapture()
    for error in (ValueError("no"), KeyboardInterrupt()):
        with pytest.raises(type(error)):
            capture(broken_by(error), DEVICE, True)
        assert [entry[0] for entry in card.log[-3:]] == ["begin", "end", "unwind"]
        assert card.current == "main" and gc.isenabled() and not capture._spoilt


def test_a_capture_that_cuda_breaks_off_says_what_began_it_and_leaves_torch_usable(monkeypatch):
    card = Card(monkeypatch, ending=RuntimeError("capture was invalidated"), stuck=True)
    graphs = Graphs(capture := CudaCapture(), "cpu")

    def function(x):
        if card.current != "main":
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing")
        return x + 1

    for _ in range(3):
        assert torch.equal(graphs.run("round", 0, function, (torch.ones(2),), after=1), torch.full((2,), 2.0))
    assert [entry[0] for entry in card.log] == ["begin", "end", "unwind"] and card.log[-1][2] == (0, 1)
    assert "not permitted" in graphs.failed["round"]
    assert capture._spoilt, "torch's allocators may ask this graph again"
    capture._spoilt.clear()
    with contextlib.suppress(RuntimeError):
        capture(lambda: 1, DEVICE, False)
    assert card.log[3][2] == (0, 2), "the next one takes no part in what was left behind"


def test_an_operator_that_cannot_be_captured_is_not_broken_for_good():
    def fails(x):
        raise RuntimeError("Triton Error [CUDA]: operation not permitted when stream is capturing")

    operator = Operator("planted_uncapturable(Tensor x) -> Tensor", torch=torch.clone, triton=fails, cost=Cost)
    operator.broken = False
    try:
        with warnings.catch_warnings(), undisturbed(), pytest.raises(KernelWarning, match="not permitted"):
            operator.broken = True
            warnings.warn("the kernel does not run here (not permitted ...): using torch", KernelWarning, 2)
        assert not operator.broken
    finally:
        del OPERATORS["unipic::planted_uncapturable"]


def cuda_walk(device: str) -> tuple[Tensor, Tensor]:
    noise = torch.Generator().manual_seed(0)
    return (torch.randn(64, 64, generator=noise).to(device) for _ in range(2))


def step(x: Tensor, weight: Tensor) -> None:
    """In place, so that each replay takes a further step."""
    x.copy_(torch.nn.functional.layer_norm(x @ weight, x.shape[-1:]) + x)


def waiting(x: Tensor) -> Tensor:
    return x + x.sum().item()


@pytest.mark.gpu
def test_graphs_on_a_card_equal_eager_bit_for_bit():
    graphs = Graphs()
    with torch.inference_mode():
        for _ in range(2):  # the second time with other tensors of the same shapes
            eager, weight = cuda_walk("cuda")
            state = graphs.hold("step", 64, (eager.clone(), weight))
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
            try:
                for _ in range(5):
                    step(eager, weight)
                    graphs.run("step", 64, step, state, after=1)
            finally:
                torch.cuda.set_sync_debug_mode("default")
            assert torch.equal(state[0], eager)
    counts = graphs.counts
    assert (counts.captures, counts.eager, counts.replays, counts.misses) == (1, 1, 9, 0) and not graphs.failed


@pytest.mark.gpu
def test_a_capture_that_waits_fails_cleanly_on_a_card():
    graphs = Graphs()
    with torch.inference_mode():
        for _ in range(3):
            x = torch.ones(1000, device="cuda")
            assert torch.equal(graphs.run("wait", 0, waiting, (x,), after=1), x + 1000)
        assert "capturing" in graphs.failed["wait"] and graphs.counts.captures == 0
        torch.cuda.empty_cache()  # which torch refuses during a capture
        assert torch.randn(8, device="cuda").isfinite().all(), "a caller's own generator is in no capture either"
        eager, weight = cuda_walk("cuda")
        state = graphs.hold("step", 64, (eager.clone(), weight))
        for _ in range(4):
            step(eager, weight)
            graphs.run("step", 64, step, state, after=1)
        assert torch.equal(state[0], eager) and graphs.counts.replays == 3
    graphs.clear()
    torch.cuda.empty_cache()
