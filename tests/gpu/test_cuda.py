"""What only a CUDA device can show, on tiny models: agreement with the CPU, batches, no waiting inside a round."""

import math
from dataclasses import replace
from itertools import takewhile

import numpy as np
import pytest
import torch
from PIL import Image
from unipic_run import Engine
from unipic_run.bench.parity_watch import Watch
from unipic_run.engine.noise import PhiloxNoise
from unipic_run.engine.precision import true_float32
from unipic_run.engine.task import Batch, Task

# A kernel that falls back to torch would agree with torch.
pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("error::unipic_run.kernels._op.KernelWarning")]
PROMPTS = ["a red fox", "two cats in the snow at night", "a lamp", "three dogs beside an old wooden chair"]


@pytest.fixture(scope="module")
def load(tiny_release, tiny_deepgen, tmp_path_factory):
    """An engine for (device, dtype, quant, attention, model), loaded once."""
    engines, folders = {}, {"unipic": tiny_release, "deepgen": tiny_deepgen}

    def get(device, dtype="fp32", quant="none", attention="auto", model="unipic"):
        key = device, dtype, quant, attention, model
        if key not in engines:
            how = {"device": device, "dtype": dtype, "quant": quant, "attention": attention}
            engines[key] = Engine.from_pretrained(folders[model], **how)
        return engines[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("UNIPIC_RUN_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield get
    for engine in engines.values():
        engine.close()


def picture():
    y, x = np.mgrid[:96, :128]
    return Image.fromarray(np.stack([2 * x, 2 * y, x + y], axis=-1).astype(np.uint8))


def tokens_of(engine, make):
    with Watch(engine) as watch:
        make(engine)
    return torch.cat([batch.tokens for batch in watch.batches])


def psnr(a, b):
    """Decibels between two 8-bit pictures."""
    error = np.square(np.asarray(a, dtype=float) - np.asarray(b, dtype=float)).mean()
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)


@pytest.mark.parametrize(
    "make",
    [
        lambda engine: engine.generate(PROMPTS[:2], res=128, steps=4, seed=3),
        lambda engine: engine.edit(picture(), "make it night", res=96, steps=3, seed=3),
    ],
    ids=["generate", "edit"],
)
def test_float32_agrees_with_the_cpu(load, make):
    ours, reference = tokens_of(load("cuda"), make), tokens_of(load("cpu"), make)
    assert (ours - reference).abs().max() <= 2e-4 * max(1.0, reference.abs().max())


@pytest.mark.parametrize(
    ("model", "settings"),
    [
        ("unipic", {"speed": "balanced"}),
        ("unipic", {"speed": "fast"}),
        ("unipic", {"solver": "dpm2", "cfg_interval": (0.0, 0.6)}),
        ("deepgen", {}),
        ("deepgen", {"cfg_interval": (0.0, 0.6), "block_cache": 1.0}),
        ("deepgen", {"batch_size": 1}),
    ],
    ids=["balanced", "fast", "solver", "deepgen", "deepgen, shortcuts", "deepgen, one by one"],
)
def test_pictures_in_float32_agree_with_the_cpu(load, model, settings):
    def pictures(device):
        engine, how = load(device, model=model), {"steps": 4, "seed": 3, **settings}
        made = engine.generate(PROMPTS[:3], res=128, **how).images
        return [*made, *engine.edit(picture(), "make it night", res=96, **how).images] if model == "deepgen" else made

    ours, reference = pictures("cuda"), pictures("cpu")
    assert min(psnr(a, b) for a, b in zip(ours, reference, strict=True)) >= 50


@pytest.mark.parametrize("attention", ["sdpa", "int8-qk"])
def test_deepgen_in_int8_agrees_with_the_cpu(load, attention):
    how = {"dtype": "bf16", "quant": "int8", "attention": attention, "model": "deepgen"}
    ours, reference = (
        load(device, **how).generate(PROMPTS[:2], res=128, steps=4, seed=3).images for device in ("cuda", "cpu")
    )
    assert min(psnr(a, b) for a, b in zip(ours, reference, strict=True)) >= 25


@pytest.mark.parametrize("attention", ["sdpa", "int8-qk"])
def test_int8_agrees_with_the_cpu(load, attention):
    """A value that is rounded to the next whole number on one of them only is worth a hundredth of its row."""

    def make(engine):
        return engine.generate(PROMPTS[:2], res=128, steps=4, seed=3)

    how = {"quant": "int8", "attention": attention}
    ours, reference = tokens_of(load("cuda", **how), make), tokens_of(load("cpu", **how), make)
    assert (ours - reference).norm() <= 0.05 * reference.norm()


def test_answers_agree_with_the_cpu(load):
    asked = {"question": "what is this?", "res": 96, "max_new_tokens": 12}
    assert load("cuda").ask(picture(), **asked).ids == load("cpu").ask(picture(), **asked).ids


def test_a_batch_makes_the_same_pictures_as_single_runs(load):
    engine, settings = load("cuda"), {"res": 128, "steps": 4, "seed": 5}
    together = engine.generate(PROMPTS, batch_size=4, **settings).images
    singles = engine.generate(PROMPTS, batch_size=1, **settings).images
    assert min(psnr(a, b) for a, b in zip(together, singles, strict=True)) >= 40


@pytest.mark.parametrize(("dtype", "quant", "attention"), [("fp32", "none", "sdpa"), ("bf16", "int8", "int8-qk")])
@pytest.mark.parametrize(
    ("model", "speed"), [("unipic", "exact"), ("unipic", "balanced"), ("unipic", "fast"), ("deepgen", "exact")]
)
def test_a_round_never_waits_for_the_device(load, model, speed, dtype, quant, attention):
    """Of three pictures of one shape: eager, with captures, and replayed."""
    engine = load("cuda", dtype, quant, attention, model)
    loaded, family = engine.loaded, engine.loaded.family
    task = Task("generate", 8, 8, steps=4, guidance=3.0, cfg_schedule="linear", temperature=0.9)
    if speed != "exact":
        task = replace(task, **family.speeds(engine.config)[speed])
    loaded.model.graphs.clear()
    with torch.inference_mode(), true_float32():
        for picture in range(3):
            batch = Batch(PROMPTS[:2], [PhiloxNoise(picture), PhiloxNoise(9)])
            conditions = None
            for stage in takewhile(lambda name: name != "sample", family.needs(task.kind)):
                conditions = getattr(family, stage)(loaded.model, loaded.tokens, task, batch, conditions)
            rounds = engine.family.schedule(engine.config, task, batch).to(engine.device)
            sampling = family.sample(loaded.model, conditions, task, batch, rounds)
            next(sampling)  # tables go up, and the first round may set libraries up
            left = len(rounds) - 1
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
            try:
                assert len(list(sampling)) == left > 0
            finally:
                torch.cuda.set_sync_debug_mode("default")
    assert loaded.model.graphs.failed == {}


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_half_precision_runs_all_tasks(load, dtype):
    engine = load("cuda", dtype)
    for result in (
        engine.generate(PROMPTS, res=64, steps=3, seed=1),
        engine.edit(picture(), "make it night", res=96, steps=3, seed=1),
    ):
        assert all(np.asarray(image).std() > 1 for image in result.images)
        assert result.peak_bytes > 0
    assert engine.ask(picture(), "what is this?", res=96, max_new_tokens=5).ids


@pytest.mark.parametrize(("quant", "attention"), [("none", "sdpa"), ("int8", "int8-qk")])
@pytest.mark.parametrize("kind", ["guided", "unguided", "edit", "balanced", "fast"])
def test_graphs_make_the_pictures_that_eager_makes_bit_for_bit(load, quant, attention, kind):
    engine = load("cuda", "bf16", quant, attention)
    graphs = engine.loaded.model.graphs

    def make(prompt):
        settings = {"res": 96, "steps": 4, "seed": 3, "guidance": 1.0 if kind == "unguided" else 3.0}
        settings |= {"speed": kind} if kind in ("balanced", "fast") else {}
        if kind == "edit":
            return engine.edit(picture(), prompt, **settings).images[0]
        return engine.generate(prompt, **settings).images[0]

    graphs.clear("off")
    expected = [np.asarray(make(prompt)) for prompt in PROMPTS[:3]]
    graphs.clear()
    captures, misses = [], graphs.counts.misses
    for prompt, eager in zip(PROMPTS[:3], expected, strict=True):
        before = graphs.counts.captures
        assert np.array_equal(np.asarray(make(prompt)), eager)
        captures.append(graphs.counts.captures - before)
    assert graphs.failed == {} and graphs.counts.misses == misses
    assert captures[1] > 0 and captures[2] == 0


@pytest.mark.parametrize(("quant", "attention"), [("none", "sdpa"), ("int8", "int8-qk")])
@pytest.mark.parametrize("model", ["unipic", "deepgen"])
def test_graphs_give_the_answers_that_eager_gives(load, quant, attention, model):
    engine = load("cuda", "bf16", quant, attention, model)
    graphs, asked = engine.loaded.model.graphs, {"res": 96, "max_new_tokens": 12}
    questions = ["what is this?", "is it night?"]

    def answer():
        return [found.ids for found in engine.ask(picture(), questions, **asked)]

    graphs.clear("off")
    eager = answer()
    graphs.clear()
    counts = graphs.counts
    captures, replays, misses = counts.captures, counts.replays, counts.misses
    assert answer() == answer() == eager and sum(map(len, eager)) > 4
    assert counts.captures == captures + 1 and counts.replays > replays
    asked["max_new_tokens"] = 300  # another cache, and then the first one's size anew
    assert [ids[:12] for ids in answer()] == eager
    asked["max_new_tokens"] = 12
    assert answer() == eager and counts.captures == captures + 3
    assert graphs.failed == {} and counts.misses == misses


@pytest.mark.parametrize(("quant", "attention"), [("none", "sdpa"), ("int8", "int8-qk")])
@pytest.mark.parametrize("kind", ["guided", "edit", "block_cache"])
def test_graphs_make_deepgens_pictures_bit_for_bit(load, quant, attention, kind):
    engine = load("cuda", "bf16", quant, attention, "deepgen")
    graphs = engine.loaded.model.graphs

    def make():
        if kind == "edit":
            return np.asarray(engine.edit(picture(), "make it night", res=96, steps=4, seed=3).images[0])
        how = {"block_cache": 1.0} if kind == "block_cache" else {}
        return np.asarray(engine.generate(PROMPTS[0], res=96, steps=4, seed=3, **how).images[0])

    graphs.clear("off")
    eager = make()
    graphs.clear()
    captures, misses = [], graphs.counts.misses
    for _ in range(3):
        before = graphs.counts.captures
        assert np.array_equal(make(), eager)
        captures.append(graphs.counts.captures - before)
    assert graphs.failed == {} and graphs.counts.misses == misses
    assert captures[0] > 0 and captures[2] == 0
