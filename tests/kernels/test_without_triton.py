"""Kernel files where there is no Triton: they import, and plain torch does the work."""

import subprocess
import sys

CODE = """
import sys
sys.modules["triton"] = None
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


def test_kernels_import_and_torch_works(tmp_path):
    done = subprocess.run([sys.executable, "-c", CODE], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
