"""Pacing on a GPU, tried without one: what is recorded on which stream, and what is waited for; and the clock."""

import sys
import time
import warnings
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from unipic_run.engine.errors import UnipicWarning
from unipic_run.engine.graphs import Graphs
from unipic_run.engine.reading import Reader
from unipic_run.engine.request import AskRequest
from unipic_run.engine.run import Clock, Pacer
from unipic_run.kernels import _warm_up
from unipic_run.kernels._op import launch


class FakeEvent:
    """A CUDA event that writes down what happens to it."""

    made: list["FakeEvent"]

    def __init__(self) -> None:
        self.stream, self.waited = None, False
        FakeEvent.made.append(self)

    def record(self, stream: object) -> None:
        self.stream = stream

    def synchronize(self) -> None:
        self.waited = True


def test_after_a_round_the_one_before_it_is_waited_for_on_the_models_card(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeEvent.made = []
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")
    pacer = Pacer(torch.device("cuda:1"))
    for done in range(4):
        pacer.tick()
        assert [event.waited for event in FakeEvent.made] == [True] * done + [False]
    assert {event.stream for event in FakeEvent.made} == {"stream of cuda:1"}


def test_a_cpu_needs_no_pacing() -> None:
    pacer = Pacer(torch.device("cpu"))
    pacer.tick()
    assert not pacer.events


CPU = torch.device("cpu")


class Kernel:
    """Tells Triton's listener that a launch has compiled it, or found it on the disk."""

    def __init__(self, found: bool = False) -> None:
        self.found = found

    def __getitem__(self, grid: tuple[int, ...]) -> "Kernel":
        return self

    def __call__(self, *arguments: object) -> None:
        time.sleep(0.01)
        if listener := sys.modules["triton"].knobs.compilation.listener:
            listener(src=None, metadata={}, metadata_group={}, times=None, cache_hit=self.found)


@pytest.fixture
def heard(monkeypatch: pytest.MonkeyPatch) -> list[dict]:
    """A stand-in for Triton, to which somebody else listens already."""
    told: list[dict] = []
    compilation = SimpleNamespace(listener=lambda **what: told.append(what))
    monkeypatch.setitem(sys.modules, "triton", SimpleNamespace(knobs=SimpleNamespace(compilation=compilation)))
    monkeypatch.setattr(_warm_up, "_listener", _warm_up._Listener())
    return told


def staged(clock: Clock, stage: str, *kernels: Kernel) -> list[str]:
    """What is said of a stage that launches these."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        with clock.stage(stage):
            for kernel in kernels:
                launch(kernel, (1,), torch.ones(1))
    return [str(one.message) for one in said]


def test_what_is_compiled_is_said_once_and_counted(heard: list[dict]) -> None:
    clock = Clock(CPU)
    assert [text.partition(",")[0] for text in staged(clock, "condition", Kernel())] == [
        "compiling kernels for this GPU"
    ]
    assert staged(clock, "sample", Kernel(), Kernel(found=True)) == []
    (text,) = staged(clock, "decode")
    assert text.startswith("compiled 2 kernels in 0.0 s")
    assert len(heard) == 3, "who listened before still does"
    assert 0.02 <= clock.seconds["compile"] < clock.seconds["condition"] + clock.seconds["sample"]
    before = dict(clock.seconds)
    assert staged(clock, "sample", Kernel(found=True)) == staged(clock, "decode") == []
    assert clock.seconds["compile"] == before["compile"], "a second picture has nothing to compile"
    assert "compile" not in Clock(CPU).seconds


def test_an_answer_says_it_once_and_how_long_it_took_at_its_end(heard: list[dict]) -> None:
    clock, kernels = Clock(CPU), [Kernel() for _ in range(3)]

    def ids(request: object, cancel: object, given: tuple[int, ...]) -> Iterator[int]:
        for number, kernel in enumerate(kernels):
            with clock.stage("answer"):
                launch(kernel, (1,), torch.ones(1))
            yield number

    def answered() -> list[str]:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            reader = SimpleNamespace(clock=clock, _ids=ids)
            assert list(Reader.answer(reader, AskRequest("what?", 64), None)) == list(range(len(kernels)))
        return [str(one.message) for one in said]

    assert len(staged(clock, "condition", Kernel())) == 1
    of_the_picture = clock.seconds["compile"]
    (text,) = answered()
    assert text.startswith("compiled 4 kernels in ")
    assert clock.seconds["compile"] >= of_the_picture + 0.03
    kernels[:] = [Kernel(found=True)]
    assert answered() == []
    assert clock.seconds["compile"] == of_the_picture, "the question before had to wait, not this one"
    assert answered() == [] and set(clock.seconds) == {"condition", "compile", "answer"}


def test_a_warning_that_is_an_error_is_no_fault_of_the_kernels(heard: list[dict]) -> None:
    clock = Clock(CPU)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UnipicWarning, match="compiling"), clock.stage("sample"):
            launch(Kernel(), (1,), torch.ones(1))
        with clock.stage("sample"):
            launch(Kernel(), (1,), torch.ones(1))


@pytest.mark.parametrize("there", [None, SimpleNamespace(), SimpleNamespace(knobs=SimpleNamespace(compilation=None))])
def test_a_triton_that_cannot_be_listened_to_is_no_problem(monkeypatch: pytest.MonkeyPatch, there: object) -> None:
    monkeypatch.setitem(sys.modules, "triton", there)
    clock = Clock(CPU)
    assert staged(clock, "decode") == [] and set(clock.seconds) == {"decode"}


def test_seconds_of_captures_are_reported() -> None:
    def capture(function, device, first):
        time.sleep(0.01)
        return (lambda: None), function()

    graphs, clock = Graphs(capture, "cpu"), Clock(CPU)
    for _ in range(2):
        with clock.stage("sample"):
            graphs.run("head", 0, torch.neg, (torch.ones(1),), after=1)
    assert clock.seconds["capture"] == pytest.approx(graphs.counts.seconds) and graphs.counts.seconds >= 0.01
