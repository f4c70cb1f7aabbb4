"""The diffusion head in int8: what its fused kernels agree with, how many launches a denoising step takes."""

import os
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn.functional import silu
from unipic_run.bench.interpreter import exact_bfloat16
from unipic_run.engine.layers.linear import FUSED_ROWS
from unipic_run.engine.meter import Meter
from unipic_run.engine.models.unipic.config import RELEASED
from unipic_run.engine.models.unipic.head import CHUNK, DiffusionHead, HeadBlock
from unipic_run.engine.models.unipic.recipe import HEAD
from unipic_run.engine.noise import Stream
from unipic_run.engine.schedules import ddpm_table
from unipic_run.kernels import head_int8
from unipic_run.kernels._op import HAS_TRITON, interpreted, recording
from unipic_run.kernels.ddpm_step import Drawn, step_table
from unipic_run.kernels.head_int8 import TILES, modulated_linear_int8, tile
from unipic_run.kernels.int8_of_groups import int8_linear_of_groups
from unipic_run.kernels.norms import norm_ref
from unipic_run.kernels.quantise import quantise_rows
from unipic_run.quant.recipe import Recipe
from unipic_run.quant.swap import Change, swap

needs_the_interpreter = pytest.mark.skipif(
    not HAS_TRITON or os.environ.get("TRITON_INTERPRET") != "1", reason="needs triton and TRITON_INTERPRET=1"
)


