"""Products in 8 bits that leave the operands of joint attention."""

import os
from functools import partial

import pytest
import torch
from unipic_run.bench.interpreter import exact_bfloat16
from unipic_run.bench.outliers import joint_attention, relative
from unipic_run.kernels import int8_to_joint
from unipic_run.kernels._op import HAS_TRITON, interpreted, recording
from unipic_run.kernels.int8_to_joint import int8_linear_to_joint, int8_linear_to_joint_ref, random_stream
from unipic_run.kernels.joint_keys import joint_keys_off

SHARED_ON_SM89 = 101376  # bytes a block may have
triton_path = pytest.param(
    "triton",
    marks=pytest.mark.skipif(
        not HAS_TRITON or os.environ.get("TRITON_INTERPRET") != "1",
        reason="needs triton and TRITON_INTERPRET=1, which conftest.py sets where there is no CUDA device",
    ),
)
both_paths = pytest.mark.parametrize("path", [triton_path, "torch"])


def call(path: str, function, *arguments):
    if path == "torch":
        return function(*arguments)
    with interpreted(), exact_bfloat16(), recording() as launches:
        y = function(*arguments)
    assert launches
    return y


@both_paths
@pytest.mark.parametrize("candidate", int8_to_joint.TILES, ids=str)
@pytest.mark.parametrize(("heads", "words"), [(4, 5), (3, 70), (1, 0)])
def test_heads_of_both_streams_are_rounded_once(heads, words, candidate, path, monkeypatch):
    monkeypatch.setattr(int8_to_joint, "TILES", (candidate,))
    image = random_stream("cpu", 2, candidate[0] + 3, 144, heads, dtype=torch.float32)
    text = random_stream("cpu", 2, words, 144, heads, seed=1, dtype=torch.float32)
    off = torch.randn(2, heads, 64)
    numbers, scale, values = call(path, int8_linear_to_joint, image, text, off, heads, 1e-6)
    exact, exact_values = int8_linear_to_joint_ref(*image, *text, off, heads, 1e-6)
    largest = exact.abs().amax(-1)
    assert numbers.shape == (2, 2, heads, candidate[0] + 3 + words, 64)
    assert ((scale * 127 - largest).abs() <= 2e-6 * largest.max()).all()
    off_by = (numbers * scale[..., None].double() - exact).abs()
    assert (off_by <= 0.5001 * scale[..., None] + 2e-6 * largest.max()).all()
    assert relative(values, exact_values) < 5e-4 and values.dtype == torch.float16


@both_paths
def test_what_all_keys_share_does_not_hide_the_rest(path):
    error, as_they_are = joint_attention(partial(call, path))
    assert error < 4e-3 and as_they_are > 7e-3


def test_values_beyond_float16_are_its_largest_and_none_stay_none():
    stream = list(random_stream("cpu", 1, 2, 64, 1, dtype=torch.float32))
    stream[4] = torch.full((192,), 1e6)
    odd = [*stream[:4], torch.full((192,), float("nan")), *stream[5:]]
    for path in ("torch", "triton") if HAS_TRITON and os.environ.get("TRITON_INTERPRET") == "1" else ("torch",):
        *_, values = call(path, int8_linear_to_joint, stream, None, torch.zeros(1, 1, 64), 1, 1e-6)
        assert (values == 65504).all()
        *_, values = call(path, int8_linear_to_joint, odd, None, torch.zeros(1, 1, 64), 1, 1e-6)
        assert values.isnan().all()


def test_tiles_fit_their_card():
    for block_m, block_n, block_k, _, stages in int8_to_joint.TILES:
        assert (block_m + block_n) * 2 * block_k * (stages - 1) <= SHARED_ON_SM89 and block_n == 4 * 64


def test_what_does_not_fit_is_said():
    image, off = random_stream("cpu", 1, 3, 64, 2), torch.zeros(1, 2, 64)
    narrow, bare = random_stream("cpu", 1, 3, 32, 2), random_stream("cpu", 1, 3, 64, 2, bias=False)
    for message, function, given in (
        ("3 parts of 3 heads", int8_linear_to_joint, (image, None, off, 3, 1e-6)),
        ("off \\(2, 64\\)", int8_linear_to_joint, (image, None, off[0], 2, 1e-6)),
        ("both streams' are alike", int8_linear_to_joint, (image, narrow, off, 2, 1e-6)),
        ("biased too", int8_linear_to_joint, (image, bare, off, 2, 1e-6)),
        ("L > 0", joint_keys_off, (image[0][:, :0], image[1][:, :0], *image[2:5], image[6], 1e-6)),
        ("norm is \\(3,\\)", joint_keys_off, (*image[:5], torch.ones(3), 1e-6)),
    ):
        with pytest.raises(ValueError, match=message):
            function(*given)
