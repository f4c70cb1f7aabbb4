"""Time by class of operation beside its roof: the arithmetic with invented measurements, the way with a tiny model."""

import json
import os
import signal
import time

import pytest
import torch
from unipic_run.bench import classes
from unipic_run.bench.ops import HALF_SUMS
from unipic_run.bench.stopwatch import Stopwatch, written
from unipic_run.engine.meter import Call
from unipic_run.kernels._op import HAS_TRITON
from unipic_run.kernels.norms import norm

ROOF = {"bf16": 1e12, "int8": 2e12, "fp16": 1e12, HALF_SUMS: 1e12, "fp32": 5e11, "copy": 1e9}


def call(kind, precision, name, flop, nbytes, shape=(8, 8), stage="sample"):
    return Call(stage, kind, precision, name, shape, flop, nbytes, 1)


PRODUCT = call("matmul", "bf16", "mm", 10**9, 10**3)  # a millisecond of arithmetic at best
GATE = call("elementwise", "bf16", "gated_add", 10, 10**6)  # a millisecond of memory
SCORES = call("attention", "int8", "attention_int8", 3 * 10**9, 10**3)  # 2.25 ms at the mean of both rates
CONVOLUTION = call("matmul", "bf16", "convolution", 10**9, 10**3, stage="decode")


def rows_of(seconds, **times):
    calls = {one: times.get(one.name, 1) for one in seconds}
    return {row["class"]: row for row in classes.classes(calls, seconds, ROOF)}


def test_a_class_adds_up_its_calls_and_their_roofs():
    rows = rows_of({PRODUCT: 2e-3, GATE: 4e-3, SCORES: 4.5e-3, CONVOLUTION: 1e-3}, mm=10)
    assert list(rows) == ["matmul bf16", "attention int8", "elementwise bf16", "convolution bf16"]
    assert rows["matmul bf16"]["seconds"] == pytest.approx(20e-3) and rows["matmul bf16"]["launches"] == 10
    shares = {name: row["share_of_roof"] for name, row in rows.items()}
    expected = {"matmul bf16": 0.5, "elementwise bf16": 0.25, "attention int8": 0.5, "convolution bf16": 1.0}
    assert shares == pytest.approx(expected)
    assert sum(row["share_of_time"] for row in rows.values()) == pytest.approx(1)
    assert rows["elementwise bf16"]["share_of_roof_by_arithmetic"] == 0


@pytest.mark.parametrize(
    ("milliseconds", "times", "short"),
    [(1.6, 1, False), (1.8, 1, True), (1.8, 100, True), (100, 1, True)],
)
def test_a_large_class_has_to_reach_its_roof(milliseconds, times, short):
    rows = rows_of({PRODUCT: milliseconds / 1e3}, mm=times)
    assert classes.falls_short(rows["matmul bf16"]) == short


def test_a_small_class_may_be_slow():
    rows = rows_of({PRODUCT: 1e-3, GATE: 10e-3}, mm=100)
    assert rows["elementwise bf16"]["share_of_roof"] == pytest.approx(0.1)
    assert not any(classes.falls_short(row) for row in rows.values())


def test_what_loses_most_is_named():
    other = call("matmul", "bf16", "mm", 10**9, 10**3, shape=(3, 5))
    rows = list(rows_of({PRODUCT: 1.1e-3, other: 9e-3}).values())
    assert [one["shape"] for one in rows[0]["loses_most"]] == [[3, 5], [8, 8]]
    said = "\n".join(classes.table(rows, {}))
    assert "short of its roof" in said and "mm [3, 5] in sample: 8.0 ms lost in 1 calls" in said
    assert "no tensor cores" in "\n".join(classes.table(rows, {"matmul bf16": "no tensor cores"}))


def test_a_cause_has_words_and_belongs_to_an_architecture(tmp_path):
    path = tmp_path / "causes.json"
    path.write_text('{"about": "", "sm_89": {"norm bf16": "one row a program"}, "sm_90": {"norm bf16": " "}}')
    assert classes.stated(path, "sm_89") == {"norm bf16": "one row a program"}
    assert classes.stated(path, "sm_80") == {}
    with pytest.raises(ValueError, match="no cause is stated for norm bf16"):
        classes.stated(path, "sm_90")
    assert all(isinstance(classes.stated(classes.CAUSES, f"sm_{sm}"), dict) for sm in (80, 86, 89, 90, 120))


def test_each_kind_of_call_is_timed_once_and_what_it_writes_is_put_back():
    runs = []

    def timer(work, before):
        for _ in range(3):
            before()
            runs.append(work())
        return 1.5

    x, ones = torch.zeros(4, 4), torch.ones(4, 2)
    with torch.inference_mode(), Stopwatch(timer) as watch:
        for _ in range(5):
            x.add_(1)
        y = x @ ones
    assert x.unique().tolist() == [5.0] and y.unique().tolist() == [20.0]
    assert {call.name: times for call, times in watch.calls.items()} == {"add_": 5, "mm": 1}
    assert watch.seconds.keys() == watch.calls.keys() and len(runs) == 3 * len(watch.calls)
    assert all(seconds == 1.5 for seconds in watch.seconds.values())


