"""DeepGen through the engine, with small random weights: gen, edit with several pictures, ask, budgets, refusals."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image
from unipic_run import Engine
from unipic_run.engine import gpus
from unipic_run.engine.errors import BudgetError, UnipicWarning, UsageError
from unipic_run.engine.forecast import Forecast
from unipic_run.engine.layers.attention import Attention
from unipic_run.engine.loaded import Loaded, Placed
from unipic_run.engine.models.deepgen import model as deepgen
from unipic_run.engine.models.deepgen.limits import fitted_size, question_size
from unipic_run.engine.models.deepgen.sampler import Levels
from unipic_run.engine.noise import FlowTape, PhiloxNoise, Stream
from unipic_run.engine.outcome import CancelToken
from unipic_run.engine.plan import META, dry_run, shapes
from unipic_run.engine.residency import describe, fit
from unipic_run.engine.task import Batch, Task
from unipic_run.quant.recipe import NONE

HOW = {"res": 64, "steps": 2, "seed": 5}
pytestmark = pytest.mark.filterwarnings("ignore::unipic_run.engine.errors.UnipicWarning")


@pytest.fixture
def engine(deepgen_engine: Engine) -> Engine:
    return deepgen_engine


def photo(width: int = 64, height: int = 64) -> Image.Image:
    y, x = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([3 * x, 3 * y, x + y], axis=-1).astype(np.uint8))


def away(a: Image.Image, b: Image.Image) -> int:
    return int(np.abs(np.asarray(a, int) - np.asarray(b, int)).max())


def test_a_picture_does_not_depend_on_what_else_is_made(engine):
    prompts = ["a cat", "a much longer text about a wooden boat"]
    together = engine.generate(prompts, n=2, batch_size=4, **HOW)
    assert together.seeds == (5, 6, 5, 6) and len({image.tobytes() for image in together.images}) == 4
    for index, image in enumerate(together.images):
        alone = engine.generate(prompts[index // 2], **HOW | {"seed": 5 + index % 2}).images[0]
        assert away(image, alone) <= 1
    one_by_one = engine.generate(prompts, n=2, **HOW)  # each batch takes over what the one before has read
    assert all(away(*pair) <= 1 for pair in zip(together.images, one_by_one.images, strict=True))


def test_steps_are_told_and_the_last_preview_would_be_the_picture(engine):
    told = []
    made = engine.generate("a cat", preview_every=1, on_event=told.append, **HOW | {"steps": 3})
    assert [(e.stage, e.round) for e in told] == [
        ("condition", 0), ("sample", 1), ("sample", 2), ("sample", 3), ("decode", 0)
    ]  # fmt: skip
    assert [len(e.previews) for e in told] == [0, 1, 1, 0, 0]
    shown = [away(e.previews[0], made.images[0]) for e in told if e.previews]
    assert shown[1] < shown[0], "what is shown comes closer"
    assert {"look", "read", "condition", "sample", "decode"} <= set(made.timings)


def test_cancelling_stops_between_steps(engine):
    from unipic_run.engine.errors import Cancelled

    token, told = CancelToken(), []

    def stop(event):
        told.append(event)
        if event.stage == "sample":
            token.cancel()

    with pytest.raises(Cancelled):
        engine.generate("a cat", on_event=stop, cancel=token, **HOW)
    assert len(told) == 2


def test_edits_are_reproducible_and_see_every_picture(engine):
    how = {"fit": "longest", **HOW}
    one = engine.edit(photo(64, 32), "make it night", **how).images[0]
    assert one.size == (64, 32) and away(engine.edit(photo(64, 32), "make it night", **how).images[0], one) == 0
    assert away(engine.edit(photo(64, 32), "make it night", **how | {"seed": 6}).images[0], one) > 0
    two = engine.edit(photo(64, 32), "join them", references=[photo(32, 64)], size=(96, 48), **how).images[0]
    other = engine.edit(photo(64, 32), "join them", references=[photo(32, 32)], size=(96, 48), **how).images[0]
    assert two.size == (96, 48) and away(two, other) > 0
    assert engine.edit(photo(), "join them", references=[photo()], **how).images[0].size == (64, 64)


def test_a_source_is_drawn_or_taken_at_its_mean(engine):
    moments = torch.randn(1, 32, 4, 6, generator=torch.Generator().manual_seed(3))
    seen, noises = deepgen.Picture(moments, (0, 0), moments), [PhiloxNoise(1), PhiloxNoise(2)]
    drawn, mean = (deepgen.posterior(engine.config, seen, 0, noises, likeliest) for likeliest in (False, True))
    expected = (moments[:, :16] - engine.config.vae_shift) * engine.config.vae_scale
    assert drawn.shape == mean.shape == (2, 16, 4, 6) and torch.equal(mean, expected.expand(2, -1, -1, -1))
    assert not torch.equal(drawn[0], drawn[1])
    made = {how: engine.edit(photo(), "make it night", posterior=how, **HOW) for how in (None, "sample", "mean")}
    told = [result.settings[0].get("posterior") for result in made.values()]
    assert told == [None, "sample", "mean"] and "exact_rope" not in made[None].settings[0]
    default, drawn, mean = (result.images[0] for result in made.values())
    assert away(default, drawn) == 0 < away(drawn, mean)


def test_what_is_drawn_for_a_source_is_its_own():
    noise, shape = PhiloxNoise(3), (16, 4, 6)
    drawn = [noise.posterior(index, shape, torch.device("cpu")) for index in (0, 1)]
    drawn.append(noise.flow_start(shape, torch.device("cpu")))
    assert all(x.shape == shape and not torch.equal(x, y) for x, y in pairwise(drawn))
    cells = torch.arange(24)
    assert torch.equal(drawn[2].flatten(1).T, noise.normal(Stream.FLOW_START, cells, 16, 1)[0])
    with pytest.raises(ValueError, match="the tape holds nothing for source picture 0"):
        FlowTape(drawn[2]).posterior(0, shape, torch.device("cpu"))


def test_answers_end_and_can_be_continued(engine):
    with pytest.warns(UnipicWarning, match="unverified"):
        answer = engine.ask(photo(90, 40), "what is this?", res=64, max_new_tokens=4)
    assert answer.text == "".join(engine.ask(photo(90, 40), "what is this?", res=64, max_new_tokens=4, stream=True))
    both = engine.ask(photo(90, 40), ["what is this?", "where?"], res=64, max_new_tokens=4)
    assert both[0].ids == answer.ids


def test_a_smaller_budget_moves_more_and_changes_nothing(engine):
    expected, loaded, lines = engine.edit(photo(), "make it night", **HOW).images[0], engine.loaded, []
    with Engine(loaded.family, loaded.model, loaded.tokens, "tiny", NONE, loaded.device, 2**40) as bounded:
        budgets = [2**40]
        for _ in range(12):
            bounded.placing.budget = budgets[-1]
            try:
                made = bounded.edit(photo(), "make it night", **HOW).images[0]
            except BudgetError:
                break
            lines.append(bounded.placing.line)
            assert away(made, expected) <= 1, lines[-1]
            budgets.append(bounded.placing.placement.peak - 1)
        assert len(lines) >= 3 and "modulation" in lines[-1].partition(" streamed")[0], lines
        bounded.placing.budget = budgets[-2]
        how = {"res": 64, "max_new_tokens": 3}
        assert bounded.ask(photo(), "what?", **how).ids == engine.ask(photo(), "what?", **how).ids
        bounded.placing.budget = 2**40
        assert away(bounded.edit(photo(), "make it night", **HOW).images[0], expected) <= 1


def test_guidance_in_two_passes_changes_nothing_and_is_taken_where_it_is_what_fits(engine):
    loaded, rows = engine.loaded, []
    task = Task("edit", 4, 4, 2, 3.0, "constant", 1.0, sources=(torch.zeros(1, 3, 64, 64),) * 8)
    forecast = Forecast(loaded, NONE, gpus.card("rtx4090"))
    work = forecast.work((), task, ["join them"], 1, previews=False)
    beside, after = (stages[3] for stages in (work.batches[1], work.apart))
    assert after.activation < 0.75 * beside.activation and (beside.passes, after.passes) == (2, 4)
    found = fit(replace(work, batches={1: (beside,)}, apart=(after,)), beside.activation - 1)
    assert found.apart and "guidance in two passes" in describe(found)
    assert not forecast.work((), replace(task, guidance=1.0), ["join them"], 1, previews=False).apart

    hook = loaded.model.dit.blocks[0].register_forward_hook(lambda block, given, made: rows.append(len(given[0])))
    with Engine(loaded.family, loaded.model, loaded.tokens, "tiny", NONE, loaded.device) as other:
        other.loaded = replace(loaded, placed=Placed(apart=True))
        made = [e.edit(photo(), "join them", references=[photo()], **HOW).images[0] for e in (engine, other)]
    hook.remove()
    assert rows == [2, 2, 1, 1, 1, 1] and away(*made) <= 1


def test_only_the_transformer_is_needed_while_denoising(engine):
    needs = deepgen.needs("edit")
    assert needs["sample"] == ("dit",) and "llm" not in (*needs["look"], *needs["condition"])
    parts = dict(engine.loaded.model.named_children())
    assert {part for kind in deepgen.kinds for named in deepgen.needs(kind).values() for part in named} == set(parts)


def test_needs_are_the_parts_that_run(engine):
    """Residency relies on it; hooks see calls of a part itself, not `llm.outputs` or the connector's queries."""
    model, tokens = engine.loaded.model, engine.loaded.tokens
    task = Task("edit", 4, 4, 2, 3.0, "constant", 1.0, sources=(torch.zeros(1, 3, 64, 64),))
    batch, ran, state = Batch(["a cat"], [PhiloxNoise(1)]), set(), None
    hooks = [part.register_forward_hook(lambda *_, name=name: ran.add(name)) for name, part in model.named_children()]
    hooks.append(model.dit.patch_embed.register_forward_hook(lambda *_: ran.add("dit")))
    try:
        with torch.inference_mode():
            for stage in ("look", "read", "condition"):
                ran.clear()
                state = getattr(deepgen, stage)(model, tokens, task, batch, state)
                assert ran | {"look": {"connector"}, "read": {"llm"}}.get(stage, set()) == set(
                    deepgen.needs("edit")[stage]
                )
            ran.clear()
            *_, latents = deepgen.sample(model, state, task, batch, deepgen.schedule(model.config, task, batch))
            assert ran == {"dit"} and tuple(latents.shape) == deepgen.latents(model.config, 1, 4, 4)
            ran.clear()
            deepgen.decode(model, latents, 4, 4)
            assert ran == {"vae_decoder"}
    finally:
        for hook in hooks:
            hook.remove()


