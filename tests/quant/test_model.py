"""The random-weight UniPic in fewer bits: each block beside float32's, the rotation alone, files against streaming."""

from contextlib import nullcontext
from functools import partial

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from unipic_run import Engine
from unipic_run.engine import budget, families, limits, weights
from unipic_run.engine.checkpoint import manifest
from unipic_run.engine.checkpoint.convert import convert
from unipic_run.engine.errors import BudgetError, CorruptWeightsError, OutputError, UsageError
from unipic_run.engine.kv_cache import Prompts
from unipic_run.engine.layers.vit_block import ViTBlock
from unipic_run.engine.models.unipic.head import HeadBlock
from unipic_run.engine.models.unipic.model import new_cache, next_logits
from unipic_run.engine.models.unipic.recipe import ROTATION
from unipic_run.kernels.attention import attention
from unipic_run.kernels.mar_tokens import select_tokens
from unipic_run.quant.recipe import Recipe
from unipic_run.quant.rotate import rotate

pytestmark = pytest.mark.filterwarnings("ignore::unipic_run.engine.errors.UnipicWarning")
QUICK = {"res": 64, "steps": 3, "seed": 1}


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("UNIPIC_RUN_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def int8_folder(tiny_release, tmp_path_factory):
    return convert(tiny_release, tmp_path_factory.mktemp("int8") / "tiny-int8", quant="int8")


@pytest.fixture(scope="module")
def int8_engine(tiny_release):
    with Engine.from_pretrained(tiny_release, device="cpu", quant="int8") as engine:
        yield engine


@pytest.fixture(scope="module")
def rotated(tiny_release, tmp_path_factory):
    """The model in float32 with its residual stream rotated and nothing quantised."""
    folder = convert(tiny_release, tmp_path_factory.mktemp("float") / "tiny")
    row, config = families.read(folder)
    recipe = Recipe("none", (), ROTATION)
    model = weights.prepared(partial(families.model(row.name).build, config), recipe)
    weights.load(model, folder, "cpu", torch.float32, recipe=recipe)
    return model.eval()


def calls_of(engine: Engine, *kinds: type) -> dict[str, tuple]:
    """For every module of these kinds, one call from the middle of a picture: arguments and result."""
    seen: dict[str, list] = {}
    hooks = [
        layer.register_forward_hook(
            lambda _, args, kwargs, out, name=name: seen.setdefault(name, []).append((args, kwargs, out)),
            with_kwargs=True,
        )
        for name, layer in engine.loaded.model.named_modules()
        if isinstance(layer, kinds) or name == "proj_in"
    ]
    engine.generate("a red fox", **QUICK)
    for hook in hooks:
        hook.remove()
    return {name: calls[len(calls) // 2] for name, calls in seen.items()}


def error(found: Tensor, expected: Tensor, before: Tensor) -> float:
    """Of what a block adds to its input, which is harder than of its output."""
    return float((found - expected).norm() / (expected - before).norm())


@torch.inference_mode()
def test_every_block_stays_close_to_float32(tiny_engine, int8_engine):
    """Measured: at most 1.5 %, in the language model's first layer."""
    model, errors = int8_engine.loaded.model, {}
    calls = calls_of(tiny_engine, ViTBlock, HeadBlock)
    x = calls.pop("proj_in")[2]
    for name, (args, kwargs, expected) in calls.items():
        only = kwargs.get("only")
        before = args[0] if only is None else select_tokens(args[0], only)
        errors[name] = error(model.get_submodule(name)(*args, **kwargs), expected, before)
    llm = tiny_engine.loaded.model.llm
    tables = llm.rotary(torch.arange(x.shape[1])[None], x.dtype)
    for index, (plain, quantised) in enumerate(zip(llm.layers, model.llm.layers, strict=True)):
        expected = plain(x, *tables, partial(attention, causal=True))
        found = quantised(rotate(x), *tables, partial(attention, causal=True))
        errors[f"llm.layers.{index}"] = error(found, rotate(expected), rotate(x))
        x = expected
    assert len(errors) == 4 + 2 + 3 and max(errors.values()) < 0.02, errors
    assert min(errors.values()) > 1e-3, "nothing was quantised"


@torch.inference_mode()
def test_the_rotation_alone_changes_nothing_but_roundings(tiny_engine, rotated):
    model, features = tiny_engine.loaded.model, torch.randn(1, 30, 64, generator=torch.Generator().manual_seed(0))
    found = []
    for each in (model, rotated):
        hidden = each.llm(each.proj_in(features), Prompts.of([(new_cache(each, 3, each.embed.weight), 1)]))
        found.append((each.proj_out(hidden), next_logits(each, new_cache(each, 3, each.embed.weight), [1, 2, 3])))
    for expected, turned in zip(*found, strict=True):
        assert (turned - expected).abs().max() < 1e-5 * expected.abs().max()
    assert (rotated.llm.norm.weight == 1).all() and not torch.equal(model.embed.weight, rotated.embed.weight)


def test_a_converted_checkpoint_is_what_streaming_makes(int8_folder, int8_engine):
    with Engine.from_pretrained(int8_folder, device="cpu") as engine:
        assert engine.quant == "int8"
        ours, theirs = engine.loaded.model.state_dict(), int8_engine.loaded.model.state_dict()
        assert [*ours] == [*theirs]
        for name, tensor in theirs.items():
            assert ours[name].dtype == tensor.dtype and torch.equal(ours[name], tensor), name
        assert sum(tensor.dtype == torch.int8 for tensor in ours.values()) == 34


def test_the_folder_says_that_it_is_int8(int8_folder, tiny_release):
    (path,) = int8_folder.glob("*.safetensors")
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt", "quant": "int8", "quant_format": "2"}
        assert file.get_slice("llm.layers.0.qkv.weight").get_dtype() == "I8"
    assert '"quant": "int8"' in (int8_folder / "config.json").read_text()
    assert manifest.verify(int8_folder)["source"]["quant"] == "int8"
    assert convert(tiny_release, int8_folder, quant="int8") == int8_folder
    with pytest.raises(OutputError, match="not the conversion"):
        convert(tiny_release, int8_folder)
    with pytest.raises(UsageError, match="quant 'nf4' cannot be stored"):
        convert(tiny_release, int8_folder.with_name("other"), quant="nf4")


@pytest.mark.parametrize("quant", ["none", "nf4"])
def test_what_is_stored_in_int8_stays_int8(int8_folder, quant):
    if quant == "nf4":
        pytest.importorskip("bitsandbytes")
    with pytest.raises(UsageError, match=f"stored in int8, which cannot become {quant}"):
        Engine.from_pretrained(int8_folder, device="cpu", quant=quant)


def test_a_damaged_scale_is_found(int8_folder, tmp_path):
    bad = tmp_path / "bad"
    with manifest.publishing(bad, {}) as folder:
        for path in int8_folder.iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
        (folder / "manifest.json").unlink()
        (path,) = folder.glob("*.safetensors")
        data = bytearray(path.read_bytes())
        start = 8 + int.from_bytes(data[:8], "little")
        data[start : start + 4] = b"\x00\x00\xc0\x7f"  # NaN
        path.write_bytes(data)
    with pytest.raises(CorruptWeightsError, match="NaN or Inf"):
        Engine.from_pretrained(bad, device="cpu")


@pytest.mark.parametrize("quant", ["int8", "bnb8", "nf4"])
def test_pictures_and_answers_come_out_and_say_how(tiny_release, quant):
    if quant != "int8":
        pytest.importorskip("bitsandbytes")
    with Engine.from_pretrained(tiny_release, device="cpu", dtype="bf16", quant=quant) as engine:
        result = engine.generate("a red fox", **QUICK)
        assert result.settings[0]["quant"] == quant and result.settings[0]["dtype"] == "bf16"
        assert result.images[0].size == (64, 64)
        assert engine.ask(result.images[0], "what is this?", res=64, max_new_tokens=2).ids


def test_nf4_keeps_to_a_budget_with_what_can_move(tiny_release, monkeypatch):
    """Its own layers cannot: a table waits on the host, pictures are decoded in bands, and then it is too little."""
    pytest.importorskip("bitsandbytes")
    how = {"device": "cpu", "dtype": "bf16", "quant": "nf4"}
    with Engine.from_pretrained(tiny_release, **how) as engine:
        expected = engine.generate("a red fox", **QUICK).images[0]
    monkeypatch.setattr(budget, "bound_on", lambda device, vram: 4 * 2**30)
    monkeypatch.setattr(limits, "held_to", lambda device, bound: nullcontext(str))
    with Engine.from_pretrained(tiny_release, **how, vram=4) as engine:
        lines = []
        with pytest.raises(BudgetError, match="are the least"):
            for _ in range(20):
                made = engine.generate("a red fox", **QUICK).images[0]
                assert np.abs(np.asarray(made, int) - np.asarray(expected, int)).max() <= 1, lines
                lines.append(engine.placing.line)
                engine.placing.budget = engine.placing.placement.peak - 1
        assert lines[0].startswith("all resident") and "embed on the host" in lines[-1], lines
        assert not any(word in line for line in lines for word in ("streamed", "llm staged", "head staged")), lines
