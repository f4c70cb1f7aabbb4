"""Every kernel in Triton's interpreter, over all cases of its operator that are marked for it."""

import os

import pytest
import torch
from unipic_run.bench.agreement import agreement
from unipic_run.bench.interpreter import exact_bfloat16
from unipic_run.kernels._op import (
    HAS_TRITON,
    OPERATORS,
    Case,
    Cost,
    Operator,
    interpreted,
    launch,
    recording,
    tl,
    triton,
)
from unipic_run.kernels._registry import Check, checks

INTERPRETS = HAS_TRITON and os.environ.get("TRITON_INTERPRET") == "1"
needs_the_interpreter = pytest.mark.skipif(
    not INTERPRETS, reason="needs triton and TRITON_INTERPRET=1, which conftest.py sets where there is no CUDA device"
)


def poisoned(make):
    """A factory whose tensors hold what no kernel should leave there."""

    def filled(*args, **kwargs):
        x = make(*args, **kwargs)
        return x.fill_(float("nan") if x.is_floating_point() else 85)

    return filled


@pytest.fixture
def poison(monkeypatch):
    """Outputs that a kernel does not write are found out."""
    for name in ("empty", "empty_like", "empty_strided"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))


@needs_the_interpreter
@pytest.mark.parametrize("check", checks("interp"), ids=str)
def test_kernel_agrees_with_its_reference(check, poison):
    with interpreted(), exact_bfloat16(), recording() as launches:
        found = agreement(check, "cpu")
    assert found.holds, f"{found}"
    tensors = [x for x in check.case.make("cpu") if isinstance(x, torch.Tensor)]
    assert launches or not all(x.numel() for x in tensors), "no kernel ran"


def test_every_operator_is_checked_compiled_and_timed():
    for mark in ("interp", "aot", "gpu"):
        missing = set(OPERATORS.values()) - {check.operator for check in checks(mark)}
        assert not missing, f"no case marked {mark}: {[operator.name for operator in missing]}"


@triton.jit
def _forgetful_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(y_ptr + at, tl.load(x_ptr + at, mask=at < n), mask=at < n - 1)


def _forgetful(x):
    y = torch.empty_like(x)
    launch(_forgetful_kernel, (1,), x, y, len(x), BLOCK=16)
    return y


@needs_the_interpreter
def test_an_element_that_no_kernel_writes_is_found_out(poison):
    operator = Operator("planted_copy(Tensor x) -> Tensor", torch=torch.clone, triton=_forgetful, cost=Cost)
    try:
        with interpreted():
            check = Check(operator, Case("the last element is left out", lambda device: (torch.ones(9),)), torch.clone)
            found = agreement(check, "cpu")
    finally:
        del OPERATORS["unipic::planted_copy"]
    assert not found.holds and found.kernel[0].mean == float("inf")