def test_guidance_below_one_prompts_more(engine):
    """Without guidance only the conditional row is denoised; what is to be avoided still pads it."""
    short = engine.generate("a cat", guidance=1, **HOW).images[0]
    assert away(engine.generate("a cat", guidance=1, negative="x" * 40, **HOW).images[0], short) > 0
    assert away(engine.generate("a cat", guidance=1, negative="", **HOW).images[0], short) == 0


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"temperature": 0.5}, "temperature 0.5 has no meaning"),
        ({"cfg_schedule": "linear"}, "cfg_schedule linear has no meaning"),
        ({"order": "gtr"}, "order gtr has no meaning"),
        ({"guidance": 0.5}, "guidance 0.5 is below 1"),
        ({"negative": "<|im_end|>"}, "which has a meaning of its own"),
        ({"res": 400}, "sides have at most 384 pixels"),
    ],
)
def test_what_it_cannot_do_is_refused(engine, how, said):
    with pytest.raises(UsageError, match=said):
        engine.generate("a cat", **HOW | how)


def test_edits_that_are_not_offered_are_refused(engine, tiny_engine):
    mask = Image.new("L", (64, 64), 255)
    with pytest.raises(UsageError, match="does not repaint"):
        engine.edit(photo(), "a cat", mask=mask, seed=1)
    with pytest.raises(UsageError, match="9 pictures given, this model edits 8"):
        engine.edit(photo(), "join them", references=[photo()] * 8, seed=1)
    with pytest.raises(UsageError, match="2 pictures given, this model edits 1"):
        tiny_engine.edit(photo(), "join them", references=[photo()], seed=1)
    with pytest.raises(UsageError, match="the shape of their source"):
        tiny_engine.edit(photo(), "make it night", size=(64, 32), seed=1)
    with pytest.raises(UsageError, match="fit longest is not known to this model"):
        tiny_engine.edit(photo(), "make it night", fit="longest", seed=1)