def weight_of(n: int, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    return quantise_rows(torch.randn(n, k) / k**0.5)


@needs_the_interpreter
@pytest.mark.parametrize("candidate", TILES, ids=str)
def test_it_is_a_quantiser_of_groups_on_both_sides_of_a_product(candidate, monkeypatch):
    monkeypatch.setattr(head_int8, "tile", lambda *given: candidate)
    torch.manual_seed(0)
    block_m, block_n, *_ = candidate
    m, n, k = block_m + 3, block_n + 128, 256
    h, bias, weight = torch.randn(m, k) + 3, torch.randn(n), weight_of(n, k)
    shift, scale, _ = torch.randn(m, 3 * k).chunk(3, dim=-1)
    norm = torch.rand(k), torch.randn(k)
    with interpreted(), recording() as launches:
        numbers, steps = modulated_linear_int8(h, shift, scale, *norm, 1e-6, *weight, bias)
    assert len(launches) == 1 and launches[0].grid == (-(-n // block_n), -(-m // block_m))
    groups = quantise_rows(norm_ref(h, *norm, shift, scale, 1e-6, False).unflatten(1, (-1, 128)))
    y = silu(int8_linear_of_groups(*groups, *weight, bias, dtype=torch.float32)).unflatten(1, (-1, 128))
    # Moments are summed in another order, so a number in front of the product may be rounded to the other side.
    same = (steps * 127 / y.abs().amax(-1) - 1).abs() < 1e-5
    assert same.float().mean() > 0.9 and numbers.abs().amax(-1).min() == 127
    off = (numbers * steps[..., None] - y).abs() / steps[..., None]
    assert off[same].max() < 0.6 and off.max() < 3


@needs_the_interpreter
def test_rows_with_a_large_mean_keep_their_variance():
    torch.manual_seed(0)
    h, weight = torch.randn(20, 256), weight_of(128, 256)
    flat, norm = torch.zeros(20, 256), (torch.ones(256), torch.zeros(256))
    found = []
    for lift in (0.0, 1000.0):
        with interpreted():
            numbers, steps = modulated_linear_int8(h + lift, flat, flat, *norm, 1e-6, *weight, None)
        found.append(numbers * steps[..., None])
    assert (found[1] - found[0]).norm() / found[0].norm() < 1e-2


def test_tiles_grow_with_the_rows():
    rows = (10, 20, 40, 100, 200, 402, 804, 1604)
    picked = [tile(m, 1536, torch.bfloat16) for m in rows]
    assert all(a[0] * a[1] <= b[0] * b[1] for a, b in pairwise(picked))
    assert {*picked} == {*TILES}, "cases of every tile are compiled and timed"


def test_what_does_not_fit_is_said():
    h, weight, bias = torch.randn(4, 128), weight_of(128, 128), torch.randn(128)
    norm = bias, bias
    with pytest.raises(ValueError, match=r"shift \(4, 16\) and scale \(4, 128\)"):
        modulated_linear_int8(h, h[:, :16], h, *norm, 1e-6, *weight, bias)
    with pytest.raises(ValueError, match="agree"):
        modulated_linear_int8(h[:, :16], h, h, *norm, 1e-6, *weight, bias)
    with pytest.raises(ValueError, match=r"\(96, 128\): both have to be multiples of 128"):
        modulated_linear_int8(h, h, h, *norm, 1e-6, *(x[:96] for x in weight), bias[:96])


def in_int8(block: HeadBlock) -> nn.Module:
    """The same values in int8 layers."""
    recipe = Recipe("int8", ("fc1", "fc2", "modulation"))
    with torch.device("meta"):
        quantised = HeadBlock(block.fc1.in_features)
    swap(quantised, recipe)
    change, values = Change(quantised, recipe), {}
    for name, tensor in block.state_dict().items():
        values |= change(name, tensor)
    quantised.load_state_dict(values, assign=True)
    return quantised.requires_grad_(False)


@needs_the_interpreter
@pytest.mark.parametrize("rows", [5, 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.inference_mode()
def test_a_block_is_two_launches_and_close_to_the_floating_one(rows, dtype):
    torch.manual_seed(0)
    block = HeadBlock(128)
    h, modulation = torch.randn(rows, 128), torch.randn(rows, 3 * 128)
    expected = block(h, modulation)
    quantised, h, modulation = in_int8(block).to(dtype), h.to(dtype), modulation.to(dtype)
    on_cpu = quantised(h, modulation)
    with interpreted(), exact_bfloat16(), recording() as launches:
        found = quantised(h, modulation)
    assert [x.kernel.__name__ for x in launches] == ["_head_int8_kernel", "_of_groups_kernel"]
    step = (expected - h).norm()
    assert (found - expected).norm() / step < 0.02 and (on_cpu - expected).norm() / step < 0.02


# With guidance 402 rows are the most of a picture at 1024x1024, and 804 and 2010 those of a batch of two and five.
@pytest.mark.parametrize("tokens", [5, 10, 201, 402, 1005])
def test_at_most_thirty_launches_a_denoising_step(tokens):
    config, steps, how = RELEASED.head, CHUNK, {"device": "meta", "dtype": torch.int64}
    with torch.device("meta"):
        head = DiffusionHead(config).bfloat16().requires_grad_(False)
    swap(head, Recipe("int8", tuple(name.removeprefix("head.") for name in HEAD)))
    assert 2 * tokens <= FUSED_ROWS and config.depth == 12 and head.most_steps(2 * tokens) >= steps
    table = ddpm_table(config.train_steps, config.steps, config.max_beta)
    drawn = Drawn(torch.empty(tokens, 2, **how), torch.empty(tokens, **how), Stream.HEAD_STEP)
    with torch.inference_mode():
        z = torch.empty(2 * tokens, config.condition, device="meta", dtype=torch.bfloat16)
        start, coefficients = torch.empty(tokens, 16, device="meta"), step_table(table, 2.5, 0.9).to("meta")
        run = head.begin(z, start, drawn, len(table), coefficients, head.embed_steps(table), head.final.folded())
        with Meter() as meter:
            head.advance(run, steps)
    assert meter.total().launches <= 30 * steps
    fused = {call: times for call, times in meter.calls.items() if call.shape[:1] == (2 * tokens,)}
    times = {call.name: times for call, times in fused.items() if call.precision == "int8"}
    assert times["modulated_linear_int8"] == times["int8_linear_of_groups"] == 12 * steps
