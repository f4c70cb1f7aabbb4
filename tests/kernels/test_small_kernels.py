"""Norms, rotary embedding, token movement and the sampler step against loops and formulas."""

import math
import os

import pytest
import torch
import torch.nn.functional as F
from unipic_run.kernels._op import HAS_TRITON, interpreted
from unipic_run.kernels.ddpm_step import DDPMStep, ddpm_step
from unipic_run.kernels.embed_visible import embed_visible
from unipic_run.kernels.gate import gated_add, swiglu
from unipic_run.kernels.mar_tokens import grid_positions, place_tokens, select_tokens
from unipic_run.kernels.norms import norm, rms_norm
from unipic_run.kernels.rope import rope


def test_rms_norm_rounds_before_the_weight() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(3, 64), torch.randn(64)
    torch.testing.assert_close(rms_norm(x, weight, 1e-6), F.rms_norm(x, (64,), weight, 1e-6))
    low = rms_norm(x.bfloat16(), weight.bfloat16(), 1e-6)
    normed = x.bfloat16().float() / (x.bfloat16().float().square().mean(-1, keepdim=True) + 1e-6).sqrt()
    assert low.dtype == torch.bfloat16 and torch.equal(low, normed.bfloat16() * weight.bfloat16())


def test_modulated_layer_norm() -> None:
    torch.manual_seed(0)
    x, shift, scale = torch.randn(3, 5, 32)
    centred = x - x.mean(-1, keepdim=True)
    plain = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(norm(x, None, None, shift, scale, 1e-6, False), plain * (1 + scale) + shift)


def test_rope_rotates_pairs_half_a_head_apart() -> None:
    x = torch.arange(8.0).view(1, 1, 1, 8)
    angle = torch.tensor([0.1, 0.2, 0.3, 0.4]).repeat(2)
    got = rope(x, angle.cos(), angle.sin()).flatten()
    for i in range(4):
        a, b, t = float(i), float(i + 4), 0.1 * (i + 1)
        assert math.isclose(got[i], a * math.cos(t) - b * math.sin(t), abs_tol=1e-5)
        assert math.isclose(got[i + 4], b * math.cos(t) + a * math.sin(t), abs_tol=1e-5)


def test_tokens_travel_to_their_places_and_back() -> None:
    torch.manual_seed(0)
    rows, n, width, buffer = 2, 12, 8, 3
    visible = torch.tensor([[0, 5, 11], [1, 2, 3]])
    x, position, base = torch.randn(rows, buffer + 3, width), torch.randn(buffer + n, width), torch.randn(1, 1, width)
    full = place_tokens(x, visible, base, position)
    for row in range(rows):
        expected = base[0].repeat(buffer + n, 1)
        expected[:buffer] = x[row, :buffer]
        for i, at in enumerate(visible[row]):
            expected[buffer + at] = x[row, buffer + i]
        torch.testing.assert_close(full[row], expected + position)
    torch.testing.assert_close(select_tokens(full - position, visible + buffer), x[:, buffer:])


def test_embedding_reads_only_visible_tokens() -> None:
    torch.manual_seed(0)
    project, norm = torch.nn.Linear(16, 8), torch.nn.LayerNorm(8)
    tokens, first, position = torch.randn(1, 6, 16), torch.randn(1, 8), torch.randn(2 + 6, 8)
    visible = torch.tensor([[1, 4]])
    got = embed_visible(tokens, visible, project, norm, first, position)
    rows = [first[0] + position[0], first[0] + position[1]]
    rows += [project(tokens[0, at]) + position[2 + at] for at in (1, 4)]
    torch.testing.assert_close(got, norm(torch.stack(rows))[None])
    none = embed_visible(tokens, visible[:, :0], project, norm, first, position)
    torch.testing.assert_close(none, got[:, :2])


def test_native_grid_positions_are_the_table() -> None:
    table = torch.randn(1, 4 + 9, 8)
    assert torch.equal(grid_positions(table, 4, 3, 3), table[0])
    resized = grid_positions(table, 4, 2, 5)
    assert resized.shape == (4 + 10, 8) and torch.equal(resized[:4], table[0, :4])


def test_ddpm_step_by_formula() -> None:
    torch.manual_seed(0)
    step = DDPMStep(1.5, 1.1, 0.3, 0.6, math.log(0.2), math.log(0.1), 500)
    x, noise, cond, uncond = torch.randn(4, 2), torch.randn(4, 2), torch.randn(4, 4), torch.randn(4, 4)
    eps = uncond[:, :2] + 3.0 * (cond[:, :2] - uncond[:, :2])
    mean = 0.3 * (1.5 * x - 1.1 * eps) + 0.6 * x
    f = (cond[:, 2:] + 1) / 2
    deviation = (0.5 * (f * math.log(0.2) + (1 - f) * math.log(0.1))).exp()
    torch.testing.assert_close(ddpm_step(x, cond, uncond, noise, step, 3.0, 0.9), mean + deviation * noise * 0.9)
    torch.testing.assert_close(ddpm_step(x, cond, uncond, None, step, 3.0, 0.9), mean)


@pytest.mark.skipif(
    not HAS_TRITON or os.environ.get("TRITON_INTERPRET") != "1", reason="runs kernels in Triton's interpreter"
)
def test_columns_that_are_not_dense_are_copied() -> None:
    torch.manual_seed(0)
    x, gate, weight = torch.randn(16, 6).T, torch.randn(16, 6).T, torch.randn(16)
    with interpreted():
        normed, halved, added = rms_norm(x, weight, 1e-6), swiglu(x), gated_add(x, gate, x)
    torch.testing.assert_close(normed, rms_norm(x.contiguous(), weight, 1e-6))
    torch.testing.assert_close(halved, swiglu(x.contiguous()))
    torch.testing.assert_close(added, x + gate * x)
