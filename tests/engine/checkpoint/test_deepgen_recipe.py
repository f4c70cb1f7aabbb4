"""DeepGen in fewer bits: which layers, the rotation of the language model alone, and files against streaming."""

from functools import partial

import pytest
import torch
from torch import Tensor, nn
from unipic_run.engine import families, weights
from unipic_run.engine.checkpoint.convert import convert
from unipic_run.engine.layers.linear import as_row
from unipic_run.engine.models.deepgen.conditioner import side_by_side, tapped
from unipic_run.engine.models.deepgen.recipe import ROTATION
from unipic_run.quant.int8 import Int8Linear
from unipic_run.quant.recipe import NONE, Recipe


@pytest.fixture(scope="module")
def folder(tiny_deepgen, tmp_path_factory):
    return convert(tiny_deepgen, tmp_path_factory.mktemp("float") / "tiny", family="deepgen")


def filled(folder, recipe: Recipe) -> nn.Module:
    row, config = families.read(folder)
    model = weights.prepared(partial(families.model(row.name).build, config), recipe)
    weights.load(model, folder, "cpu", torch.float32, recipe=recipe)
    return model.eval()


def conditions(model: nn.Module) -> tuple[Tensor, Tensor]:
    """What the connector makes of words, a picture's tokens and the queries: text stream and pooled vector."""
    features = model.vision(torch.randn(16, 1176, generator=torch.Generator().manual_seed(0)), 4, 4)
    words = model.embed(as_row([1, 2, 3, 256], model.embed))[0]
    x = torch.cat([words, features, model.connector.queries])[None]
    c, outputs = model.config, model.llm.outputs([x], [torch.arange(x.shape[1])[None]])
    (states,) = side_by_side(outputs, tapped(c.llm.layers, c.connector.taps))
    return model.connector(states)


@torch.inference_mode()
def test_the_rotation_alone_changes_nothing_but_roundings(folder):
    plain, turned = filled(folder, NONE), filled(folder, Recipe("none", (), ROTATION))
    for found, expected in zip(conditions(turned), conditions(plain), strict=True):
        assert (found - expected).abs().max() < 1e-5 * expected.abs().max()
    assert not torch.equal(plain.connector.queries, turned.connector.queries)
    assert (turned.llm.norm.weight == 1).all() and (plain.llm.norm.weight != 1).any()


def test_the_stacks_are_in_8_bits_and_nothing_else(folder):
    model = filled(folder, families.recipe("deepgen", "int8"))
    layers = {name for name, layer in model.named_modules() if isinstance(layer, Int8Linear)}
    stacks = ("llm.layers.", "vision.blocks.", "connector.encoder.", "dit.blocks.")
    inside = {name for name, layer in model.named_modules() if isinstance(layer, nn.Linear) and name.startswith(stacks)}
    assert len(layers) == 4 * (6 + 2 + 2) + 3 * 8 - 3 + 2 and not inside
    assert all(name.startswith(stacks) for name in layers)
    groups = {name.rpartition(".")[2]: model.get_submodule(name).group for name in layers}
    assert groups["down"] > 1 and {group for name, group in groups.items() if name != "down"} == {1}


@torch.inference_mode()
def test_int8_is_close_and_its_file_is_what_streaming_makes(tiny_deepgen, folder, tmp_path):
    recipe = families.recipe("deepgen", "int8")
    streamed = filled(folder, recipe)
    stored = filled(convert(tiny_deepgen, tmp_path / "int8", family="deepgen", quant="int8"), recipe)
    ours, theirs = stored.state_dict(), streamed.state_dict()
    assert [*ours] == [*theirs]
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype and torch.equal(ours[name], tensor), name
    for found, expected in zip(conditions(streamed), conditions(filled(folder, NONE)), strict=True):
        error = (found - expected).norm() / expected.norm()
        assert 1e-3 < error < 0.1, error
