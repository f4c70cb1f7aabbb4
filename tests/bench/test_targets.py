"""The targets of a picture's time, with invented logs."""

import json

import pytest
import torch
from unipic_run.bench import targets

BF16 = {"model": "unipic", "res": 1024, "iters": 32, "batch": 1, "device_name": "a card", "dtype": "bf16"}
PLAN = {"stages": {"sample": {"flop": 4e14}, "decode": {"flop": 1e14}}, "roof_flop_per_second": 1e14}  # 5 s at best


def log(path, seconds, quant="none", **other):
    found = {"milliseconds": {"total": 1000 * seconds}, "plan": PLAN}
    path.write_text("a line before\n" + json.dumps(BF16 | {"quant": quant, "tasks": {"gen": found}} | other))
    return str(path)


@pytest.mark.parametrize(
    ("exact", "eight", "met"),
    [(6.7, 3.3, [True, True]), (6.8, 3.3, [False, True]), (6.7, 3.4, [True, False])],
)
@pytest.mark.parametrize("capability", [(8, 9), (9, 0)])
def test_targets_are_asked_of_sm_89(tmp_path, capsys, monkeypatch, exact, eight, met, capability):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    status = targets.main([log(tmp_path / "bf16.log", exact), log(tmp_path / "int8.log", eight, "int8")])
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [row["met"] for row in summary["targets"]] == met
    assert summary["targets"][0]["value"] == pytest.approx(exact / 5)
    assert status == (capability == (8, 9) and not all(met)) and summary["passed"] == (not status)


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"quant": "none"}, "not of bf16 with int8"),
        ({"res": 512}, "different pictures: res"),
        ({"tasks": {}}, "int8: no picture with its plan was measured"),
    ],
)
def test_logs_that_do_not_belong_together_are_refused(tmp_path, capsys, monkeypatch, other, said):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 9))
    eight = log(tmp_path / "int8.log", 3.0, **({"quant": "int8"} | other))
    assert targets.main([log(tmp_path / "bf16.log", 6.0), eight]) == 2
    assert said in json.loads(capsys.readouterr().out.splitlines()[-1])["problem"]


def test_predictions_are_held_to_their_limits(capsys, monkeypatch):
    def estimate(model, task, res, gpu, shortcuts, quant="none", attention="auto"):
        eight = {"exact": 3.4, "balanced": 1.5, "fast": 1.1}[shortcuts["speed"]]
        return {"gpu": gpu, "placement": {"seconds": eight if (quant, attention) == ("int8", "int8-qk") else 7.0}}

    monkeypatch.setattr(targets, "estimate", estimate)
    assert targets.main(["--predict"]) == 1, "UniPic's are 6.8, 2.6, and 1.0 at its fastest"
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    missed = [row["target"].partition(", seconds")[0] for row in summary["targets"] if not row["met"]]
    assert missed == ["unipic in bf16, exact", "unipic in int8, exact", "unipic in int8, fast"]
    assert len(summary["targets"]) == len(targets.PREDICTED) and not summary["passed"]


@pytest.mark.parametrize(("seconds", "status"), [(2.5, 0), (3.09, 0), (3.11, 1)])
def test_a_known_miss_is_told_and_may_not_grow(capsys, monkeypatch, seconds, status):
    row = ("unipic", targets.EIGHT, "exact", 2.6)
    monkeypatch.setattr(targets, "PREDICTED", [row])
    monkeypatch.setattr(targets, "estimate", lambda *_, **__: {"gpu": "x", "placement": {"seconds": seconds}})
    assert targets.main(["--predict"]) == status
    said, last = capsys.readouterr().out.splitlines()
    assert json.loads(last)["targets"][0]["met"] == (seconds < 2.6)
    assert ("as is known" in said) == (seconds == 3.09)
