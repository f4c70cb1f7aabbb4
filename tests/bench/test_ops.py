"""The operator bench without a card, its arithmetic with a stand-in for the clock, and once on a real one."""

import json
import time

import pytest
import torch
from unipic_run.bench import ops
from unipic_run.bench.drawn import drawn
from unipic_run.kernels._op import HAS_TRITON
from unipic_run.kernels._registry import checks


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_card_it_says_so_and_succeeds(capsys):
    assert ops.main([]) == 0
    said, last = capsys.readouterr().out.splitlines()
    assert "nothing measured" in said and json.loads(last)["skipped"] == said


def test_time_is_compared_with_the_longer_of_arithmetic_and_memory(monkeypatch):
    monkeypatch.setattr(ops, "DEVICE", "meta")
    monkeypatch.setattr(ops, "seconds", lambda function, repeat, before=None: function() is None or 1e-3)
    check = next(check for check in checks("gpu") if check.operator.name == "norm")
    cost = check.operator.cost(*check.case.make("meta"))
    for rate, bandwidth, share, bound in (
        (cost.flop * 1e4, cost.nbytes * 2e3, 0.5, "memory"),
        (cost.flop * 4e3, cost.nbytes * 1e4, 0.25, "arithmetic"),
    ):
        row = ops.timed(check, {"bf16": rate, "copy": bandwidth}, 1)
        assert row["share_of_roof"] == pytest.approx(share) and row["bound"] == bound and row["launches"] == 1
    assert " 1000.0    1000.0   1.00        25" in ops.line({"check": str(check), "problem": "", **row})


def test_what_is_slower_than_torch_is_listed_and_fails_where_asked(monkeypatch, capsys):
    times, used = {"norm": 3e-3, "norm_int8": 1.01e-3}, []  # the second within what is taken for noise

    def one(check, roof, repeat):
        ours = times[check.operator.name]
        row = {"check": str(check), "operator": check.operator.name, "case": check.case.why, "problem": ""}
        row |= {"seconds": ours, "torch_seconds": 1e-3, "ratio": ours / 1e-3, "share_of_roof": 0.5, "launches": 1}
        return row | {"torch_is_used": bool(used)}

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(ops, "HAS_TRITON", True)
    monkeypatch.setattr(ops, "measured_roof", lambda repeat: {"bf16": 1e12})
    monkeypatch.setattr(ops, "describe", dict)
    monkeypatch.setattr(ops, "one", one)
    for strict, status in ((), 0), (("--strict",), 1):
        assert ops.main(["--only", *times, *strict]) == status
        summary = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert summary["passed"] and {row["operator"] for row in summary["slower"]} == {"norm"}
        assert all(row["ratio"] == 3 and row["case"] for row in summary["slower"])
    assert ops.main(["--only", "norm_int8", "--strict"]) == 0
    used.append("listed as torch's on this card")
    assert ops.main(["--only", "norm", "--strict"]) == 0


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_cases_drawn_where_they_are_needed_are_the_same_cases(device):
    for check in checks("interp"):
        ours, made = drawn(check.case, device), check.case.make("cpu")
        assert len(ours) == len(made), check
        room = [id(x) for x in check.operator.written(ours)]  # for results, with anything in it
        for a, b in zip(ours, made, strict=True):
            if isinstance(b, torch.Tensor):
                assert (a.device.type, a.shape, a.dtype) == (device, b.shape, b.dtype), check
                if device == "cpu" and id(a) not in room:
                    torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True, check_stride=True)


def test_nothing_large_is_drawn_on_the_host(monkeypatch):
    """A card of our own kind takes the place of the real one: whatever is made on the CPU would have to be copied."""
    large = []

    class Copies(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result.device.type == "cpu" and result.numel() > 10**5:
                large.append(function)
            return result

    for check in checks("gpu"):
        with Copies():
            drawn(check.case, "meta")
        assert not large, f"{check}: {large}"


def test_the_clock_and_the_roof_run_on_a_cpu_as_well():
    done = []
    took = ops.seconds(lambda: time.sleep(0.002), 3, before=lambda: done.append(1), device="cpu", warm_up=1)
    assert 0.002 <= took < 0.1 and len(done) == 4
    before = torch.backends.cuda.matmul.allow_fp16_accumulation
    roof = ops.measured_roof(1, "cpu")
    assert all(rate > 0 for rate in roof.values()) and roof[ops.HALF_SUMS] >= roof["fp16"]
    assert torch.backends.cuda.matmul.allow_fp16_accumulation == before


def test_nothing_is_timed_before_all_of_it_is_queued(monkeypatch):
    """A device that has waited long enough for a launch or two, and not for many."""
    waits, runs = [], []

    class Event:
        def __init__(self, enable_timing): ...

        def record(self): ...

        def query(self):
            return waits[-1] < 3 * ops.HEAD_START

        def elapsed_time(self, other):
            return 1000.0 if self.query() else 2.0

    monkeypatch.setattr(torch, "empty", lambda *size, **how: torch.zeros(1))
    for name, stand_in in {"Event": Event, "_sleep": waits.append, "synchronize": lambda: None}.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    assert ops.seconds(lambda: runs.append(1), 5, warm_up=1) == 2e-3
    assert waits == [ops.HEAD_START * 2**n for n in (0, 1, 2, 2, 2, 2, 2, 2)] and len(runs) == len(waits)
    monkeypatch.setattr(Event, "query", lambda self: True)
    waits.clear()
    assert ops.seconds(lambda: None, 3, warm_up=0) == 1.0, "what waits for the device is timed all the same"
    assert waits[-3:] == [0, 0, 0] and sum(waits) < 4 * ops.LONGEST_START, "and nothing waits for it"


def test_what_a_run_writes_is_undone():
    check = next(c for c in checks("interp") if c.operator.name == "head_step")
    arguments = check.case.make("cpu")
    before = [x.clone() for x in arguments if isinstance(x, torch.Tensor)]
    restore = ops.restoring(check.operator, arguments)
    check.operator.torch(*arguments)
    assert not all(torch.equal(x, y) for x, y in zip(tensors(arguments), before, strict=True))
    restore()
    assert all(torch.equal(x, y) for x, y in zip(tensors(arguments), before, strict=True))


def tensors(arguments):
    return [x for x in arguments if isinstance(x, torch.Tensor)]


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")
def test_on_a_card_operators_are_right_and_timed(capsys):
    assert ops.main(["--only", "norm", "norm_int8", "--repeat", "3"]) == 0
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert summary["passed"] and all(row["seconds"] > 0 for row in summary["rows"])


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")
def test_on_a_card_cases_are_drawn_there_and_the_same_each_time():
    for check in checks("gpu"):
        first, second = drawn(check.case, "cuda"), drawn(check.case, "cuda")
        room = [id(x) for x in check.operator.written(first)]  # for results, with anything in it
        for a, b in zip(first, second, strict=True):
            if isinstance(a, torch.Tensor) and id(a) not in room:
                assert a.is_cuda, check
                torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