def test_what_a_call_writes_is_known_from_its_schema():
    x, y = torch.zeros(2), torch.ones(2)
    assert [*map(id, written(torch.ops.aten.add_.Tensor, (x, y), {}))] == [id(x)]
    assert [*map(id, written(torch.ops.aten.add.out, (x, y), {"out": y}))] == [id(y)]
    assert written(torch.ops.aten.add.Tensor, (x, y), {}) == []


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")
@pytest.mark.parametrize("how", [(), ("--quant", "int8", "--attn", "int8-qk")], ids=["bf16", "int8"])
def test_on_a_card_a_tiny_picture_is_judged(tiny_release, capsys, how):
    model = ("--model", str(tiny_release), "--random-weights", "--device", "cuda", "--dtype", "bf16", *how)
    status = classes.main([*model, "--res", "64", "--iters", "2"])
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert summary["judged"] and status == (not summary["passed"])
    assert summary["passed"] == (not summary["short_of_their_roof"])
    assert all(row["seconds"] > 0 for row in summary["classes"])
    assert f"matmul {'int8' if how else 'bf16'}" in {row["class"] for row in summary["classes"]}


@pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")
def test_a_kernel_that_could_not_be_had_is_a_failure(tiny_release, capsys, monkeypatch):
    monkeypatch.setattr(classes, "time_a_picture", lambda *how: None)
    monkeypatch.setattr(norm, "broken", "no such thing")
    model = ("--model", str(tiny_release), "--random-weights", "--device", "cpu", "--dtype", "fp32")
    assert classes.main([*model, "--res", "64", "--iters", "2"]) == 1
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert summary["broken"] == {"norm": "no such thing"} and not summary["passed"]


def test_what_was_timed_is_told_when_time_is_up(tiny_release, capsys, monkeypatch):
    def stopped_early(watch, *how):
        watch.calls.update({PRODUCT: 3, GATE: 1})
        watch.seconds[PRODUCT] = 2e-3  # and the other was being timed
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)

    monkeypatch.setattr(classes, "time_a_picture", stopped_early)
    before = signal.getsignal(signal.SIGTERM)
    try:
        model = ("--model", str(tiny_release), "--random-weights", "--device", "cpu", "--dtype", "fp32")
        assert classes.main([*model, "--res", "64", "--iters", "2"]) == 1
    finally:
        signal.signal(signal.SIGTERM, before)
    *said, last = capsys.readouterr().out.splitlines()
    summary = json.loads(last)
    assert summary["stopped"] and not summary["judged"] and not summary["passed"]
    assert [row["class"] for row in summary["classes"]] == ["matmul bf16"] and "matmul bf16" in said[1]
    assert summary["seconds"] == pytest.approx(6e-3)


def test_what_was_timed_before_a_failure_is_told(tiny_release, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("UNIPIC_RUN_CACHE", str(tmp_path))

    def failing(watch, *how):
        watch.calls.update({PRODUCT: 3})
        watch.seconds[PRODUCT] = 2e-3
        raise RuntimeError("an illegal memory access")

    monkeypatch.setattr(classes, "time_a_picture", failing)
    model = ("--model", str(tiny_release), "--random-weights", "--device", "cpu", "--dtype", "fp32")
    assert classes.main([*model, "--res", "64", "--iters", "2", "--json"]) == 1
    summary = json.loads(capsys.readouterr().out)
    assert summary["error"] == "RuntimeError: an illegal memory access" and not summary["passed"]
    assert summary["seconds"] == pytest.approx(6e-3) and not summary["judged"]


def test_a_tiny_picture_goes_all_the_way(tiny_release, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("UNIPIC_RUN_CACHE", str(tmp_path))
    model = ("--model", str(tiny_release), "--random-weights", "--device", "cpu", "--dtype", "fp32")
    assert classes.main([*model, "--res", "64", "--iters", "2"]) == 0
    head, *_, last = capsys.readouterr().out.splitlines()
    summary = json.loads(last)
    assert head.startswith("class") and not summary["judged"] and summary["passed"]
    found = {row["class"]: row for row in summary["classes"]}
    assert {"matmul fp32", "attention fp32", "norm fp32", "elementwise fp32", "convolution fp32"} <= set(found)
    assert found["matmul fp32"]["calls"] > 1000 and summary["kinds_of_calls"] > 100
    assert sum(row["seconds"] for row in found.values()) == pytest.approx(summary["seconds"])
