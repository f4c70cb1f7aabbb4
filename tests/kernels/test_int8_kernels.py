"""8-bit products and the quantiser in front of them, where the operators' common cases do not reach."""

import os

import pytest
import torch
import torch.nn.functional as F
from unipic_run.bench.interpreter import exact_bfloat16
from unipic_run.kernels import int8_linear as linear_file
from unipic_run.kernels import int8_weight as weight_file
from unipic_run.kernels import quantise as quantise_file
from unipic_run.kernels._op import HAS_TRITON, interpreted, recording
from unipic_run.kernels._product import check_product, fewest_clocks
from unipic_run.kernels.int8_linear import TILES, int8_linear, int8_linear_ref
from unipic_run.kernels.int8_weight import int8_weight_linear, int8_weight_ref
from unipic_run.kernels.quantise import group_of, quantise, quantise_rows, rotated, walsh_hadamard

SHARED_ON_SM89 = 101376  # bytes a block may have
needs_the_interpreter = pytest.mark.skipif(
    not HAS_TRITON or os.environ.get("TRITON_INTERPRET") != "1",
    reason="needs triton and TRITON_INTERPRET=1, which conftest.py sets where there is no CUDA device",
)


def integers(*shape: int) -> torch.Tensor:
    return torch.randint(-127, 128, shape, dtype=torch.int8)


def scales(n: int) -> torch.Tensor:
    return (torch.rand(n) + 0.5) / 512


def in_triton(function, *arguments, **named):
    with interpreted(), exact_bfloat16(), recording() as launches:
        y = function(*arguments, **named)
    assert launches
    return y


def relative(y: torch.Tensor, exact: torch.Tensor) -> float:
    return ((y.double() - exact).norm() / exact.norm()).item()


