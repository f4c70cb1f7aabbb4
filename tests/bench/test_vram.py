"""The memory bench: fresh processes, gates against a baseline, and one sentence where there is no GPU."""

import json

import pytest
import torch
from unipic_run.bench import vram

MIB = 2**20


def test_without_a_gpu_it_says_so_and_succeeds(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert vram.main([]) == 0
    said, last = capsys.readouterr().out.splitlines()
    assert said.startswith("no CUDA device") and json.loads(last)["skipped"] == said


def test_scenarios_run_in_processes_and_make_a_baseline(tiny_release, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    arguments = ["--model", str(tiny_release), "--device", "cpu", "--dtype", "fp32", "--res", "32", "--iters", "1"]
    arguments += ["--scenarios", "gen", "--baselines", str(tmp_path)]
    assert vram.main([*arguments, "--update-baseline"]) == 0
    (baseline,) = tmp_path.glob("*.json")
    assert json.loads(baseline.read_text())["scenarios"]["gen-32"]["process_rss_bytes"] > 0
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert summary["passed"] and summary["scenarios"]["gen-32"]["milliseconds"]["total"] > 0


def test_what_is_simulated_is_held_to_its_baseline(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("UNIPIC_RUN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(vram, "SIMULATED", {"small": ("gen", {"res": 256, "steps": 2}, 5.5)})
    arguments = ["--simulate", "--baselines", str(tmp_path)]
    assert vram.main([*arguments, "--update-baseline"]) == vram.main(arguments) == 0
    baseline = tmp_path / "simulated.json"
    known = json.loads(baseline.read_text())
    known["scenarios"]["small"]["allocated_bytes"] //= 2
    baseline.write_text(json.dumps(known))
    assert vram.main(arguments) == 1
    monkeypatch.setattr(vram, "SIMULATED", {"small": ("gen", {"res": 256, "steps": 2}, 0.5)})
    assert vram.main(arguments) == 1
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert "0.5 are meant" in last["failures"][0] and "not simulated: small" in last["failures"][1]


def test_a_failing_scenario_is_a_failure(tmp_path, capsys):
    arguments = ["--model", str(tmp_path), "--device", "cpu", "--scenarios", "ask", "--baselines", str(tmp_path)]
    assert vram.main(arguments) == 1
    assert "ask-1024" in json.loads(capsys.readouterr().out.splitlines()[-1])["failures"][0]


@pytest.mark.parametrize(
    ("allocated", "reserved", "broken"),
    [(1016, 1030, 0), (1017, 1000, 1), (1000, 1031, 1), (5000, 5000, 2)],
)
def test_gates(allocated, reserved, broken):
    before = {"allocated_bytes": 1000 * MIB, "reserved_bytes": 1000 * MIB}
    now = {"allocated_bytes": allocated * MIB, "reserved_bytes": reserved * MIB}
    assert len(vram.exceeded(now, before)) == broken
    assert vram.exceeded(now, {}) == []
