"""8-bit products whose results or operands are whole numbers with several scales a row."""

import os
from functools import partial

import pytest
import torch
from unipic_run.bench.interpreter import exact_bfloat16
from unipic_run.bench.outliers import FASTER, SLOW, prefix_attention, relative, swiglu_groups
from unipic_run.kernels import int8_of_groups as of_file
from unipic_run.kernels import int8_to_groups as to_file
from unipic_run.kernels import int8_to_heads as heads_file
from unipic_run.kernels import int8_to_rotary as rotary_file
from unipic_run.kernels._op import HAS_TRITON, interpreted, recording
from unipic_run.kernels.int8_linear import int8_linear
from unipic_run.kernels.int8_of_groups import int8_linear_of_groups, int8_linear_of_groups_ref
from unipic_run.kernels.int8_to_groups import int8_linear_to_groups, int8_linear_to_groups_ref
from unipic_run.kernels.int8_to_heads import int8_linear_to_heads, int8_linear_to_heads_ref
from unipic_run.kernels.int8_to_rotary import int8_linear_to_rotary, int8_linear_to_rotary_ref
from unipic_run.kernels.keys_off import keys_off
from unipic_run.kernels.quantise_qkv import quantise_qkv_torch
from unipic_run.kernels.rotary_keys import rotary_keys_off

SHARED_ON_SM89 = 101376  # bytes a block may have
triton_path = pytest.param(
    "triton",
    marks=pytest.mark.skipif(
        not HAS_TRITON or os.environ.get("TRITON_INTERPRET") != "1",
        reason="needs triton and TRITON_INTERPRET=1, which conftest.py sets where there is no CUDA device",
    ),
)
both_paths = pytest.mark.parametrize("path", [triton_path, "torch"])


def call(path: str, function, *arguments, **named):
    if path == "torch":
        return function(*arguments, **named)
    with interpreted(), exact_bfloat16(), recording() as launches:
        y = function(*arguments, **named)
    assert launches
    return y


def integers(*shape: int) -> torch.Tensor:
    return torch.randint(-127, 128, shape, dtype=torch.int8)


def scales(*shape: int) -> torch.Tensor:
    return (torch.rand(shape) + 0.5) / 512


def rounds(numbers: torch.Tensor, scale: torch.Tensor, exact: torch.Tensor) -> None:
    """`numbers` are the nearest to exact / scale, and scale is that of the exact values."""
    largest = exact.abs().amax(-1)
    assert ((scale * 127 - largest).abs() <= 1e-6 * largest.max()).all()
    assert (
        (numbers * scale[..., None].double() - exact).abs() <= 0.5001 * scale[..., None] + 1e-6 * largest.max()
    ).all()


@both_paths
@pytest.mark.parametrize("group", [1, 128])
@pytest.mark.parametrize("activation", ["none", "gelu", "swiglu"])
@pytest.mark.parametrize("candidate", to_file.TILES, ids=str)
def test_groups_are_rounded_once(candidate, activation, group, path, monkeypatch):
    monkeypatch.setattr(to_file, "TILES", (candidate,))
    torch.manual_seed(0)
    rows, n = candidate[0] + 3, 384
    columns = 2 * n if activation == "swiglu" else n
    given = (integers(rows, 144), scales(rows), integers(columns, 144), scales(columns), torch.randn(columns))
    numbers, scale = call(path, int8_linear_to_groups, *given, activation, group)
    assert numbers.shape == (rows, 3, 128) and numbers.abs().max() == 127
    rounds(numbers, scale, int8_linear_to_groups_ref(*given, activation, group))


@both_paths
@pytest.mark.parametrize("candidate", of_file.TILES, ids=str)
def test_sums_of_groups_with_all_tails(candidate, path, monkeypatch):
    monkeypatch.setattr(of_file, "TILES", (candidate,))
    torch.manual_seed(0)
    rows, n = candidate[0] + 3, candidate[1] + 5
    given = (integers(rows, 5, 128), scales(rows, 5), integers(n, 640), scales(n), torch.randn(n), torch.randn(rows, n))
    y = call(path, int8_linear_of_groups, *given, dtype=torch.float32)
    assert relative(y, int8_linear_of_groups_ref(*given, None)) < 1e-6


@both_paths
def test_the_largest_sums_are_exact(path):
    x = torch.full((2, 3, 128), 127, dtype=torch.int8)
    weight = torch.full((16, 384), 127, dtype=torch.int8)
    weight[1] = -127
    x[1, :, 0] = 126
    y = call(path, int8_linear_of_groups, x, torch.ones(2, 3), weight, torch.ones(16), dtype=torch.float32)
    assert torch.equal(y.double(), x.flatten(1).double() @ weight.T.double())


def test_a_scale_for_each_group_rounds_less_than_one_a_row():
    for times in (1, 100):
        groups, rows = swiglu_groups(times)
        assert groups < 0.9 * rows < 0.03


