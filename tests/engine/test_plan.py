"""The dry run: equal to a run that counts every step, and the released model's figures."""

from dataclasses import replace

import pytest
import torch
from unipic_run.bench.random_model import any_tokens, architecture
from unipic_run.engine import families, gpus
from unipic_run.engine.layers.attention import Attention
from unipic_run.engine.loaded import Loaded
from unipic_run.engine.meter import Meter
from unipic_run.engine.models.unipic.config import RELEASED
from unipic_run.engine.noise import PhiloxNoise
from unipic_run.engine.plan import META, StageClock, by_stack, dry_run, nbytes, shapes
from unipic_run.engine.request import CancelToken
from unipic_run.engine.run import Watch, run_batch
from unipic_run.engine.task import Batch, Task

BATCH = Batch(["a red fox in the snow"], [PhiloxNoise(1)])


@pytest.fixture(scope="module")
def load(tiny_release):
    """A model on the meta device, by its configuration."""
    family = families.model("unipic")
    tokens = any_tokens(tiny_release / "Qwen2.5-1.5B-Instruct" / "tokenizer.json", family.IMAGE)

    def get(config, scheme="none", attention="sdpa"):
        recipe = families.recipe("unipic", scheme)
        return Loaded(family, shapes(family, config, recipe, torch.bfloat16, Attention(attention)), tokens, META)

    return get


def test_steps_that_are_counted_once_count_as_often_as_they_run(load, tiny_release) -> None:
    config = architecture(str(tiny_release))
    loaded = load(replace(config, head=replace(config.head, steps=25)))
    task = Task("generate", 4, 4, steps=3, guidance=3.0, cfg_schedule="constant", temperature=1.0)
    plan, meter = dry_run(loaded, task, BATCH), Meter()
    with torch.inference_mode(), by_stack(meter, loaded.model, loaded.family.stacks), meter:
        run_batch(loaded, task, BATCH, None, StageClock(meter), Watch(lambda event: None, CancelToken(), 0))
    assert plan.calls == meter.calls
    assert plan.stages["sample"].peak_bytes == max(b for name, b in meter.peaks.items() if name.startswith("sample"))
    assert loaded.model.head.advance.__func__ is type(loaded.model.head).advance
    assert plan.parts["llm"] == nbytes(loaded.model.llm) > 0
    seconds = plan.seconds(gpus.card("rtx4090"))
    shares = plan.shares(gpus.card("rtx4090"))["sample"]
    assert set(shares) == set(loaded.family.stacks) and 0 < sum(shares.values()) < seconds["sample"]
    assert set(seconds) == set(plan.stages) == {"condition", "sample", "decode"} and min(seconds.values()) > 0


def test_a_picture_of_the_released_model_within_its_figures(load) -> None:
    task = Task("generate", 64, 64, steps=32, guidance=3.0, cfg_schedule="constant", temperature=1.0)
    plan = dry_run(load(RELEASED), task, BATCH)
    sample = plan.stages["sample"]
    assert 860e12 < sample.flop < 880e12, "875 TFLOP are the least there is to do"
    assert sum(stage.launches for stage in plan.stages.values()) <= 120_000
    assert sum(plan.seconds(gpus.card("rtx4090")).values()) <= 6.8
