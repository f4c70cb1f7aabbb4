"""The memory bench: fresh processes, gates with a table of what broke, refusal beside others."""

import json
import sys

import pytest
import torch
from unipic_run.bench import vram, vram_gates, vram_measured, vram_watch
from unipic_run.bench.vram_scenarios import SCENARIOS, Scenario, changed
from unipic_run.engine.errors import BudgetError

MIB, GIB = 2**20, 2**30
CARD = {"name": "NVIDIA GeForce RTX 4090", "uuid": "1-2", "total_bytes": 24 * GIB}


def last(capsys) -> dict:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


# ---- without a GPU


def test_without_a_gpu_it_says_so_and_succeeds(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert vram.main([]) == 0
    said, summary = capsys.readouterr().out.splitlines()
    assert said.startswith("no CUDA device") and json.loads(summary)["skipped"] == said


def test_a_scenario_loads_a_checkpoint_in_a_process_of_its_own(tiny_release, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("UNIPIC_RUN_CACHE", str(tmp_path))
    arguments = ["--model", str(tiny_release), "--device", "cpu", "--dtype", "fp32", "--res", "32", "--iters", "1"]
    arguments += ["--repeats", "1", "--baselines", str(tmp_path), "--scenarios"]
    assert vram.main([*arguments, "gen-int8"]) == 0
    report = last(capsys)["scenarios"]["gen-int8@unipic-tiny,32,1,fp32"]
    assert report["milliseconds"]["total"] > 0 and report["load_seconds"] > 0 and report["processes"] == 1
    if sys.platform == "linux":
        assert 10 * MIB < report["host_bytes"] <= report["process_rss_bytes"]
    monkeypatch.setattr(vram, "random_checkpoint", lambda *_: 0)  # writes nothing
    assert vram.main([*arguments, "ask-int8"]) == 1
    assert "unipic-tiny" in last(capsys)["errors"][0]
    assert not list(tmp_path.glob("*.json"))


def test_a_run_that_captured_too_long_is_measured_and_one_that_failed_is_not():
    measured = {"memory": {"allocated_bytes": 5}, "stage_memory": {}, "milliseconds": {}, "unsettled": ["0.7 s"]}
    said = {"tasks": {"gen": measured}, "load": {"memory": None, "seconds": 1}, "warnings": []}
    said |= {"left": [], "ballast_bytes": 0, "graphs": {"captures": 0}, "peak_rss_bytes": 9, "versions": {}}
    seen, text = vram_watch.Seen(), f"a line\n{json.dumps(said)}\n"
    found = vram_measured.told(vram_watch.Done(vram_measured.UNSETTLED, text, "0.7 s", seen), "gen")
    assert found["allocated_bytes"] == 5 and found["unsettled"] == ["0.7 s"] and "error" not in found
    half = json.dumps(said | {"left": ["gen"], "error": "too little"})  # one run of two
    for done in (vram_watch.Done(status, out, "too little", seen) for status, out in ((3, text), (1, ""), (1, half))):
        assert vram_measured.told(done, "gen") == {"error": "too little"}


def test_what_is_simulated_is_held_to_its_baseline(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("UNIPIC_RUN_CACHE", str(tmp_path / "cache"))
    small = {"small": Scenario("small", "gen", 5.5, res=256, rounds=2)}
    monkeypatch.setattr(vram, "SCENARIOS", small)
    arguments = ["--simulate", "--baselines", str(tmp_path)]
    assert vram.main([*arguments, "--update"]) == vram.main(arguments) == 0
    baseline = tmp_path / "simulated.json"
    known = json.loads(baseline.read_text())
    known["scenarios"]["small"]["allocated_bytes"] //= 2
    baseline.write_text(json.dumps(known))
    assert vram.main(arguments) == 1
    (row,) = last(capsys)["broken"]
    assert row["scenario"] == "small" and row["what"] == "allocated"
    monkeypatch.setitem(small, "small", Scenario("small", "gen", 0.5, res=256, rounds=2))
    assert vram.main(arguments) == 1
    assert "are the least this takes" in last(capsys)["errors"][0]


def test_a_scenario_that_no_longer_exists_must_leave_the_baseline(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(vram, "SCENARIOS", {"small": Scenario("small", "gen", 5.5)})
    placement = {"peak_bytes": GIB, "reserved_bytes": GIB, "seconds": 1.0, "line": "all resident"}
    monkeypatch.setattr(vram, "estimate", lambda *_, **__: {"placement": placement})
    (tmp_path / "simulated.json").write_text(json.dumps({"scenarios": {"old": {}}}))
    arguments = ["--simulate", "--baselines", str(tmp_path)]
    assert vram.main(arguments) == 1
    gone, new = last(capsys)["errors"]
    assert gone.startswith("old: in the baseline") and new.startswith("no baseline in simulated.json for small")
    assert vram.main([*arguments, "--update"]) == vram.main(arguments) == vram.main([*arguments, "--res", "512"]) == 0
    assert vram.main([*arguments, "--res", "512", "--update"]) == 0
    assert {*json.loads((tmp_path / "simulated.json").read_text())["scenarios"]} == {"small", "small@512"}


# ---- the way of a GPU, through stand-ins


def told(allocated: float = 3000, **more) -> dict:
    """What bench/latency.py says of one run, peaks in MiB."""
    peak = {"allocated_bytes": int(allocated * MIB), "reserved_bytes": 3200 * MIB}
    placement = {"line": "all resident", "peak_bytes": 2990 * MIB, "peaks": {"sample": 2990 * MIB}, "seconds": 1.0}
    gen = {"memory": peak, "stage_memory": {"sample": peak}, "milliseconds": {"total": 9.0}, "placement": placement}
    gen["unsettled"] = []
    load = {"seconds": 3.0, "memory": {"allocated_bytes": 2500 * MIB, "reserved_bytes": 2600 * MIB}}
    report = {"tasks": {"gen": gen}, "left": [], "load": load, "ballast_bytes": 20 * GIB, "graphs": {"captures": 3}}
    return report | {"warnings": [], "peak_rss_bytes": GIB, "versions": {}} | more


@pytest.fixture
def gpu(monkeypatch, tmp_path, driver):
    """run(stdouts, *arguments): the exit status of a measurement of gen-int8 whose processes print these."""
    driver()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(vram, "the_card", lambda: CARD)
    monkeypatch.setattr(vram, "random_checkpoint", lambda *_: 5 * GIB)
    monkeypatch.setattr(vram, "predicted", lambda *_: {"graphs": {"kept": 6 * MIB}, "workspace_bytes": 4 * MIB})
    monkeypatch.setenv("UNIPIC_RUN_CACHE", str(tmp_path))

    def run(reports, *arguments, seen=None):
        seen = seen or {"nvml_bytes": 20 * GIB + 3800 * MIB, "host_bytes": 6 * GIB}
        each = iter(reports)

        def watched(command, *_):
            assert {"--ballast", "--vram", "--json"} <= set(command)
            return vram_watch.Done(0, json.dumps(next(each)), "", vram_watch.Seen(**seen))

        monkeypatch.setattr(vram_measured, "run_watched", watched)
        return vram.main(["--scenarios", "gen-int8", "--baselines", str(tmp_path), *arguments])

    return run


def test_medians_go_to_the_baseline_and_growth_beyond_it_fails(gpu, tmp_path, capsys):
    assert gpu([told(2990), told(3000), told(3100)], "--update") == 0
    report = last(capsys)["scenarios"]["gen-int8"]
    assert report["spread"]["allocated_bytes"] == [2990 * MIB, 3100 * MIB]
    assert report["stages"]["sample"]["allocated_bytes"] == report["allocated_bytes"] == 3000 * MIB
    assert report["nvml_bytes"] == 3800 * MIB  # without the ballast
    assert report["predicted_bytes"] == 3000 * MIB and report["load_bytes"] == 2500 * MIB
    baseline = json.loads((tmp_path / "nvidia-geforce-rtx-4090.json").read_text())
    assert baseline["device_name"] == CARD["name"] and baseline["scenarios"]["gen-int8"]["nvml_bytes"] == 3800 * MIB
    assert gpu([told(3030)] * 3) == 0
    capsys.readouterr()
    assert gpu([told(3031)] * 3) == 1
    said = capsys.readouterr()
    assert json.loads(said.out.splitlines()[-1])["broken"][0]["now"] == "3031 MiB"
    head, row = said.err.splitlines()
    assert head.split() == ["scenario", "what", "was", "is", "allowed"]
    assert row.split() == ["gen-int8", "allocated", "3000", "MiB", "3031", "MiB", "3030", "MiB"]


def test_a_driver_that_shows_no_process_is_no_failure_and_is_said(gpu, capsys):
    assert gpu([told()] * 3, seen={"nvml_missing": "not here", "host_bytes": GIB}) == 0
    said = capsys.readouterr().out
    assert "driver not measured: not here" in said
    report = json.loads(said.splitlines()[-1])["scenarios"]["gen-int8"]
    assert report["nvml_bytes"] is None and report["nvml_missing"] == "not here"


def test_refuses_to_measure_beside_others(gpu, driver, capsys):
    driver(processes=[(77, 500 * MIB)])
    assert gpu([]) == 2
    assert "pid 77 game 500 MiB" in last(capsys)["refused"]
    assert gpu([told()] * 3, "--shared") == 0
    with pytest.raises(SystemExit, match="2"):
        gpu([], "--shared", "--update")
    driver(hidden=2 * GIB)
    assert gpu([]) == 2


def test_what_ran_but_was_foreseen_not_to_fit_fails(gpu, monkeypatch, capsys):
    def refuses(*_):
        raise BudgetError("2.10 GiB of GPU memory are the least this takes")

    monkeypatch.setattr(vram, "predicted", refuses)
    assert gpu([told()] * 3) == 1
    assert "foreseen not to fit: 2.10 GiB" in last(capsys)["errors"][0]


def test_a_run_that_went_on_in_less_memory_fails(gpu, capsys):
    assert gpu([told(warnings=["out of memory: going on with llm streamed"])] + [told()] * 2) == 1
    assert last(capsys)["broken"][0]["what"] == "ran out of memory"


# ---- gates

FINE = {"allocated_bytes": 1000 * MIB, "reserved_bytes": 1000 * MIB, "nvml_bytes": 1000 * MIB}


@pytest.mark.parametrize(
    ("now", "what"),
    [
        ({"allocated_bytes": 1016}, ()),
        ({"allocated_bytes": 1017}, ("allocated",)),
        ({"reserved_bytes": 1030}, ()),
        ({"reserved_bytes": 1031}, ("reserved",)),
        ({"nvml_bytes": 1128}, ()),
        ({"nvml_bytes": 1129}, ("nvml",)),
        ({"nvml_bytes": None}, ()),
        ({"allocated_bytes": 2049}, ("allocated", "allocated, published")),
        ({"predicted_bytes": 950}, ()),
        ({"predicted_bytes": 949}, ("allocated, predicted: the simulation is wrong",)),
        ({"predicted_bytes": 1051}, ("allocated, predicted: the simulation is wrong",)),
        ({"planning_seconds": 19 / MIB, "planning_again_seconds": 0.29 / MIB}, ()),
        ({"planning_seconds": 21 / MIB}, ("planning",)),
        ({"planning_again_seconds": 0.31 / MIB}, ("planning again",)),
        ({"load_bytes": 1000}, ()),
        ({"load_bytes": 1001}, ("allocated while loading, above running",)),
        ({"checkpoint_bytes": 100, "host_bytes": 2148}, ()),
        ({"checkpoint_bytes": 100, "host_bytes": 2149}, ("host memory, beside the checkpoint",)),
    ],
)
def test_gates(now, what):
    report = FINE | {name: value and value * MIB for name, value in now.items()}
    scenario = Scenario("gen", "gen", 2.0)
    assert tuple(row.what for row in vram_gates.broken(scenario, report, FINE)) == what
    if what == ("allocated",):
        assert not [*vram_gates.broken(scenario, report, {})]


def test_large_peaks_may_grow_by_their_share():
    before = {"allocated_bytes": 10000 * MIB, "nvml_bytes": 10000 * MIB}
    assert not [*vram_gates.grown({"allocated_bytes": 10100 * MIB, "nvml_bytes": 10500 * MIB}, before)]
    assert len([*vram_gates.grown({"allocated_bytes": 10101 * MIB, "nvml_bytes": 10501 * MIB}, before)]) == 2


def test_a_tight_card_may_cost_so_much_time_and_no_more():
    assert SCENARIOS["gen-int8-tight"].at_most == ("gen-int8", 2.0) and SCENARIOS["gen-int8-tight"].card == 2.0
    times = {"gen-int8": {"seconds": 1.0}, "gen-int8-tight": {"seconds": 2.0}}
    assert not [*vram_gates.slower(SCENARIOS, times)]
    (row,) = vram_gates.slower(SCENARIOS, times | {"gen-int8-tight": {"seconds": 2.1}})
    assert row.scenario == "gen-int8-tight" and not [*vram_gates.slower(SCENARIOS, {"gen-int8-tight": {"seconds": 9}})]


def test_what_is_changed_of_a_scenario_has_a_name_of_its_own_and_its_card():
    one = changed(SCENARIOS["gen-int8"], res=256, model="some/folder/", dtype=None)
    assert (one.name, one.res, one.published) == ("gen-int8@256,folder", 256, None)
    assert one.card == SCENARIOS["gen-int8"].card and changed(one, res=None) is one
