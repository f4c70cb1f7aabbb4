"""Forecasts against runs on the meta device, and what is kept of them."""

from dataclasses import replace

import pytest
import torch
from unipic_run.bench.random_model import any_tokens, architecture
from unipic_run.engine import families, forecast, gpus, kept_plans
from unipic_run.engine.forecast import Forecast
from unipic_run.engine.layers.attention import Attention
from unipic_run.engine.layers.vae_bands import decode_in_bands
from unipic_run.engine.loaded import Loaded, Placed
from unipic_run.engine.meter import Meter
from unipic_run.engine.noise import PhiloxNoise
from unipic_run.engine.outcome import CancelToken
from unipic_run.engine.plan import BANDED, META, StageClock, by_stack, dry_run, shapes
from unipic_run.engine.run import Watch, run_batch
from unipic_run.engine.task import Batch, Task

TASK = Task("generate", 6, 6, steps=3, guidance=3.0, cfg_schedule="constant", temperature=1.0)
CARD = gpus.card("rtx4090")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("UNIPIC_RUN_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def loaded(tiny_release, monkeypatch):
    """The tiny model, whose pictures of 96x96 are cut into bands."""
    monkeypatch.setattr(decode_in_bands, "__defaults__", (2048,))
    family = families.model("unipic")
    tokens = any_tokens(tiny_release / "Qwen2.5-1.5B-Instruct" / "tokenizer.json", family.IMAGE)
    config = replace(architecture(str(tiny_release)), rounds=3)
    model = shapes(family, config, families.recipe("unipic", "none"), torch.bfloat16, Attention())
    return Loaded(family, model, tokens, META)


@pytest.fixture
def runs(monkeypatch):
    """The prompts of every dry run that is made."""
    made = []

    def counted(loaded, task, batch, others):
        made.append(batch.prompts)
        return dry_run(loaded, task, batch, others)

    monkeypatch.setattr(forecast, "dry_run", counted)
    return made


def forecast_of(loaded):
    return Forecast(loaded, families.recipe("unipic", "none"), CARD)


def followed(loaded, prompt="a red fox", preview_every=0):
    """A meter that has seen a whole picture."""
    meter, watch = Meter(), Watch(lambda event: None, CancelToken(), preview_every)
    with torch.inference_mode(), by_stack(meter, loaded.model, loaded.family.stacks), meter:
        run_batch(loaded, TASK, Batch([prompt], [PhiloxNoise(0)]), None, StageClock(meter), watch)
    return meter


def peak(meter, stage):
    return max(nbytes for name, nbytes in meter.peaks.items() if name.partition("/")[0] == stage)


def test_a_repeated_request_is_not_planned_again(loaded, runs, monkeypatch):
    first = forecast_of(loaded).pictures(TASK, ["a red fox"], 1, previews=False)
    assert forecast_of(loaded).pictures(TASK, ["a lamp", "a blue cat"], 1, previews=False) == first
    assert len(runs) == 1, "prompts of about one length share a plan"
    forecast_of(loaded).pictures(replace(TASK, negative="a lamp"), ["a red fox"], 1, previews=False)
    forecast_of(loaded).pictures(TASK, ["a red fox " * 40], 1, previews=False)
    assert len(runs) == 3
    kept_plans.digest_of.cache_clear()
    monkeypatch.setattr(kept_plans, "SOURCES", ("engine/*.py",))  # as if the code had changed
    forecast_of(loaded).pictures(TASK, ["a red fox"], 1, previews=False)
    kept_plans.digest_of.cache_clear()
    assert len(runs) == 4


def test_other_cards_and_damaged_files(loaded, runs, tmp_path):
    fast = forecast_of(loaded).pictures(TASK, ["a red fox"], 1, previews=False)
    slow = Forecast(loaded, families.recipe("unipic", "none"), gpus.card("rtx3060"))
    assert slow.pictures(TASK, ["a red fox"], 1, previews=False)[1].seconds > fast[1].seconds
    assert len(runs) == 1, "what is counted is the same on every card"
    (path,) = (tmp_path / "cache" / "plans").iterdir()
    for text in ("", "{}", "[]", '{"calls": [], "stages": []}'):
        path.write_text(text)
        assert forecast_of(loaded).pictures(TASK, ["a red fox"], 1, previews=False) == fast
    assert len(runs) == 5


def test_not_everything_is_kept_for_ever(loaded, runs, tmp_path, monkeypatch):
    monkeypatch.setattr(kept_plans, "MOST", 2)
    for steps in (1, 2, 3):
        forecast_of(loaded).pictures(replace(TASK, steps=steps), ["a red fox"], 1, previews=False)
    assert len([*(tmp_path / "cache" / "plans").iterdir()]) == 2
    forecast_of(loaded).pictures(TASK, ["a red fox"], 1, previews=False)
    assert len(runs) == 3, "the newest stay"


def test_what_is_kept_holds_for_every_request_that_finds_it(loaded, runs):
    told = forecast_of(loaded)
    words, prompt = "a red fox in the snow and a lamp " * 9, "a"
    shape = told.shape(TASK, [prompt], 1)
    longest = max((words[:n] for n in range(len(words)) if told.shape(TASK, [words[:n]], 1) == shape), key=len)
    assert len(loaded.tokens.encode(longest)) > len(loaded.tokens.encode(prompt)) + 5
    plan, meter = told.plan(TASK, [prompt], 1), followed(loaded, longest)
    for stage in ("condition", "sample", "decode"):
        assert 0.8 * plan.stages[stage].peak_bytes < peak(meter, stage) <= plan.stages[stage].peak_bytes, stage
    assert plan.stages["sample"].flop >= sum(
        meter.total(stage=name).flop for name in meter.peaks if name.startswith("sample")
    )


def test_bands_and_previews_are_what_a_run_with_them_takes(loaded, monkeypatch):
    monkeypatch.setattr("unipic_run.engine.run.to_images", lambda levels: ())  # which has no values here
    batch = Batch(["a red fox"], [PhiloxNoise(0)])
    plan = dry_run(loaded, TASK, batch, others=True)
    assert plan.stages == dry_run(loaded, TASK, batch).stages | {BANDED: plan.stages[BANDED]}, "it changes nothing else"
    assert peak(followed(loaded), "decode") == plan.stages["decode"].peak_bytes > plan.stages[BANDED].peak_bytes
    tight = replace(loaded, placed=Placed(bands=True))
    latents = 6 * 6 * loaded.config.mar.channels * 2
    assert 0 <= plan.stages[BANDED].peak_bytes - peak(followed(tight), "decode") <= latents + 512
    told = forecast_of(loaded)
    monkeypatch.setattr(told, "plan", lambda *request: plan)
    _, sample, decode = told.pictures(TASK, ["a red fox"], 1, previews=True)
    assert sample.activation == peak(followed(loaded, preview_every=1), "sample") > decode.activation
    assert 0 <= sample.bands.activation - peak(followed(tight, preview_every=1), "sample") <= latents + 512
    assert "vae_decoder" in sample.needs and told.pictures(TASK, ["a red fox"], 1, previews=False)[1].bands is None


def test_plans_depend_on_the_code(tmp_path):
    files = [path for pattern in kept_plans.SOURCES for path in kept_plans.ROOT.glob(pattern)]
    assert {"meter.py", "linear.py", "int8.py"} <= {path.name for path in files} and len(files) < 1000
    before = kept_plans.digest_of(tmp_path)
    (tmp_path / "quant").mkdir()
    (tmp_path / "quant" / "int8.py").write_text("LIMIT = 127\n", encoding="utf-8")
    kept_plans.digest_of.cache_clear()  # read once a process
    assert before != kept_plans.digest_of(tmp_path) != kept_plans.digest_of(kept_plans.ROOT)
