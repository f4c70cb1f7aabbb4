"""Compiling ahead: this card's architecture, pictures first, and what is done counts when time is up."""

import json

import pytest
import torch
from unipic_run.bench import compile_ahead
from unipic_run.bench.aot import Job
from unipic_run.bench.aot_compile import Configuration
from unipic_run.bench.ops import Stopped


def job(kernel: str, case: str) -> Job:
    return Job(Configuration("m", kernel, {}, {}, {}, {}, 0), [case])


@pytest.fixture
def card(monkeypatch):
    """What is asked of the compiler, (kernel, capability), on a card that has jobs."""
    asked = []

    def build_each(each, tasks):
        for one, capability in tasks:
            asked.append((one.configuration.kernel, capability))
            one.found[capability] = {"error": "no"} if one.configuration.kernel == "bad" else {}
            if one.configuration.kernel == "last":
                raise Stopped
            yield one, capability

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(compile_ahead, "unusable", lambda: None)
    monkeypatch.setattr(compile_ahead, "build_each", build_each)
    return asked


def test_compiles_what_requests_need_first(card, monkeypatch, capsys):
    wanted = job("a", "unipic-run gen unipic, quant int8")
    jobs = [job("b", "a case"), wanted, job("last", "a case"), job("never", "a case")]
    monkeypatch.setattr(compile_ahead, "collect", lambda *_: jobs)
    assert compile_ahead.main(["--jobs", "1"]) == 0
    assert card == [("a", 90), ("b", 90), ("last", 90)]
    summary = json.loads(capsys.readouterr().out)
    assert (summary["compiled"], summary["left"], summary["passed"]) == (2, 2, False)


def test_what_does_not_compile_is_a_failure(card, monkeypatch, capsys):
    monkeypatch.setattr(compile_ahead, "collect", lambda *_: [job("bad", "a case"), job("good", "a case")])
    assert compile_ahead.main(["--jobs", "1"]) == 1
    summary = json.loads(capsys.readouterr().out)
    assert summary["compiled"] == 2 and len(summary["failures"]) == 1


def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert compile_ahead.main([]) == 0 and "no CUDA device" in capsys.readouterr().out