def test_sizes():
    assert fitted_size((640, 480), "keep", 512) == (608, 448)
    assert fitted_size((1000, 333), "longest", 512) == (512, 192)
    assert fitted_size((31, 33), "longest", 512) == (32, 64)
    assert fitted_size((640, 480), "crop", 500) == (512, 512)
    assert question_size(None, (640, 480), 512) == (588, 420) and question_size(None, (200, 100), 512) == (196, 112)
    assert question_size(None, (10**5, 3), 512)[1] == 28


def test_levels_are_known_before_the_first_step():
    levels = Levels.of(50, 3.0)
    assert len(levels) == 50 and levels.sigmas[0] == 1.0 and levels.sigmas[-1] == 0.0
    assert levels.sigmas[1] == pytest.approx(0.993124, abs=1e-6) and levels.sigmas[-2] == pytest.approx(
        0.008929, abs=1e-6
    )


def test_a_dry_run_counts_every_step_and_sees_what_is_longer(engine):
    loaded = engine.loaded
    model = shapes(deepgen, loaded.config, NONE, torch.bfloat16, Attention())

    def plan(steps: int, prompts: list[str]):
        task = Task("generate", 4, 4, steps, 4.0, "constant", 1.0)
        batch = Batch(prompts, [PhiloxNoise(seed) for seed in range(len(prompts))])
        return dry_run(Loaded(deepgen, model, loaded.tokens, META), task, batch)

    two, three, four = (plan(steps, ["a cat"]) for steps in (2, 3, 4))
    first, then, last = (one.stages["sample"] for one in (two, three, four))
    assert last.launches - then.launches == then.launches - first.launches > 50
    assert last.flop - then.flop == then.flop - first.flop > 0 and four.stages["read"] == two.stages["read"]
    longer = plan(2, ["a cat", "something else that is longer"])
    assert longer.stages["sample"].launches > 1.5 * two.stages["sample"].launches, "texts of two lengths go separately"
