"""Recipes: exact names, nothing silently left out, everything that is not quantised known by name."""

import sys
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn
from unipic_run.engine import families
from unipic_run.engine.errors import UnsupportedDeviceError, UsageError
from unipic_run.engine.weights import as_scheme, prepared
from unipic_run.quant.bnb import MissingPackageError
from unipic_run.quant.int8 import Int8Linear
from unipic_run.quant.recipe import Recipe, expand
from unipic_run.quant.swap import swap

FLOATING = {"mar_encoder.z_proj", "mar_decoder.embed", "proj_in.0", "proj_in.2", "proj_out.0", "proj_out.2"}
FLOATING |= {f"head.{name}" for name in ("time_embed.0", "time_embed.2", "cond_embed", "input_proj")}
FLOATING |= {"head.final.linear", "head.final.modulation"}


@pytest.fixture(scope="module")
def config(tiny_release):
    with families.released("unipic").Released(tiny_release) as found:
        return found.config


@pytest.fixture
def model(config):
    with torch.device("meta"):
        return families.model("unipic").build(config)


def linears(model):
    return {name for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}


def test_a_wildcard_is_one_number():
    names = ["a.0.x", "a.12.x", "a.b.x", "a.0.x.y", "a.0.xx"]
    assert expand("a.*.x", names) == ["a.0.x", "a.12.x"]
    with pytest.raises(ValueError, match="no module is called a"):
        expand("a.0.z", names)


@pytest.mark.parametrize("scheme", ["int8", "bnb8", "nf4"])
def test_what_of_unipic_is_taken_and_what_stays(model, scheme):
    if scheme != "int8":
        pytest.importorskip("bitsandbytes")
    before = linears(model)
    swapped = swap(model, families.recipe("unipic", scheme))
    assert {*swapped} == before - FLOATING and len(swapped) == 3 * 4 + 4 * 4 + 2 * 3
    layers = [model.get_submodule(name) for name in swapped]
    assert all(layer.weight.is_meta and not layer.weight.requires_grad for layer in layers)
    assert all(isinstance(layer, Int8Linear) for layer in layers) == (scheme == "int8")
    rotating = {name for name in swapped if getattr(model.get_submodule(name), "group", 1) > 1}
    assert rotating == ({f"llm.layers.{i}.down" for i in range(3)} if scheme == "int8" else set())
    assert model.llm.layers[1].qkv.bias is not None and model.llm.layers[1].o.bias is None


def test_a_recipe_that_does_not_fit_is_refused(model):
    with pytest.raises(ValueError, match=r"no module is called llm.layers.\*.k"):
        swap(model, Recipe("int8", ("llm.layers.*.k",)))
    with pytest.raises(ValueError, match="norm is a RMSNorm, and only linear"):
        swap(model, Recipe("int8", ("llm.norm",)))
    with pytest.raises(ValueError, match=r"no module is called llm.layers.\*.o"):
        swap(model, Recipe("int8", ("llm.layers.*.down",), rotated_inputs=("llm.layers.*.o",)))
    with pytest.raises(ValueError, match="only int8 rotates inputs"):
        Recipe("nf4", ("llm.layers.*.down",), rotated_inputs=("llm.layers.*.down",))
    with pytest.raises(ValueError, match="'int4' is none of none, int8"):
        Recipe("int4")


def test_a_width_without_a_rotation_is_refused_before_anything_is_read(config):
    llm = replace(config.llm, width=100, head_dim=25)
    build = partial(families.model("unipic").build, replace(config, llm=llm))
    with pytest.raises(UsageError, match=r"cannot be int8: width 100 has no .*use quant none"):
        prepared(build, families.recipe("unipic", "int8"))


def test_without_bitsandbytes_there_is_a_remedy(model, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    for scheme in ("bnb8", "nf4"):
        with pytest.raises(MissingPackageError, match="bitsandbytes cannot be used"):
            swap(model, families.recipe("unipic", scheme))
        with pytest.raises(UnsupportedDeviceError, match=r"install unipic-run\[bnb\]"):
            as_scheme(scheme)
    with pytest.raises(UsageError, match="quant 'fp4' is unknown: choose from auto, none, int8, bnb8, nf4"):
        as_scheme("fp4")
    assert (as_scheme("int8"), as_scheme(None)) == ("int8", None)
