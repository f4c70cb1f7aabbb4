"""Answers by the language model as it was before its update, pictures by what it became, of one folder."""

import gc
import shutil
import warnings
import weakref
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from unipic_run import Engine
from unipic_run.engine import budget, limits
from unipic_run.engine.checkpoint import manifest
from unipic_run.engine.checkpoint.convert import convert
from unipic_run.engine.errors import CorruptWeightsError, UnipicWarning
from unipic_run.engine.gpus import GIB
from unipic_run.engine.info import checkpoint_info
from unipic_run.engine.models.deepgen import model as deepgen
from unipic_run.engine.models.deepgen.vision import as_patches
from unipic_run.engine.picture import to_pixels

HOW = {"res": 64, "steps": 2, "seed": 5}
QUESTION, LIMIT = "what is this?", 8
ASK = {"res": 64, "max_new_tokens": LIMIT}
pytestmark = pytest.mark.filterwarnings("ignore:64x64 is far")


@pytest.fixture(scope="module")
def trained(deepgen_layouts, tmp_path_factory) -> Path:
    return deepgen_layouts.native(tmp_path_factory.mktemp("trained") / "DeepGen-native")


@pytest.fixture(scope="module")
def whole(trained, tmp_path_factory) -> Path:
    return convert(trained, tmp_path_factory.mktemp("converted") / "out", family="deepgen")


@pytest.fixture(scope="module")
def merged(whole, tmp_path_factory) -> Path:
    """The same without what the language model was before, as the layout for diffusers becomes."""
    folder = shutil.copytree(whole, tmp_path_factory.mktemp("merged") / "out")
    shutil.rmtree(folder / "untuned")
    (folder / manifest.NAME).unlink()
    manifest.write(folder, {})
    return folder


def photo() -> Image.Image:
    y, x = np.mgrid[:40, :90]
    return Image.fromarray(np.stack([2 * x, 5 * y, x + y], axis=-1).astype(np.uint8))


def theirs(folder: Path):
    """transformers' Qwen2.5-VL with the weights that the update was made for."""
    transformers = pytest.importorskip("transformers")
    model = transformers.Qwen2_5_VLForConditionalGeneration(
        transformers.Qwen2_5_VLConfig(
            text_config={
                "vocab_size": 288, "hidden_size": 32, "num_hidden_layers": 6, "num_attention_heads": 2,
                "num_key_value_heads": 1, "intermediate_size": 48, "rms_norm_eps": 1e-6, "tie_word_embeddings": True,
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]},
            },
            vision_config={
                "depth": 2, "hidden_size": 32, "intermediate_size": 44, "num_heads": 2, "fullatt_block_indexes": [1],
                "out_hidden_size": 32, "window_size": 112,
            },
            image_token_id=262, video_token_id=287, vision_start_token_id=286, vision_end_token_id=285,
            tie_word_embeddings=True,
        )
    ).eval()  # fmt: skip
    stored = load_file(folder / "vlm_base" / "model.safetensors")
    spelled = {
        f"model.{n}" if "visual" in n else n.replace("model.", "model.language_model."): stored[n] for n in stored
    }
    missing, unexpected = model.load_state_dict(spelled, strict=False)
    assert missing == ["lm_head.weight"] and not unexpected
    model.tie_weights()
    return model


