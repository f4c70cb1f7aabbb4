"""Kernel files where there is no Triton, or it is switched off: they import, plain torch does the work, and dry runs
count what kernels would be launched elsewhere.
"""

import os
import subprocess
import sys

import pytest
from unipic_run.kernels._op import HAS_TRITON

ABSENT = """
import sys
sys.modules["triton"] = None
"""
CODE = """
import torch
from unipic_run import Engine
from unipic_run.engine.models.unipic import model
from unipic_run.kernels import _op, _registry
operators = {check.operator.name: check.operator for check in _registry.checks("interp")}
assert not _op.HAS_TRITON and all(operator.broken for operator in operators.values())
x = torch.randn(2, 8)
plain = operators["norm"](x, None, None, None, None, 1e-6, False)
torch.testing.assert_close(plain, torch.nn.functional.layer_norm(x, (8,), eps=1e-6))
"""
COUNT = """
from unipic_run.kernels import _op, _registry
for check in _registry.checks("aot"):
    given = check.case.make("meta")
    with _op.recording() as launches:
        check.operator.op(*given)
    print(check, [launch.grid for launch in launches], check.operator.cost(*given))
"""


def run(code: str, folder, triton: str) -> str:
    environment = os.environ | {"UNIPIC_RUN_TRITON": triton}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(("before", "switch"), [(ABSENT, "1"), ("", "0")], ids=["absent", "switched off"])
def test_kernels_import_and_torch_works(tmp_path, before, switch):
    run(before + CODE, tmp_path, switch)


@pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")
def test_dry_runs_count_the_same_launches(tmp_path):
    with_it, without = run(COUNT, tmp_path, "1"), run(ABSENT + COUNT, tmp_path, "1")
    assert with_it.count("\n") > 100 and without == with_it
