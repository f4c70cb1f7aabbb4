"""The latency bench runs all tasks, on real and on random weights."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from unipic_run.bench import latency
from unipic_run.engine import families
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
    assert summary["versions"]["torch"] == torch.__version__


def test_tells_what_the_dry_run_foresees_in_int8_too(tiny_release, capsys):
    arguments = ["--model", str(tiny_release), *QUICK, "--random-weights", "--tasks", "gen,edit", "--json", "--plan"]
    assert latency.main([*arguments, "--quant", "int8"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["quant"] == "int8"
    for task in summary["tasks"].values():
        found = task["plan"]
        assert set(found["stages"]) == {"condition", "sample", "decode"} <= set(task["milliseconds"])
        assert all(stage["flop"] > 0 and stage["launches"] > 0 for stage in found["stages"].values())
        assert found["launches_a_round"] == found["stages"]["sample"]["launches"] / 2


def test_random_answers_have_the_asked_length(tiny_release, capsys):
    arguments = ["--model", str(tiny_release), *QUICK, "--random-weights", "--tasks", "ask", "--json"]
    assert latency.main([*arguments, "--repeat", "2"]) == 0
    assert "answer" in json.loads(capsys.readouterr().out)["tasks"]["ask"]["milliseconds"]


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