def answer_of(model, engine: Engine) -> list[int]:
    """The likeliest words, from the picture and the ids that our engine would give."""
    config, tokens = engine.config, engine.loaded.tokens
    seen = deepgen.question_picture(photo(), deepgen.question_size(config, photo().size, 64))
    patches, rows, columns = as_patches(to_pixels(seen, torch.float32, cast_first=True))
    text = deepgen.SYSTEM + deepgen.turn("ask", QUESTION, 1)
    ids = deepgen.as_ids(tokens, text, config.image_token, [(rows // 2, columns // 2)])
    found: list[int] = []
    while len(found) < LIMIT:
        given = torch.tensor([ids + found])
        kinds, thw = (given == config.image_token).int(), torch.tensor([[1, rows, columns]])
        with torch.no_grad():
            logits = model(
                input_ids=given, pixel_values=patches, image_grid_thw=thw, mm_token_type_ids=kinds, use_cache=False
            ).logits[0, -1]
        for token in {*found}:
            logits[token] *= 1.05 if logits[token] < 0 else 1 / 1.05
        found.append(int(logits.argmax()))
        if found[-1] == config.eos_token:
            return found[:-1]
    return found


def asked(engine: Engine, warned: bool) -> list[int]:
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        ids = [*engine.ask(photo(), QUESTION, **ASK).ids]
    assert any("unverified" in str(one.message) for one in told) == warned
    return ids


def pixels(engine: Engine) -> np.ndarray:
    return np.asarray(engine.generate("a cat", **HOW).images[0], int)


def test_answers_are_those_of_transformers_without_the_update(trained, whole, merged):
    with Engine.from_pretrained(merged, device="cpu") as engine:
        tuned, picture = asked(engine, warned=True), pixels(engine)
        expected = answer_of(theirs(trained), engine)
    assert len(expected) > 2 and tuned != expected, "the update matters"
    assert "answers" in checkpoint_info(whole) and "answers" not in checkpoint_info(merged)
    said: list[str] = []
    with Engine.from_pretrained(whole, device="cpu", say=said.append) as engine:
        for _ in range(2):  # in turns, each with its own weights
            assert np.array_equal(pixels(engine), picture)
            assert asked(engine, warned=False) == expected
            assert "".join(engine.ask(photo(), QUESTION, stream=True, **ASK)) == engine.loaded.tokens.decode(expected)
    assert [text for text in said if "language model" in text] == [
        "reading the language model to answer: as it was before it was tuned",
        "reading the language model as it was tuned, to make pictures",
        "reading the language model to answer: as it was before it was tuned",
    ]
    said.clear()
    with Engine.from_pretrained(whole, device="cpu", largest={"task": "ask"}, say=said.append) as engine:
        assert asked(engine, warned=False) == expected and not said, "read once"
        part = weakref.ref(engine.loaded.model.llm)
    assert engine.source is None and (gc.collect(), part())[1] is None


@pytest.mark.parametrize(("quant", "drop_idle"), [("none", False), ("none", True), ("nf4", False), ("bnb8", False)])
def test_a_budget_changes_nothing(whole, monkeypatch, quant, drop_idle):
    if quant != "none":
        pytest.importorskip("bitsandbytes")
    with Engine.from_pretrained(whole, device="cpu", quant=quant) as engine:
        picture, expected = pixels(engine), asked(engine, warned=False)
        assert np.array_equal(pixels(engine), picture)
    monkeypatch.setattr(budget, "bound_on", lambda device, vram: 6 * GIB)
    monkeypatch.setattr(limits, "held_to", lambda device, bound: nullcontext(str))
    with Engine.from_pretrained(whole, device="cpu", quant=quant, vram=6, drop_idle=drop_idle) as engine:
        for work, wanted in ((pixels, picture), (lambda e: asked(e, warned=False), expected)) * 3:
            engine.placing.budget = 2**40
            assert np.abs(np.subtract(work(engine), wanted)).max() <= 1, engine.placing.line
            engine.placing.budget = engine.placing.placement.peak - 1
            assert np.abs(np.subtract(work(engine), wanted)).max() <= 1, engine.placing.line
        assert "resident" not in engine.placing.line


def test_int8_is_made_of_either(trained, whole, tmp_path):
    stored = convert(trained, tmp_path / "int8", family="deepgen", quant="int8")
    found = []
    for folder in (whole, stored):
        with Engine.from_pretrained(folder, device="cpu", quant="int8") as engine:
            engine.source.fill(answering=True)
            found.append({name: tensor.clone() for name, tensor in engine.loaded.model.state_dict().items()})
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(tensor, found[1][name]) for name, tensor in found[0].items())


def test_where_reading_fails_the_next_request_begins_anew(whole, tmp_path):
    folder = shutil.copytree(whole, tmp_path / "out")
    path = folder / "untuned" / "model.safetensors"
    with Engine.from_pretrained(folder, device="cpu") as engine:
        picture, good = pixels(engine), path.read_bytes()
        path.write_bytes(good[:-4])
        with pytest.raises(CorruptWeightsError, match=r"untuned/model.safetensors has \d+ bytes"):
            engine.ask(photo(), QUESTION, **ASK)
        path.write_bytes(good)
        assert np.array_equal(pixels(engine), picture) and asked(engine, warned=False)


def test_other_layouts_have_one_set_of_weights(tiny_deepgen, tmp_path):
    folder = convert(tiny_deepgen, tmp_path / "out", family="deepgen")
    assert not (folder / "untuned").exists()
    with Engine.from_pretrained(folder, device="cpu") as engine, pytest.warns(UnipicWarning, match="unverified"):
        engine.ask(photo(), QUESTION, **ASK)
