"""Kernel files where there is no Triton, or it is switched off: they import, and plain torch does the work."""

import os
import subprocess
import sys

import pytest

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


@pytest.mark.parametrize(("before", "switch"), [(ABSENT, "1"), ("", "0")], ids=["absent", "switched off"])
def test_kernels_import_and_torch_works(tmp_path, before, switch):
    environment = os.environ | {"UNIPIC_RUN_TRITON": switch}
    command = [sys.executable, "-c", before + CODE]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