@needs_the_interpreter
@pytest.mark.parametrize("activation", ["none", "swiglu"])
@pytest.mark.parametrize("candidate", TILES, ids=str)
def test_every_tile_with_all_its_tails(candidate, activation, monkeypatch):
    monkeypatch.setattr(linear_file, "TILES", (candidate,))
    torch.manual_seed(0)
    block_m, block_n, block_k, *_ = candidate
    n, outputs = (block_n + 6, block_n // 2 + 3) if activation == "swiglu" else (block_n + 5, block_n + 5)
    x, weight = integers(block_m + 3, 2 * block_k + 16), integers(n, 2 * block_k + 16)
    given = (x, scales(block_m + 3), weight, scales(n), torch.randn(n), activation, torch.randn(block_m + 3, outputs))
    y = in_triton(int8_linear, *given, dtype=torch.float32)
    assert relative(y, int8_linear_ref(*given, None)) < 1e-6


@needs_the_interpreter
def test_sums_are_whole_numbers_on_both_paths():
    torch.manual_seed(0)
    x, weight = integers(3, 3000) // 16 + 100, integers(20, 3000) // 16 + 100  # sums beyond 2^24
    exact = (x.long() @ weight.long().T).float()
    one = torch.ones
    assert exact.abs().max() > 2**24
    for y in (in_triton, lambda f, *a, **k: f(*a, **k)):
        assert torch.equal(y(int8_linear, x, one(3), weight, one(20), dtype=torch.float32), exact)


@needs_the_interpreter
def test_a_row_does_not_depend_on_the_others():
    torch.manual_seed(0)
    x, x_scale, weight, scale = integers(40, 64), scales(40), integers(96, 64), scales(96)
    whole = in_triton(int8_linear, x, x_scale, weight, scale, activation="gelu")
    assert torch.equal(in_triton(int8_linear, x[17:18], x_scale[17:18], weight, scale, activation="gelu"), whole[17:18])


@pytest.mark.parametrize("path", [pytest.param("triton", marks=needs_the_interpreter), "torch"])
def test_swiglu_takes_gate_and_up_one_after_the_other(path):
    torch.manual_seed(0)
    call = in_triton if path == "triton" else lambda f, *a, **k: f(*a, **k)
    x, x_scale, gate, up, scale = integers(5, 32), scales(5), integers(8, 32), integers(8, 32), scales(16)
    y = call(int8_linear, x, x_scale, torch.cat([gate, up]), scale, activation="swiglu", dtype=torch.float32)
    a = call(int8_linear, x, x_scale, gate, scale[:8], dtype=torch.float32)
    b = call(int8_linear, x, x_scale, up, scale[8:], dtype=torch.float32)
    torch.testing.assert_close(y, F.silu(a) * b)


@needs_the_interpreter
@pytest.mark.parametrize("split", [1, 2, 3, 5])
@pytest.mark.parametrize("rows", [1, 4])
def test_programs_that_share_k(split, rows, monkeypatch):
    monkeypatch.setattr(weight_file, "tile", lambda m, n, k, dtype: (4 if m == 1 else 16, 32, split))
    torch.manual_seed(0)
    # With 5 programs the last one finds nothing left of K.
    given = (torch.randn(rows, 100), integers(22, 100), scales(22), torch.randn(22), "swiglu", torch.randn(rows, 11))
    assert relative(in_triton(int8_weight_linear, *given), int8_weight_ref(*given, None)) < 1e-6


@needs_the_interpreter
@pytest.mark.parametrize("activation", ["none", "gelu", "gelu_tanh", "silu", "swiglu"])
def test_rows_in_pieces_are_the_rows_in_one(activation, monkeypatch):
    torch.manual_seed(0)
    x = torch.randn(3, 202)
    x[1] = 0
    whole, scale = in_triton(quantise, x, activation)
    monkeypatch.setattr(quantise_file, "WHOLE_ROW", 64)
    pieces = in_triton(quantise, x, activation)
    assert torch.equal(pieces[0], whole) and torch.equal(pieces[1], scale)
    assert not whole[1].any() and scale.isfinite().all() and (scale > 0).all()
    exact = quantise_file.activated(x.double(), activation)
    assert ((whole * scale[:, None] - exact).abs() <= 0.5001 * scale[:, None] + 1e-6).all()
    assert (whole[[0, 2]].abs().amax(1) == 127).all()


@needs_the_interpreter
@pytest.mark.parametrize("path", ["triton", "torch"])
@pytest.mark.parametrize("whole_row", [8192, 256])
def test_groups_of_columns_are_rotated(whole_row, path, monkeypatch):
    monkeypatch.setattr(quantise_file, "WHOLE_ROW", whole_row)
    torch.manual_seed(0)
    call = in_triton if path == "triton" else lambda f, *a: f(*a)
    x = torch.randn(3, 2 * 320)
    matrix = walsh_hadamard(torch.eye(64, dtype=torch.float64), 64)
    assert matrix.abs().eq(1).all() and torch.equal(matrix @ matrix, 64 * torch.eye(64).double())
    exact = (F.silu(x[:, :320]).double() * x[:, 320:].double()).view(3, 5, 64) @ matrix / 8
    y = call(rotated, x, "swiglu", 64)
    assert relative(y, exact.view(3, 320)) < 1e-6
    whole, scale = call(quantise, x, "swiglu", 64)
    assert torch.allclose(scale, y.abs().amax(1) / 127)
    assert ((whole - y / scale[:, None]).abs() <= 0.501).all()


def test_groups_that_do_not_fit_are_refused():
    assert [group_of(width) for width in (8960, 512, 96, 37)] == [128, 128, 32, 1]
    for group in (0, 3, 64, 256):
        with pytest.raises(ValueError, match=f"group {group} is no power of two up to 128 that divides 96 columns"):
            quantise(torch.ones(2, 192), "swiglu", group)


def test_operands_that_a_kernel_would_read_beyond_are_refused():
    x, weight, scale = torch.ones(4, 32, dtype=torch.int8), torch.ones(8, 32, dtype=torch.int8), torch.ones(8)
    check_product(x, weight, scale, scale, "none", None, torch.ones(2, 8))
    check_product(x[:0], weight, scale, None, "none", None, torch.ones(0, 8))
    for bias, gate, said in (
        (None, torch.ones(0, 8), r"gate is \(0, 8\), not \(G, 8\) where G divides 4 rows"),
        (None, torch.ones(3, 8), "where G divides 4 rows"),
        (None, torch.ones(8, 2).T, r"gate has strides \(1, 2\): its last dimension has to be dense"),
        (torch.ones(1).expand(8), None, r"bias has strides \(0,\): its last dimension has to be dense"),
        (torch.ones(7), None, r"bias is \(7,\), not \(8,\)"),
    ):
        with pytest.raises(ValueError, match=said):
            check_product(x, weight, scale, bias, "none", None, gate)


def test_halves_are_rounded_away_from_zero():
    whole, scale = quantise_rows(torch.tensor([[127.0, 0.5, -0.5, 1.5, -2.5, 0.49]]))
    assert scale.tolist() == [1.0] and whole.tolist() == [[127, 1, -1, 2, -3, 0]]


def test_tiles_fit_their_card_and_their_shapes():
    for block_m, block_n, block_k, _, stages in TILES:
        assert (block_m + block_n) * 2 * block_k * (stages - 1) <= SHARED_ON_SM89
    assert fewest_clocks(TILES, 8320, 17920) == TILES[0]
    assert fewest_clocks(TILES, 10, 1536) == TILES[-1]
    assert fewest_clocks(TILES, 400, 1536)[0] < 128, "tiles of 128 rows leave most of the card idle"


def test_what_does_not_fit_is_said():
    x, x_scale, weight, scale = integers(4, 32), scales(4), integers(8, 32), scales(8)
    for message, given, named in (
        ("agree", (x[:, :16], x_scale, weight, scale), {}),
        ("contiguous", (x[:, :8], x_scale, weight.T[:, :8], scale), {}),
        ("'relu'", (x, x_scale, weight, scale), {"activation": "relu"}),
        ("x_scale is", (x, x_scale[:3], weight, scale), {}),
        ("weight_scale is", (x, x_scale, weight, scale[:4]), {}),
        ("residual is", (x, x_scale, weight, scale), {"residual": torch.ones(8)}),
        ("divides 4 rows", (x, x_scale, weight, scale), {"gate": torch.ones(3, 8)}),
        ("not \\(G, 4\\)", (x, x_scale, weight, scale), {"gate": torch.ones(4, 8), "activation": "swiglu"}),
    ):
        with pytest.raises(ValueError, match=message):
            int8_linear(*given, **named)
    with pytest.raises(ValueError, match="more than 16 rows"):
        int8_weight_linear(torch.ones(17, 32), weight, scale)
