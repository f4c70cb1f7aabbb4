"""What makes a picture cheaper, rounds without guidance and fewer steps of the head, does what it says and no more."""

from dataclasses import replace
from itertools import combinations

import pytest
import torch
from unipic_run.bench.random_model import any_tokens, architecture, fill
from unipic_run.engine import families
from unipic_run.engine.layers.attention import Attention
from unipic_run.engine.loaded import Loaded
from unipic_run.engine.models.unipic.sampler import LATEST, Kept, Sampler
from unipic_run.engine.noise import PhiloxNoise
from unipic_run.engine.plan import META, dry_run, shapes
from unipic_run.engine.sampling import SOLVERS
from unipic_run.engine.schedules import reveal_rounds
from unipic_run.engine.task import Batch, Task
from unipic_run.kernels._op import interpreted

TASK = Task("generate", 4, 4, steps=4, guidance=3.0, cfg_schedule="constant", temperature=1.0)
BATCH = Batch(["a red fox", "two much longer words"], [PhiloxNoise(1), PhiloxNoise(2)])
HALF = replace(TASK, cfg_interval=(0.0, 0.5))


@pytest.fixture(autouse=True)
def inference():
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def family():
    return families.model("unipic")


@pytest.fixture(scope="module")
def config(tiny_release):
    config = architecture(str(tiny_release))
    return replace(config, head=replace(config.head, steps=6))


@pytest.fixture(scope="module")
def tokens(tiny_release, family):
    return any_tokens(tiny_release / "Qwen2.5-1.5B-Instruct" / "tokenizer.json", family.IMAGE)


@pytest.fixture(scope="module")
def model(config, family):
    with torch.inference_mode():
        model = family.build(config)
        fill(model)
    return model


def rounds(family, model, tokens, task):
    """The latents after every round."""
    schedule = family.schedule(model.config, task, BATCH)
    conditions = family.condition(model, tokens, task, BATCH)
    return list(family.sample(model, conditions, task, BATCH, schedule))


def test_guidance_ends_where_its_interval_does(family, model, tokens):
    whole, half = rounds(family, model, tokens, TASK), rounds(family, model, tokens, HALF)
    assert all(torch.equal(a, b) for a, b in zip(whole[:2], half[:2], strict=True))
    assert not torch.equal(whole[2], half[2])


def test_a_round_without_guidance_sees_the_conditional_rows_alone(family, model, tokens):
    conditions, schedule = family.condition(model, tokens, TASK, BATCH), family.schedule(model.config, TASK, BATCH)
    samplers = {task: Sampler(model, conditions.rows, None, task, BATCH.noises) for task in (TASK, HALF)}
    known = torch.randn(family.latents(model.config, 2, 4, 4), generator=torch.Generator().manual_seed(0))
    for plan in schedule.rounds:
        both, alone = (samplers[task].understand(known, plan) for task in (TASK, HALF))
        assert len(both) == 4 and len(alone) == (4 if plan.index < 2 else 2)
        torch.testing.assert_close(alone[:2], both[:2], atol=1e-5, rtol=1e-5)


