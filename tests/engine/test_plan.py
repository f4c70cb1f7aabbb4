"""The dry run: equal to a run that counts every step, and the released model's figures."""

import subprocess
import sys
import textwrap
from collections import Counter
from dataclasses import replace

import pytest
import torch
from unipic_run.bench.random_model import any_tokens, architecture
from unipic_run.engine import families, gpus
from unipic_run.engine.foreseen import ALL, ForeseenGraphs
from unipic_run.engine.layers.attention import Attention
from unipic_run.engine.loaded import Loaded
from unipic_run.engine.meter import Meter
from unipic_run.engine.models.unipic.config import RELEASED
from unipic_run.engine.noise import PhiloxNoise
from unipic_run.engine.outcome import CancelToken
from unipic_run.engine.plan import META, StageClock, by_stack, dry_answer, dry_run, shapes, stages_of
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


def test_shapes_and_attention_leave_torchs_compiler_where_it_is() -> None:
    """It takes seconds to load, at the start of every run. Operations on the meta device, of a dry run, do load it."""
    code = """
        import sys, torch
        from unipic_run.engine.estimate import ask_for
        from unipic_run.kernels.attention import attention
        for model in ("unipic", "deepgen"):
            for quant in ("none", "int8"):
                ask_for(model, "gen", quant=quant)
        with torch.inference_mode():
            attention(*(torch.zeros(1, 2, length, 16) for length in (3, 5, 5)), causal=True)
        sys.exit("torch._dynamo" in sys.modules)
    """
    subprocess.run([sys.executable, "-P", "-c", textwrap.dedent(code)], check=True, timeout=120)


@pytest.mark.parametrize("scheme", ["none", "int8"])
def test_what_is_done_once_counts_as_often_as_it_runs(load, tiny_release, scheme) -> None:
    config = architecture(str(tiny_release))
    loaded = load(replace(config, head=replace(config.head, steps=25)), scheme)
    task = Task("generate", 4, 4, steps=3, guidance=3.0, cfg_schedule="constant", temperature=1.0)
    plan, meter = dry_run(loaded, task, BATCH), Meter()
    with torch.inference_mode(), by_stack(meter, loaded.model, loaded.family.stacks), meter:
        run_batch(loaded, task, BATCH, None, StageClock(meter), Watch(lambda event: None, CancelToken(), 0))
    assert plan.calls == meter.calls
    every = stages_of(meter)
    assert {name: stage.peak_bytes for name, stage in plan.stages.items()} == {
        name: stage.peak_bytes for name, stage in every.items()
    }
    assert plan.stages["sample"].launches == every["sample"].launches
    assert sum(sum(calls.values()) for calls, _ in plan.history) == sum(meter.calls.values())
    assert max(peak for _, peak in plan.history) == max(stage.peak_bytes for stage in plan.stages.values())
    for owner, method in ((loaded.model.head, "advance"), (loaded.model.llm.layers[1], "follow")):
        assert getattr(owner, method).__func__ is getattr(type(owner), method), "as it was before"
    seconds = plan.seconds(gpus.card("rtx4090"))
    shares = plan.shares(gpus.card("rtx4090"))["sample"]
    assert set(shares) == set(loaded.family.stacks) and 0 < sum(shares.values()) < seconds["sample"]
    assert set(seconds) == set(plan.stages) == {"condition", "sample", "decode"} and min(seconds.values()) > 0


@pytest.mark.parametrize(
    ("how", "seconds", "in_turns"),
    [((), 6.5, 6.8), (("int8", "int8-qk"), 2.85, 3.2)],
    ids=["bf16, of which 6.8 are wanted", "int8, of which 2.6 are wanted"],
)
def test_a_picture_of_the_released_model_within_its_figures(load, how, seconds, in_turns, monkeypatch) -> None:
    run, graphs, captured = ForeseenGraphs.run, [], {}

    def counted(self, what, key, function, given, after=2):
        graphs.append((what, key))
        if after > 1 or (what, key) in captured:
            return run(self, what, key, function, given, after)
        before = self.meter.total().launches
        result = run(self, what, key, function, given, after)
        captured[what, key] = self.meter.total().launches - before
        return result

    monkeypatch.setattr(ForeseenGraphs, "run", counted)
    task = Task("generate", 64, 64, steps=32, guidance=3.0, cfg_schedule="constant", temperature=1.0)
    plan = dry_run(load(RELEASED, *how), task, BATCH)
    sample = plan.stages["sample"]
    assert 855e12 < sample.flop < 880e12, "about 870 TFLOP are the least there is to do, whatever the precision"
    assert sum(stage.launches for stage in plan.stages.values()) <= 120_000
    assert 32 < len(graphs) <= 3500, "all of it is launched as so many graphs once they are captured"
    assert 3000 < sum(captured.values()) <= 4500, "what a first picture launches twice, while the card waits"
    card, whole = gpus.card("rtx4090"), Counter({replace(call, programs=0): 0 for call in plan.calls})
    for call, times in plan.calls.items():
        whole[replace(call, programs=0)] += times
    assert sum(replace(plan, calls=whole).seconds(card).values()) <= seconds, "if tiles filled the card"
    assert seconds < sum(plan.seconds(card).values()) <= in_turns


def test_graphs_hold_a_pool_and_copies_that_eager_runs_do_not(load, tiny_release) -> None:
    config = architecture(str(tiny_release))
    loaded = load(replace(config, head=replace(config.head, steps=100)))
    task = Task("generate", 4, 4, steps=3, guidance=3.0, cfg_schedule="constant", temperature=1.0)
    plan = dry_run(loaded, task, BATCH)
    head, both = plan.graphs["head"], plan.graphs[ALL]
    assert set(plan.graphs) == {ALL, "head", "round"}
    assert 2**21 <= head.pool <= both.pool <= head.pool + plan.graphs["round"].pool, "one pool, whose room is shared"
    assert both.kept >= head.kept + plan.graphs["round"].kept > head.kept > 0
    states = sum(n for n in (6, 6, 4)) * 2 * config.head.width * 2  # c of both guidance halves, whatever else there is
    assert head.kept > states
    assert loaded.model.graphs.counts.captures == 0, "the model has its own again"


def test_of_an_answer_they_hold_one_token(load, tiny_release) -> None:
    plan = dry_answer(load(architecture(str(tiny_release))), (64, 64), "what is this?", 9)
    assert set(plan.graphs) == {ALL, "token"}
    assert 0 < plan.graphs["token"].kept < 2**16, "scores and numbers, no cache: that counts where it lives"
