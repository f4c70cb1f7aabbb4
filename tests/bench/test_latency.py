"""The latency bench runs all tasks, on real and on random weights."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from unipic_run.bench import calls, latency
from unipic_run.engine import families
from unipic_run.engine.errors import BudgetError
from unipic_run.engine.graphs import Counts
from unipic_run.engine.models.unipic.config import RELEASED

ROOT = Path(__file__).resolve().parents[2]
QUICK = ["--res", "32", "--iters", "2", "--new-tokens", "3", "--dtype", "fp32", "--device", "cpu"]


@pytest.mark.parametrize("weights", [["--random-weights"], []])
def test_measures_every_task(tiny_release, tmp_path, monkeypatch, capsys, weights):
    monkeypatch.setenv("UNIPIC_RUN_CACHE", str(tmp_path))
    assert latency.main(["--model", str(tiny_release), *QUICK, *weights]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    summary = json.loads(last)
    assert [line.split()[0] for line in lines] == ["gen", "edit", "ask"] == list(summary["tasks"])
    for name, task in summary["tasks"].items():
        assert task["memory"]["rss_bytes"] > 0 and task["milliseconds"]["total"] > 0
        assert len(task["round_milliseconds"]) == (0 if name == "ask" else 2)
    assert summary["versions"]["torch"] == torch.__version__ and summary["passed"] and summary["left"] == []
    assert summary["load"]["seconds"] > 0 and summary["graphs"]["captures"] == 0


@pytest.mark.parametrize(
    ("error", "status"), [(BudgetError("out of memory", "less"), 3), (RuntimeError("an illegal memory access"), 1)]
)
def test_what_was_measured_before_a_failure_is_told(tiny_release, capsys, monkeypatch, error, status):
    run = latency.run

    def failing(engine, task, options):
        if task == "edit":
            raise error
        return run(engine, task, options)

    monkeypatch.setattr(latency, "run", failing)
    assert latency.main(["--model", str(tiny_release), *QUICK, "--random-weights", "--json"]) == status
    summary = json.loads(capsys.readouterr().out)
    assert list(summary["tasks"]) == ["gen"] and summary["left"] == ["edit", "ask"] and not summary["passed"]
    assert str(error) in summary["error"]


def test_tells_what_the_dry_run_foresees_in_int8_too(tiny_release, capsys):
    arguments = ["--model", str(tiny_release), *QUICK, "--random-weights", "--tasks", "gen,edit", "--json", "--plan"]
    assert latency.main([*arguments, "--quant", "int8"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["quant"] == "int8"
    for name, task in summary["tasks"].items():
        found, looks = task["plan"], {"look"} if name == "edit" else set()
        assert set(found["stages"]) == {"condition", "sample", "decode"} | looks <= set(task["milliseconds"])
        assert all(stage["flop"] > 0 and stage["launches"] > 0 for stage in found["stages"].values())
        assert found["launches_a_round"] == found["stages"]["sample"]["launches"] / 2


def test_a_speed_decides_about_rounds_unless_they_are_given(tiny_release, capsys):
    arguments = ["--model", str(tiny_release), "--res", "192", "--tasks", "gen", "--json", "--random-weights"]
    arguments += ["--dtype", "fp32", "--device", "cpu", "--speed", "fast"]
    rounds = families.architecture("unipic")[1].rounds
    for more, expected in ([], round(0.75 * rounds)), (["--iters", "3"], 3):
        assert latency.main([*arguments, *more]) == 0
        summary = json.loads(capsys.readouterr().out)
        assert summary["speed"] == "fast" and len(summary["tasks"]["gen"]["round_milliseconds"]) == expected
    with pytest.raises(SystemExit):
        latency.main([*arguments, "--plan"])


def test_random_answers_have_the_asked_length(tiny_release, capsys):
    arguments = ["--model", str(tiny_release), *QUICK, "--random-weights", "--tasks", "ask", "--json"]
    assert latency.main([*arguments, "--repeat", "2"]) == 0
    assert "answer" in json.loads(capsys.readouterr().out)["tasks"]["ask"]["milliseconds"]


def call(total=100.0, compile_seconds=0.0, captures=0):
    return calls.Call({"sample": total - 5, "total": total}, [total / 2] * 2, compile_seconds, 0.1, captures, 7)


def test_the_first_run_is_told_apart_from_the_second_and_the_others():
    found = calls.summed_up([call(900, 1.5, 9), call(150, captures=32), call(90), call(110)], warm_up=2)
    assert found["milliseconds"] == {"sample": 95, "total": 100} and found["round_milliseconds"] == [50, 50]
    assert found["first_extra_milliseconds"] == 800 and found["second_extra_milliseconds"] == 50
    assert [one["captures"] for one in found["calls"]] == [9, 32, 0, 0] and found["unsettled"] == []


@pytest.mark.parametrize(
    ("runs", "broken"),
    [
        ([call(compile_seconds=2.0, captures=3)], 0),
        ([call(), call(compile_seconds=0.1)], 1),
        ([call(), call(captures=2), call(captures=2)], 1),
        ([call(), call(compile_seconds=0.1), call(compile_seconds=0.1, captures=1)], 3),
    ],
)
def test_compiling_and_capturing_has_an_end(runs, broken):
    assert len(calls.unsettled(runs)) == broken


def test_capturing_is_quick_and_graphs_are_few():
    slow, many = replace(call(), capture_seconds=0.45), replace(call(), replays=4000)
    assert calls.unsettled([slow, call()]) == ["capturing took 0.55 s, more than 0.5"]
    assert calls.unsettled([call(), many]) == ["a run replayed 4000 graphs, more than 3500"]


def test_a_run_tells_what_it_compiled_and_captured():
    counts = Counts(captures=5, replays=1, seconds=2.0)

    def once():
        counts.captures, counts.replays, counts.seconds = 8, 4, 2.5
        return {"sample": 40.0, "compile": 30.0, "capture": 500.0}, [20.0, 20.0]

    found = calls.watched(once, counts)
    assert (found.captures, found.replays, found.capture_seconds, found.compile_seconds) == (3, 3, 0.5, 0.03)
    assert set(found.milliseconds) == {"sample", "total"}


def test_capturing_without_end_fails_the_bench(tiny_release, monkeypatch, capsys):
    run = latency.run

    def capturing(engine, *arguments):
        engine.loaded.model.graphs.counts.captures += 1
        return run(engine, *arguments)

    monkeypatch.setattr(latency, "run", capturing)
    arguments = ["--model", str(tiny_release), *QUICK, "--random-weights", "--tasks", "gen", "--json"]
    assert latency.main([*arguments, "--warm-up", "1"]) == 0
    assert latency.main([*arguments, "--warm-up", "2"]) == 1
    said = capsys.readouterr()
    assert said.err == "gen: run 3 captured 1 graphs\n" and not json.loads(said.out.splitlines()[-1])["passed"]


def test_what_was_measured_counts_when_time_is_up(tiny_release, monkeypatch, capsys):
    run, runs = latency.run, []

    def interrupted(*arguments):
        runs.append(arguments)
        if len(runs) == 4:
            signal.raise_signal(signal.SIGTERM)
        return run(*arguments)

    monkeypatch.setattr(latency, "run", interrupted)
    before = signal.getsignal(signal.SIGTERM)
    arguments = ["--model", str(tiny_release), *QUICK, "--random-weights", "--repeat", "2", "--warm-up", "0", "--json"]
    try:
        assert latency.main(arguments) == 1
    finally:
        signal.signal(signal.SIGTERM, before)
    summary = json.loads(capsys.readouterr().out)
    assert [len(task["calls"]) for task in summary["tasks"].values()] == [2, 1]
    assert summary["left"] == ["edit", "ask"] and not summary["passed"]


def test_a_budget_is_for_weights_that_were_loaded(tiny_release, capsys):
    with pytest.raises(SystemExit, match="2"):
        latency.main(["--random-weights", "--vram", "4"])
    assert latency.main(["--model", str(tiny_release), *QUICK, "--vram", "4", "--ballast"]) == 2
    assert "ballast is for a GPU" in capsys.readouterr().err


def test_the_released_architecture_has_the_published_size():
    with torch.device("meta"):
        model = families.model("unipic").build(RELEASED)
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    assert round(millions) == 2563


@pytest.mark.skipif(
    not os.environ.get("UNIPIC_RUN_FULL"), reason="takes minutes to hours, by the CPU: set UNIPIC_RUN_FULL=1"
)
def test_full_size_on_the_cpu_stays_within_16_gib():
    command = [sys.executable, str(ROOT / "bench" / "latency.py"), "--model", "unipic", "--random-weights"]
    done = subprocess.run([*command, "--res", "256", "--iters", "2"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout.splitlines()[-1])
    assert list(summary["tasks"]) == ["gen", "edit", "ask"] and summary["peak_rss_bytes"] < 16 * 2**30