def test_an_interval_may_begin_late(family, model, tokens):
    none = rounds(family, model, tokens, replace(TASK, guidance=1.0))
    late = rounds(family, model, tokens, replace(TASK, cfg_interval=(0.5, 1.0)))
    for a, b in zip(none[:2], late[:2], strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(none[2], late[2], atol=1e-3)


def test_what_guidance_adds_is_kept_until_more_is_known(family, model, tokens):
    """Rounds know 0, 2, 5 and 10 tokens, of which the last is not 2.2 times as much as was known before."""
    task, whole = replace(TASK, cfg_cache=2.2), replace(TASK, cfg_cache=1.0)
    conditions, schedule = family.condition(model, tokens, task, BATCH), family.schedule(model.config, task, BATCH)
    assert [plan.visible.shape[1] for plan in schedule.rounds] == [0, 2, 5, 10]
    kept, exact = (Sampler(model, conditions.rows, None, t, BATCH.noises) for t in (task, whole))
    known = torch.randn(family.latents(model.config, 2, 4, 4), generator=torch.Generator().manual_seed(0))
    for plan in schedule.rounds[:3]:
        torch.testing.assert_close(kept.understand(known, plan), exact.understand(known, plan), atol=1e-5, rtol=1e-5)
    third, last = schedule.rounds[2:]
    cond, uncond = exact.conditions(known, third, last.predicted, guided=True).chunk(2)
    then = uncond - cond  # as the third round had it, of tokens that the fourth predicts
    cond, uncond = exact.understand(known, last).chunk(2)
    found, guided = kept.understand(known, last).chunk(2)
    torch.testing.assert_close(found, cond, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(guided, cond + then, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(guided, uncond, atol=1e-3)


def test_what_is_kept_is_renewed_in_nine_of_the_released_rounds(family, model, tokens, monkeypatch):
    """Whenever at least twice as much is known: early rounds, which are cheap, do so nearly all."""
    rounds_of = {True: [], False: []}

    def counted(self, known, plan, of, guided):
        rounds_of[guided].append(plan.index)
        return torch.zeros(len(known) * (1 + guided), of.shape[1], 4)

    monkeypatch.setattr(Sampler, "conditions", counted)
    conditions = family.condition(model, tokens, TASK, BATCH)
    sampler = Sampler(model, conditions.rows, None, replace(TASK, cfg_cache=2.0), BATCH.noises)
    for plan in reveal_rounds(torch.randperm(4096)[None], 64, 64, 32).rounds:
        sampler.understand(torch.zeros(1, 4096, 16), plan)
    assert rounds_of[True] == [0, 1, 2, 3, 5, 8, 12, 18, 27] and len(rounds_of[False]) == 23


def test_all_steps_of_the_head_from_an_earlier_start_are_its_own_steps(family, model, tokens, monkeypatch):
    """As many steps in every round as the model takes by itself differ only by where they begin."""
    own = rounds(family, model, tokens, TASK)
    annealed = replace(TASK, head_steps=(6, 6))
    assert not torch.equal(rounds(family, model, tokens, annealed)[-1], own[-1])
    monkeypatch.setattr("unipic_run.engine.models.unipic.sampler.LATEST", 999)
    assert torch.equal(rounds(family, model, tokens, annealed)[-1], own[-1])


def test_every_round_takes_its_own_number_of_steps(family, model, tokens):
    task = replace(TASK, head_steps=(6, 3))
    conditions, schedule = family.condition(model, tokens, task, BATCH), family.schedule(model.config, task, BATCH)
    sampler = Sampler(model, conditions.rows, None, task, BATCH.noises)
    tables = [[step.timestep for step in sampler.table(plan).steps] for plan in schedule.rounds]
    assert [len(table) for table in tables] == [6, 5, 4, 3]
    assert all(table[0] == 0 and table[-1] == LATEST == 950 for table in tables)


def test_the_solver_is_the_one_that_was_asked_for(family, model, tokens):
    """All begin alike, and come to different ends; each again to its own."""
    first = {solver: rounds(family, model, tokens, replace(TASK, solver=solver))[0] for solver in SOLVERS}
    for one, other in combinations(first.values(), 2):
        assert not torch.allclose(one, other, atol=1e-3)
    assert torch.equal(rounds(family, model, tokens, replace(TASK, solver="dpm2"))[0], first["dpm2"])


def test_without_noise_in_its_steps_a_solver_is_heated_at_the_start(family, model, tokens):
    """At temperature 0 it begins at nothing, whatever the seed; the same draws none in its steps."""
    cold, hot = (replace(TASK, solver="ddim", temperature=t) for t in (0.0, 0.5))
    conditions, (plan, *_) = (
        family.condition(model, tokens, TASK, BATCH),
        family.schedule(model.config, TASK, BATCH).rounds,
    )
    z = torch.randn(4, plan.predicted.shape[1], model.config.mar.width, generator=torch.Generator().manual_seed(0))
    alike = z[:1].expand_as(z)
    made = {
        task: Sampler(model, conditions.rows, None, task, BATCH.noises).denoise(alike, plan) for task in (cold, hot)
    }
    torch.testing.assert_close(made[cold][0], made[cold][1], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(made[hot][0], made[hot][1], atol=1e-2)


def test_kernels_make_the_same_picture(family, model, tokens):
    """Few rounds: the interpreter is slow."""
    pytest.importorskip("triton")
    batch = Batch(BATCH.prompts[:1], BATCH.noises[:1])
    task = replace(TASK, rows=2, columns=2, steps=2, head_steps=(3, 2), cfg_interval=(0.0, 0.5))

    def last():
        schedule = family.schedule(model.config, task, batch)
        *_, latents = family.sample(model, family.condition(model, tokens, task, batch), task, batch, schedule)
        return latents

    expected = last()
    with interpreted():
        got = last()
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-3)


def test_kernels_add_what_is_kept(family, model, tokens):
    pytest.importorskip("triton")
    batch, task = Batch(BATCH.prompts[:1], BATCH.noises[:1]), replace(TASK, rows=2, columns=2, steps=2, cfg_cache=9.0)
    conditions = family.condition(model, tokens, task, batch)
    last = family.schedule(model.config, task, batch).rounds[-1]
    noise = torch.Generator().manual_seed(0)
    known = torch.randn(family.latents(model.config, 1, 2, 2), generator=noise)
    kept = Kept(torch.randn(1, 4, model.config.mar.width, generator=noise), known=1)

    def seen():
        sampler = Sampler(model, conditions.rows, None, task, batch.noises)
        sampler.kept = kept
        return sampler.understand(known, last)

    expected = seen()
    with interpreted():
        got = seen()
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(got[1] - got[0], kept.difference[0, last.predicted[0]], atol=1e-5, rtol=1e-5)


def test_the_plan_knows_what_is_saved(family, config, tokens):
    def flop(**changes):
        made = shapes(family, config, families.recipe("unipic", "none"), torch.bfloat16, Attention())
        stages = dry_run(Loaded(family, made, tokens, META), replace(TASK, **changes), BATCH).stages
        return stages["sample"].flop

    whole = flop()
    assert 0.5 * whole < flop(cfg_interval=(0.0, 0.5)) < 0.9 * whole
    assert flop(head_steps=(6, 3)) < whole
    assert flop(cfg_interval=(0.0, 0.5)) < flop(cfg_cache=100.0) < whole
