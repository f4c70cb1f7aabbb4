"""Products that a CPU would compute in software take the way through float32, and stay within the dtype's rounding."""

import pytest
import torch
import torch.nn.functional as F
from unipic_run.kernels import linear as kernels


@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("rows", [1, 31, 32, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_linear(native: bool, rows: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_native", lambda dtype: native)
    torch.manual_seed(0)
    x, weight, bias = (torch.randn(*shape).to(dtype) for shape in ((2, rows, 48), (24, 48), (24,)))
    expected = F.linear(x.double(), weight.double(), bias.double())
    for b in (bias, None):
        got = kernels.linear(x, weight, b)
        assert got.dtype == dtype
        torch.testing.assert_close(
            got.double(), expected if b is not None else expected - bias.double(), atol=0.1, rtol=1e-2
        )


@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_onto_a_residual(native: bool, dense: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_native", lambda dtype: native)
    torch.manual_seed(0)
    x, weight, residual = (torch.randn(*shape).to(dtype) for shape in ((2, 50, 48), (24, 48), (2, 50, 24)))
    if not dense:
        residual = residual.transpose(0, 1).contiguous().transpose(0, 1)
    expected = residual.double() + x.double() @ weight.double().T
    before, in_place = residual.clone(), dense and (native or dtype == torch.float32)
    with torch.no_grad():
        got = kernels.linear_onto(residual, x, weight)
    assert got.shape == residual.shape and got.dtype == dtype
    roundings = torch.finfo(dtype).eps / 2 * (1 if in_place else 2)
    assert (got.double() - expected).abs().max() <= expected.abs().max() * roundings + 1e-5
    assert torch.equal(residual, got if in_place else before)


def test_a_residual_of_which_gradients_are_wanted_stays() -> None:
    residual, x, weight = torch.ones(3, 4, requires_grad=True), torch.ones(3, 5), torch.ones(4, 5, requires_grad=True)
    kernels.linear_onto(residual, x, weight).square().sum().backward()
    assert torch.equal(residual, torch.ones(3, 4)) and residual.grad is not None and weight.grad is not None


@pytest.mark.parametrize("native", [False, True])
def test_conv2d(native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_native", lambda dtype: native)
    torch.manual_seed(0)
    x, weight, bias = torch.randn(1, 3, 9, 8), torch.randn(5, 3, 3, 3), torch.randn(5)
    for stride, padding in ((1, 1), (2, 0)):
        expected = F.conv2d(x, weight, bias, stride, padding)
        torch.testing.assert_close(kernels.conv2d(x, weight, bias, stride, padding), expected)
        low = kernels.conv2d(x.bfloat16(), weight.bfloat16(), bias.bfloat16(), stride, padding)
        torch.testing.assert_close(low.float(), expected, atol=0.15, rtol=2e-2)


def test_only_emulated_arithmetic_takes_the_detour(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_native", lambda dtype: False)
    assert kernels.in_software(torch.zeros(1, dtype=torch.bfloat16))
    assert not kernels.in_software(torch.zeros(1))
    assert not kernels.in_software(torch.zeros(1, dtype=torch.bfloat16, device="meta"))
