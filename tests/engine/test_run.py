"""Pacing on a GPU, tried without one: what is recorded on which stream, and what is waited for."""

import pytest
import torch
from unipic_run.engine.run import Pacer


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