@both_paths
@pytest.mark.parametrize("candidate", heads_file.TILES, ids=str)
@pytest.mark.parametrize(("heads", "width"), [(5, 80), (3, 64), (2, 128), (4, 96)])
def test_heads_are_rounded_once(heads, width, candidate, path, monkeypatch):
    monkeypatch.setattr(heads_file, "TILES", (candidate,))
    torch.manual_seed(0)
    length, k, n = candidate[0] + 3, heads * width, 3 * heads * width
    given = integers(2, length, k), scales(2, length), integers(n, k), scales(n), torch.randn(2, n)
    numbers, scale, others = call(path, int8_linear_to_heads, *given, heads, 2)
    exact, exact_others = int8_linear_to_heads_ref(*given, heads, width, 2)
    rounds(numbers, scale, exact)
    assert relative(others, exact_others) < 5e-4 and others.dtype == torch.float16


@both_paths
def test_heads_are_what_the_quantiser_makes_of_the_product(path):
    torch.manual_seed(0)
    given = integers(2, 70, 160), scales(2, 70), integers(480, 160), scales(480), 10 * torch.randn(480)
    y = int8_linear(*given, dtype=torch.float32).unflatten(-1, (3, 2, 80)).permute(2, 0, 3, 1, 4)
    q8, q_scale, k8, k_scale, v = quantise_qkv_torch(*y)
    bias = call(path, keys_off, *given, 160, 320)
    numbers, scale, others = call(path, int8_linear_to_heads, *given[:4], bias, 2, 2)
    for whole, step, other, other_step in zip(numbers, scale, (q8, k8), (q_scale, k_scale), strict=True):
        assert relative(step, other_step.double()) < 1e-5
        assert (whole - other).abs().max() <= 1 and (whole != other).float().mean() < 1e-3
    assert relative(others[0], v.double()) < 1e-3


@both_paths
@pytest.mark.parametrize("candidate", rotary_file.TILES, ids=str)
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (3, 1)])
def test_rotated_heads_are_rounded_once(heads, kv_heads, candidate, path, monkeypatch):
    monkeypatch.setattr(rotary_file, "TILES", (candidate,))
    torch.manual_seed(0)
    length, n = candidate[0] + 3, (heads + 2 * kv_heads) * 128
    given = integers(2, length, 144), scales(2, length), integers(n, 144), scales(n), torch.randn(n)
    angles = torch.randn(2, length, 64)
    given += angles.cos(), angles.sin(), torch.randn(2, kv_heads, 128), heads
    numbers, scale, values = call(path, int8_linear_to_rotary, *given)
    exact, exact_values = int8_linear_to_rotary_ref(*given)
    assert numbers.shape == (2, heads + kv_heads, length, 128)
    rounds(numbers, scale, exact)
    assert relative(values, exact_values) < 5e-4 and values.dtype == torch.float16


@both_paths
@pytest.mark.parametrize("channels", [SLOW, FASTER], ids=["slow", "faster"])
def test_large_channels_of_keys_do_not_hide_the_others(channels, path):
    error, as_they_are = prefix_attention(channels, partial(call, path))
    assert error < 1.2e-2 and as_they_are > 2.5e-2


@both_paths
def test_values_beyond_float16_are_its_largest(path):
    x, weight = torch.full((1, 2, 64), 127, dtype=torch.int8), torch.full((128, 64), 127, dtype=torch.int8)
    weight[64] = -127
    one = torch.ones
    *_, values = call(path, int8_linear_to_heads, x, one(1, 2), weight, one(128), None, 1, 1)
    assert values.shape == (1, 1, 1, 2, 64) and values.abs().min() == 65504
    assert values[..., 0].max() < 0


def test_tiles_fit_their_card():
    for block_m, block_n, block_k, _, stages in (*to_file.TILES, *of_file.TILES, *heads_file.TILES, *rotary_file.TILES):
        assert (block_m + block_n) * 2 * block_k * (stages - 1) <= SHARED_ON_SM89
    assert all(tile[1] == 256 for tile in (*to_file.TILES, *heads_file.TILES, *rotary_file.TILES))


def test_what_does_not_fit_is_said():
    x, scale, weight, steps = integers(1, 4, 192), scales(1, 4), integers(384, 192), scales(384)
    for message, function, given in (
        ("x_scale is", int8_linear_to_groups, (x, scale[:, :3], weight, steps)),
        ("192 columns, of which 1 are mixed", int8_linear_to_groups, (x, scale, weight, steps, None, "swiglu")),
        ("384 columns, of which 64 are mixed", int8_linear_to_groups, (x, scale, weight, steps, None, "none", 64)),
        ("no groups of 64 to 128", int8_linear_of_groups, (x, scale, weight, steps)),
        ("heads of 48 columns", int8_linear_to_heads, (x, scale, weight, steps, None, 4, 1)),
        ("bias is \\(3,\\)", int8_linear_to_heads, (x, scale, weight, steps, torch.ones(3), 2, 1)),
        ("L > 0", keys_off, (x[:, :0], scale[:, :0], weight, steps, None, 0, 192)),
        ("1 \\+ 2 \\* 2 heads", int8_linear_to_rotary, (x, scale, weight, steps, None, x, x, torch.ones(1, 2, 128), 1)),
        ("cos \\(1, 4, 192\\)", int8_linear_to_rotary, (x, scale, weight, steps, None, x, x, torch.ones(1, 1, 128), 1)),
        ("cos \\(1, 4, 192\\)", rotary_keys_off, (x, scale, weight, steps, None, x, x)),
        ("whole heads of 128", rotary_keys_off, (x, scale, weight[:64], steps[:64], None, x, x)),
    ):
        with pytest.raises(ValueError, match=message):
            function(*given)
