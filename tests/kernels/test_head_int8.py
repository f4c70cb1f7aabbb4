"""The diffusion head in int8: what its fused kernels agree with, how many launches a denoising step takes."""

import os
from itertools import pairwise

import pytest
import torch
from torch import nn
from unipic_run.bench.interpreter import exact_bfloat16
from unipic_run.engine.layers.linear import FUSED_ROWS
from unipic_run.engine.meter import Meter
from unipic_run.engine.models.unipic.config import RELEASED
from unipic_run.engine.models.unipic.head import CHUNK, FEW, DiffusionHead, HeadBlock
from unipic_run.engine.models.unipic.recipe import HEAD
from unipic_run.engine.noise import Stream
from unipic_run.engine.schedules import ddpm_table
from unipic_run.kernels import head_int8
from unipic_run.kernels._op import HAS_TRITON, interpreted, recording
from unipic_run.kernels.ddpm_step import Drawn, step_table
from unipic_run.kernels.head_int8 import MODULATED, PLAIN, TILES, gated_linear_int8, modulated_linear_int8, tile
from unipic_run.kernels.int8_of_groups import int8_linear_of_groups
from unipic_run.kernels.norms import norm_torch
from unipic_run.kernels.quantise import quantise_rows
from unipic_run.quant.recipe import Recipe
from unipic_run.quant.swap import Change, swap

needs_the_interpreter = pytest.mark.skipif(
    not HAS_TRITON or os.environ.get("TRITON_INTERPRET") != "1", reason="needs triton and TRITON_INTERPRET=1"
)


def weight_of(n: int, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    return quantise_rows(torch.randn(n, k) / k**0.5)


def row_errors(y: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    return (y - expected).norm(dim=1) / expected.norm(dim=1)


@needs_the_interpreter
@pytest.mark.parametrize("candidate", TILES, ids=str)
def test_they_are_a_quantiser_of_groups_and_a_product(candidate, monkeypatch):
    monkeypatch.setattr(head_int8, "tile", lambda *given: candidate)
    torch.manual_seed(0)
    block_m, block_n, *_ = candidate
    m, n, k = block_m + 3, block_n + 5, 256
    h, bias, weight = torch.randn(m, k), torch.randn(n), weight_of(n, k)
    shift, scale, _ = torch.randn(m, 3 * k).chunk(3, dim=-1)
    norm = torch.rand(k), torch.randn(k)
    gate, residual = torch.randn(m, n), torch.randn(m, n)
    with interpreted(), recording() as launches:
        modulated = modulated_linear_int8(h, shift, scale, *norm, 1e-6, *weight, bias, True)
        gated = gated_linear_int8(h, *weight, bias, gate, residual)
    assert len(launches) == 2 and launches[0].grid == (-(-n // block_n), -(-m // block_m))
    normed = norm_torch(h, *norm, shift, scale, 1e-6, False)
    by_groups = [quantise_rows(x.unflatten(1, (-1, 128))) for x in (normed, h)]
    one_by_one = torch.nn.functional.silu(int8_linear_of_groups(*by_groups[0], *weight, bias, dtype=torch.float32))
    expected = int8_linear_of_groups(*by_groups[1], *weight, bias, residual, gate, torch.float32)
    # Moments are summed in another order, so a number near a half may be rounded to the other side.
    for found, wanted in ((modulated, one_by_one), (gated, expected)):
        errors = row_errors(found, wanted)
        assert (errors < 1e-6).float().mean() > 0.9 and errors.max() < 1e-2


def test_tiles_grow_with_the_rows():
    rows, picked = (10, 20, 40, 100, 200, 402, 804, 1604), {}
    for made in (MODULATED, PLAIN):
        picked[made] = [tile(m, 1536, made, torch.bfloat16) for m in rows]
        assert all(a[0] * a[1] <= b[0] * b[1] for a, b in pairwise(picked[made]))
    assert {*picked[MODULATED], *picked[PLAIN]} == {*TILES}, "cases of every tile are compiled and timed"


def test_what_does_not_fit_is_said():
    h, weight, bias = torch.randn(4, 32), weight_of(8, 32), torch.randn(8)
    with pytest.raises(ValueError, match=r"shift \(4, 16\) and scale \(4, 32\)"):
        modulated_linear_int8(h, h[:, :16], h, None, None, 1e-6, *weight, bias, True)
    with pytest.raises(ValueError, match="agree"):
        modulated_linear_int8(h[:, :16], h, h, None, None, 1e-6, *weight, bias, True)
    with pytest.raises(ValueError, match=r"gate is \(2, 8\), not one for each of \(4, 8\)"):
        gated_linear_int8(h, *weight, bias, torch.randn(2, 8), torch.randn(4, 8))


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
@pytest.mark.parametrize(("rows", "kernels"), [(5, ["head_int8", "int8_weight"]), (20, ["head_int8", "head_int8"])])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.inference_mode()
def test_a_block_is_two_launches_and_close_to_the_floating_one(rows, kernels, dtype):
    torch.manual_seed(0)
    block = HeadBlock(96)
    h, modulation = torch.randn(rows, 96), torch.randn(rows, 3 * 96)
    expected = block(h, modulation)
    quantised, h, modulation = in_int8(block).to(dtype), h.to(dtype), modulation.to(dtype)
    on_cpu = quantised(h, modulation)
    with interpreted(), exact_bfloat16(), recording() as launches:
        found = quantised(h, modulation)
    assert [x.kernel.__name__ for x in launches] == [f"_{name}_kernel" for name in kernels]
    step = (expected - h).norm()
    assert (found - expected).norm() / step < 0.02 and (on_cpu - expected).norm() / step < 0.02


# With guidance 402 rows are the most of a picture at 1024x1024, and 804 and 2010 those of a batch of two and five.
@pytest.mark.parametrize("tokens", [5, 10, 201, 402, 1005])
def test_at_most_thirty_launches_a_denoising_step(tokens):
    config, steps, how = RELEASED.head, FEW, {"device": "meta", "dtype": torch.int64}
    with torch.device("meta"):
        head = DiffusionHead(config).bfloat16().requires_grad_(False)
    swap(head, Recipe("int8", tuple(name.removeprefix("head.") for name in HEAD)))
    assert 2 * tokens <= FUSED_ROWS and config.depth == 12 and min(CHUNK, head.most_steps(2 * tokens)) >= steps
    table = ddpm_table(config.train_steps, config.steps, config.max_beta)
    drawn = Drawn(torch.empty(tokens, 2, **how), torch.empty(tokens, **how), Stream.HEAD_STEP)
    with torch.inference_mode():
        z = torch.empty(2 * tokens, config.condition, device="meta", dtype=torch.bfloat16)
        start, coefficients = torch.empty(tokens, 16, device="meta"), step_table(table, 2.5, 0.9).to("meta")
        run = head.begin(z, start, drawn, coefficients, head.embed_steps(table), head.final.folded())
        with Meter() as meter:
            head.advance(run, steps)
    assert meter.total().launches <= 30 * steps
    fused = {call.name: times for call, times in meter.calls.items() if "linear_int8" in call.name}
    assert fused["modulated_linear_int8"] == 12 * steps
    assert all(call.precision == "int8" for call in meter.calls if "linear_int8" in call.name)
    assert tokens == 5 or fused["gated_linear_int8"] == 12 * steps
