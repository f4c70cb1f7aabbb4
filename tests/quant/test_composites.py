"""What surrounds a linear layer: bit for bit the plain formulas for floating layers, close to them for int8 ones."""

import os
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from unipic_run.engine.kv_cache import KVCache, Prompts
from unipic_run.engine.layers.attention import Attention
from unipic_run.engine.layers.linear import Linear, linear_add, linear_each, norm_linear, norm_mlp
from unipic_run.engine.layers.qwen2 import Qwen2, Qwen2Config, RMSNorm
from unipic_run.engine.layers.vit_block import ViTBlock
from unipic_run.engine.meter import Meter
from unipic_run.kernels._op import HAS_TRITON, interpreted, recording
from unipic_run.quant.recipe import Recipe
from unipic_run.quant.swap import Change, swap

ACTS = {
    "none": lambda x: x,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
    "swiglu": lambda x: F.silu(x.chunk(2, -1)[0]) * x.chunk(2, -1)[1],
}


class Block(nn.Module):
    def __init__(self, rms: bool = False, affine: bool = True, act: str = "none"):
        super().__init__()
        self.norm = RMSNorm(48, 1e-6) if rms else nn.LayerNorm(48, eps=1e-6, elementwise_affine=affine)
        self.wide = Linear(48, 96)
        self.narrow = Linear(48 if act == "swiglu" else 96, 48)


def filled(block: nn.Module) -> nn.Module:
    noise = torch.Generator().manual_seed(0)
    for parameter in block.parameters():
        parameter.data = torch.randn(parameter.shape, generator=noise) / parameter.shape[-1] ** 0.5
    return block


def in_int8(block: Block, rotated_inputs: tuple[str, ...] = ()) -> nn.Module:
    """The same values in int8 layers."""
    quantised = Block()
    quantised.norm, quantised.narrow = block.norm, Linear(block.narrow.in_features, 48)
    recipe = Recipe("int8", ("wide", "narrow"), rotated_inputs=rotated_inputs)
    swap(quantised, recipe)
    change = Change(quantised, recipe)
    values = {}
    for name, tensor in block.state_dict().items():
        values |= change(name, tensor)
    quantised.load_state_dict(values, assign=True)
    return quantised


