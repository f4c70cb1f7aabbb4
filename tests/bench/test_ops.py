"""The operator bench without a card, its arithmetic with a stand-in for the clock, and once on a real one."""

import json

import pytest
import torch
from unipic_run.bench import ops
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
    assert " 1000.0    1000.0        25" in ops.line({"check": str(check), "problem": "", **row})


def test_what_a_run_writes_is_undone():
    check = next(c for c in checks("interp") if c.operator.name == "ddpm_update")
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