def inputs(rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """x, residual, and one GEMM's modulation (shift, scale, gate), as adaLN makes them."""
    noise = torch.Generator().manual_seed(1)
    return tuple(torch.randn(*shape, generator=noise) for shape in ((rows, 48), (rows, 48), (rows, 3 * 48)))


def composites(block, x, residual, modulation, act, gated):
    shift, scale, gate = modulation.chunk(3, -1) if gated else (None, None, None)
    y = norm_linear(x, block.norm, block.wide, (shift, scale) if gated else None, act=act)
    return linear_add(y, block.narrow, residual, gate)


def formulas(block, x, residual, modulation, act, gated):
    y = block.norm(x)
    if gated:
        shift, scale, gate = modulation.chunk(3, -1)
        y = y * (1 + scale) + shift
    y = block.narrow(ACTS[act](block.wide(y)))
    return residual + (gate * y if gated else y)


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize(("rms", "gated"), [(False, False), (True, False), (False, True)])
def test_floating_layers_and_their_gradients_are_the_plain_formulas(act, rms, gated):
    block = filled(Block(rms, act=act))
    for rows in (2, 30):
        found = []
        for compute in (composites, formulas):
            x, residual, modulation = (tensor.requires_grad_() for tensor in inputs(rows))
            y = compute(block, x, residual, modulation, act, gated)
            wanted = [x, residual, *block.parameters(), *([modulation] if gated else [])]
            found.append([y, *torch.autograd.grad(y.square().sum(), wanted)])
            with torch.inference_mode():
                assert torch.equal(compute(block, x, residual, modulation, act, gated), y)
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("rows", [1, 16, 17, 50])
@torch.inference_mode()
def test_int8_layers_come_close(act, gated, rows):
    block = filled(Block(act=act))
    x, residual, modulation = inputs(rows)
    expected = formulas(block, x, residual, modulation, act, gated)
    y = composites(in_int8(block), x, residual, modulation, act, gated)
    assert (y - expected).norm() / (expected - residual).norm() < 0.03
    assert y.dtype == torch.float32


@torch.inference_mode()
def test_the_activation_can_come_first():
    block, act = filled(Block(act="swiglu")), "swiglu"
    for rows in (3, 40):
        x, residual, _ = inputs(rows)
        y = block.wide(x)
        expected = residual + block.narrow(ACTS[act](y))
        assert torch.equal(linear_add(y, block.narrow, residual, act=act), expected)
        close = linear_add(y, in_int8(block).narrow, residual, act=act)
        assert (close - expected).norm() / (expected - residual).norm() < 0.03


@pytest.mark.parametrize("act", ["none", "silu", "swiglu"])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("rows", [3, 40])
@torch.inference_mode()
def test_layers_that_rotate_their_inputs(act, gated, rows):
    block = filled(Block(act=act))
    quantised = in_int8(block, ("wide", "narrow"))
    assert quantised.wide.group == 16 and quantised.narrow.group == (16 if act == "swiglu" else 32)
    x, residual, modulation = inputs(rows)
    expected = formulas(block, x, residual, modulation, act, gated)
    y = composites(quantised, x, residual, modulation, act, gated)
    assert (y - expected).norm() / (expected - residual).norm() < 0.03
    wide = block.wide(x)
    y, expected = linear_add(wide, quantised.narrow, residual, act=act), residual + block.narrow(ACTS[act](wide))
    assert (y - expected).norm() / (expected - residual).norm() < 0.03
    (y,) = linear_each(x, [quantised.wide])
    assert (y - wide).norm() / wide.norm() < 0.03


@pytest.mark.parametrize("rows", [slice(48), slice(48, None)])
@pytest.mark.parametrize("scheme", ["none", "int8", "other"])
@torch.inference_mode()
def test_some_of_the_outputs(rows, scheme):
    block = filled(Block())
    layer = {"none": block.wide, "int8": in_int8(block).wide, "other": nn.Sequential(block.wide)}[scheme]
    for count in (3, 40):
        x = inputs(count)[0]
        whole = norm_linear(x, block.norm, layer)
        assert torch.allclose(norm_linear(x, block.norm, layer, rows=rows), whole[..., rows], rtol=0, atol=1e-6)


@torch.inference_mode()
def test_several_layers_share_their_input():
    block, quantised = filled(Block()), in_int8(filled(Block()))
    for rows in (3, 40):
        x = inputs(rows)[0]
        layers = [quantised.wide, block.wide, quantised.wide]
        assert all(torch.equal(y, layer(x)) for y, layer in zip(linear_each(x, layers), layers, strict=True))


class MLP(nn.Module):
    def __init__(self, act: str):
        super().__init__()
        self.norm, self.wide = nn.LayerNorm(64, eps=1e-6), Linear(64, 512 if act == "swiglu" else 256)
        self.narrow = Linear(256, 64)


def exchanged(float_one: nn.Module, same: nn.Module, recipe: Recipe) -> nn.Module:
    """`same` with the values of `float_one`, in the recipe's layers."""
    swap(same, recipe)
    change, values = Change(same, recipe), {}
    for name, tensor in float_one.state_dict().items():
        values |= change(name, tensor)
    same.load_state_dict(values, assign=True)
    return same


@pytest.mark.parametrize(("act", "gated"), [("gelu", False), ("swiglu", False), ("gelu_tanh", True)])
@pytest.mark.parametrize("rotated_inputs", [(), ("narrow",)])
@pytest.mark.parametrize("rows", [3, 40])
@torch.inference_mode()
def test_an_mlp_hands_over_whole_numbers(act, gated, rotated_inputs, rows):
    mlp = filled(MLP(act))
    recipe = Recipe("int8", ("wide", "narrow"), rotated_inputs=rotated_inputs)
    quantised = exchanged(mlp, MLP(act), recipe)
    assert quantised.narrow.group == (128 if rotated_inputs else 1)
    noise = torch.Generator().manual_seed(1)
    x = torch.randn(2, rows, 64, generator=noise)
    shift, scale, gate = torch.randn(2, 3 * 64, generator=noise).chunk(3, -1)  # for a picture each
    modulation, gate = ((shift, scale), gate) if gated else (None, None)
    normed = mlp.norm(x) * (1 + scale[:, None]) + shift[:, None] if gated else mlp.norm(x)
    made = mlp.narrow(ACTS[act](mlp.wide(normed)))
    expected = x + (gate[:, None] * made if gated else made)
    assert torch.equal(norm_mlp(x, mlp.norm, mlp.wide, mlp.narrow, act, modulation, gate), expected)
    y = norm_mlp(x, quantised.norm, quantised.wide, quantised.narrow, act, modulation, gate)
    by_rows = norm_linear(x, quantised.norm, quantised.wide, modulation, act)
    by_rows = linear_add(by_rows, quantised.narrow, x, gate)
    error, error_by_rows = ((one - expected).norm() / (expected - x).norm() for one in (y, by_rows))
    assert error < 0.025 and torch.equal(y, by_rows) == (rows == 3)
    assert rows == 3 or error < error_by_rows


WHOLE_HEADS = {"int8_linear_to_heads", "keys_off"}


@pytest.mark.parametrize("rows", [8, 30])
@pytest.mark.parametrize("picked", [None, 4, 20])
@torch.inference_mode()
def test_a_block_whose_attention_is_in_int8(rows, picked):
    noise = torch.Generator().manual_seed(1)
    shape = 160, 2, 256  # heads of 80
    block = filled(ViTBlock(*shape, Attention()))
    x, recipe = torch.randn(2, rows, 160, generator=noise), Recipe("int8", ("qkv", "proj", "fc1", "fc2"))
    only = None if picked is None else torch.randint(0, rows, (2, picked), generator=noise)
    residual = x if only is None else x.gather(1, only[..., None].expand(-1, -1, 160))
    expected = block(x, only)
    for backend in ("sdpa", "int8-qk"):
        quantised = exchanged(block, ViTBlock(*shape, Attention(backend)), recipe)
        assert (quantised(x, only) - expected).norm() / (expected - residual).norm() < 0.03
        with Meter() as meter:
            quantised.to("meta")(x.to("meta"), only if only is None else only.to("meta"))
        names, whole = {call.name for call in meter.calls}, backend == "int8-qk" and rows == 30
        assert names & WHOLE_HEADS == (WHOLE_HEADS if whole else set()), "the fewest rows keep their values"
        assert ("quantise_qkv" in names) == (backend == "int8-qk" and not whole)


@pytest.mark.skipif(
    not HAS_TRITON or os.environ.get("TRITON_INTERPRET") != "1",
    reason="needs triton and TRITON_INTERPRET=1, which conftest.py sets where there is no CUDA device",
)
@torch.inference_mode()
def test_such_a_block_by_its_kernels():
    block = filled(ViTBlock(160, 2, 256, Attention()))
    quantised = exchanged(
        block, ViTBlock(160, 2, 256, Attention("int8-qk")), Recipe("int8", ("qkv", "proj", "fc1", "fc2"))
    )
    x = torch.randn(1, 20, 160, generator=torch.Generator().manual_seed(1))
    expected = quantised(x)
    with interpreted(), recording() as launches:
        found = quantised(x)
    names = {launch.kernel.__name__ for launch in launches}
    assert {f"_{name}_kernel" for name in ("keys_off", "to_heads", "to_groups", "of_groups")} <= names
    assert (found - expected).norm() / (expected - x).norm() < 0.01


def language_model(backend: str, heads: int = 2) -> Qwen2:
    """One layer with heads of 128."""
    sizes = {"vocab": 8, "width": 256, "layers": 1, "heads": heads, "kv_heads": 1, "head_dim": 128, "mlp": 256}
    return Qwen2(Qwen2Config(**sizes, rope_theta=1e6, norm_eps=1e-6, max_positions=100), Attention(backend), False)


def behind_prompts(model: Qwen2, rows: int) -> tuple[Tensor, Prompts]:
    """Two rows, each behind a text of its own."""
    noise, caches = torch.Generator().manual_seed(1), []
    for length in (5, 3):
        cache = KVCache.empty(1, 1, length, 128, torch.float32, torch.device("cpu"))
        for room in cache.room(0, length):
            room.copy_(torch.randn(room.shape, generator=noise))
        cache.advance(length)
        caches.append((cache, 1))
    return torch.randn(2, rows, 256, generator=noise), Prompts.of(caches)


WHOLE_ROTARY = {"rotary_keys_off", "int8_linear_to_rotary", "prefix_attention_int8"}


@pytest.mark.parametrize("rows", [8, 30])
@pytest.mark.parametrize("backend", ["sdpa", "int8-qk"])
@torch.inference_mode()
def test_a_language_model_whose_attention_is_in_int8(rows, backend):
    model = filled(language_model("sdpa"))
    x, prompts = behind_prompts(model, rows)
    recipe = Recipe("int8", tuple(f"layers.*.{name}" for name in ("qkv", "o", "gate_up", "down")))
    quantised = exchanged(model, language_model(backend), recipe)
    expected = model(x, prompts)
    assert (quantised(x, prompts) - expected).norm() / expected.norm() < 0.02
    with Meter() as meter:
        tensors = (tensor.to("meta") for tensor in prompts.tensors)
        quantised.to("meta")(x.to("meta"), Prompts(*tensors, runs=prompts.runs))
    names, whole = {call.name for call in meter.calls}, backend == "int8-qk" and rows == 30
    assert names & WHOLE_ROTARY == (WHOLE_ROTARY if whole else set()), "the fewest rows keep their values"
    assert names.isdisjoint({"rope_split", "prefix_attention", "quantise"}) == whole


@pytest.mark.skipif(
    not HAS_TRITON or os.environ.get("TRITON_INTERPRET") != "1",
    reason="needs triton and TRITON_INTERPRET=1, which conftest.py sets where there is no CUDA device",
)
@torch.inference_mode()
def test_such_a_language_model_by_its_kernels():
    model = filled(language_model("sdpa"))
    recipe = Recipe("int8", tuple(f"layers.*.{name}" for name in ("qkv", "o", "gate_up", "down")))
    quantised = exchanged(model, language_model("int8-qk"), recipe)
    x, prompts = behind_prompts(model, 20)
    expected = quantised(x, prompts)
    with interpreted(), recording() as launches:
        found = quantised(x, prompts)
    names = {launch.kernel.__name__ for launch in launches}
    kernels = ("rotary_keys", "to_rotary", "prefix_attention_int8", "of_groups", "to_groups")
    assert {f"_{name}_kernel" for name in kernels} <= names
    assert (found - expected).norm() / expected.norm() < 0.01
