"""DeepGen's cheaper pictures: an interval of guidance, blocks that are not run again, fewer steps."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from unipic_run import Engine
from unipic_run.engine.graphs import Graphs, parts
from unipic_run.engine.layers.attention import Attention
from unipic_run.engine.loaded import Loaded
from unipic_run.engine.models.deepgen import model as deepgen
from unipic_run.engine.models.deepgen.block_cache import MOST_REUSED, relative_change
from unipic_run.engine.models.deepgen.modulation import of_layers
from unipic_run.engine.models.deepgen.sampler import Levels
from unipic_run.engine.mover import Mover
from unipic_run.engine.noise import PhiloxNoise
from unipic_run.engine.plan import META, Plan, dry_run, shapes
from unipic_run.engine.residency import Placement
from unipic_run.engine.schedules import euler_step
from unipic_run.engine.task import Batch, Task
from unipic_run.engine.transfer import Lanes
from unipic_run.quant.recipe import NONE

TASK = Task("generate", 4, 4, steps=6, guidance=4.0, cfg_schedule="constant", temperature=1.0)
CACHED = replace(TASK, block_cache=0.5)
pytestmark = pytest.mark.filterwarnings("ignore::unipic_run.engine.errors.UnipicWarning")


@pytest.fixture
def engine(deepgen_engine: Engine) -> Engine:
    return deepgen_engine


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


def conditions(engine: Engine, task: Task, batch: Batch) -> deepgen.Conditions:
    state = None
    for stage in ("look", "read", "condition"):
        state = getattr(deepgen, stage)(engine.loaded.model, engine.loaded.tokens, task, batch, state)
    return state


def batch_of(*prompts: str, apart: bool = False) -> Batch:
    return Batch(prompts, [PhiloxNoise(len(prompt)) for prompt in prompts], apart)


def made(engine: Engine, task: Task, batch: Batch | None = None) -> tuple[list[Tensor], list[int]]:
    """What every step predicts, and how many rows each pass through the last block had."""
    batch, model, rows = batch or batch_of("a cat"), engine.loaded.model, []
    hook = model.dit.blocks[-1].register_forward_hook(lambda block, given, _: rows.append(len(given[0])))
    schedule = deepgen.schedule(model.config, task, batch)
    steps = list(deepgen.sample(model, conditions(engine, task, batch), task, batch, schedule))
    hook.remove()
    return steps, rows


def equal(some: list[Tensor], others: list[Tensor]) -> bool:
    return all(torch.equal(*pair) for pair in zip(some, others, strict=True))


def close(some: list[Tensor], others: list[Tensor]) -> None:
    for pair in zip(some, others, strict=True):
        torch.testing.assert_close(*pair, atol=1e-5, rtol=1e-5)


def test_guidance_is_on_in_its_interval_and_other_steps_have_the_conditional_rows(engine):
    (exact, _), (early, rows) = made(engine, TASK), made(engine, replace(TASK, cfg_interval=(0.0, 0.5)))
    assert rows == [2, 2, 2, 1, 1, 1] and equal(exact[:3], early[:3]) and not torch.equal(exact[3], early[3])
    unguided, _ = made(engine, replace(TASK, guidance=1.0))
    late, rows = made(engine, replace(TASK, cfg_interval=(0.5, 1.0)))
    assert rows == [1, 1, 1, 2, 2, 2] and not torch.allclose(unguided[3], late[3], atol=1e-3)
    close(unguided[:3], late[:3])


@pytest.mark.parametrize("task", [replace(TASK, cfg_interval=(0.2, 0.7)), replace(CACHED, cfg_interval=(0.2, 0.7))])
def test_guidance_in_two_passes_and_other_pictures_change_nothing(engine, task):
    prompts = "a cat", "a dog", "a much longer text about a wooden boat"  # two of a length, and one alone
    together, _ = made(engine, task, batch_of(*prompts))
    for index, prompt in enumerate(prompts):
        alone, _ = made(engine, task, batch_of(prompt))
        close([x[index : index + 1] for x in together], alone)
        close(made(engine, task, batch_of(prompt, apart=True))[0], alone)


def test_pictures_of_one_prompt_share_its_modulation_and_decide_for_themselves(engine):
    task, noises = replace(TASK, steps=12, block_cache=0.55), [PhiloxNoise(5), PhiloxNoise(6)]
    together, rows = made(engine, task, Batch(["a cat"] * 2, noises))
    assert {1, 2, 3} & {*rows}, "some rows of four without the others"
    for index, noise in enumerate(noises):
        close([x[index : index + 1] for x in together], made(engine, task, Batch(["a cat"], [noise]))[0])


def test_a_cache_that_is_never_used_changes_no_bit(engine):
    (exact, _), (cached, rows) = made(engine, TASK), made(engine, replace(TASK, block_cache=0.0))
    assert rows == [2] * 6 and equal(exact, cached)


def by_the_book(engine: Engine, task: Task, batch: Batch) -> tuple[list[Tensor], list[int]]:
    """One picture, row by row, as the first-block cache is described."""
    model, found = engine.loaded.model, conditions(engine, task, batch)
    guided, dit, config = found.prompts[found.rows[0]], model.dit, model.config.dit
    levels, steps, ran = Levels.of(task.steps, model.config.shift), [], []
    x = batch.noises[0].flow_start(deepgen.latents(model.config, 1, 4, 4)[1:], torch.device("cpu"))[None]
    pictures = enumerate(found.pictures)
    references = [dit.embed(deepgen.posterior(model.config, seen, index, batch.noises)) for index, seen in pictures]
    context, then, rest, reused = dit.context_embed(guided.text), {}, {}, {0: 0, 1: 0}
    for step, (now, after) in enumerate(zip(levels.sigmas, levels.sigmas[1:], strict=False)):
        velocity, count = [], 0
        for row in (0, 1):
            *chunks, _ = of_layers(guided.modulation[step][row : row + 1], config)
            before, noisy = torch.cat([dit.embed(x), *references], dim=1), 16
            image, text = dit.blocks[0](before, context[row : row + 1], *chunks[:2], noisy)
            added = (image - before)[:, :noisy]
            moved = ((added - then[row]).abs().mean() / then[row].abs().mean()).item() if row in then else 1e9
            if moved < task.block_cache and reused[row] < MOST_REUSED:
                reused[row] += 1
                image = image[:, :noisy] + rest[row]
            else:
                then[row], reused[row], first, count = added, 0, image[:, :noisy], count + 1
                for index, block in enumerate(dit.blocks[1:], 1):
                    image, text = block(image, text, *chunks[2 * index : 2 * index + 2], noisy)
                rest[row] = image - first
            velocity.append(dit.velocity(image, guided.modulation[step][row : row + 1], *x.shape[2:]))
        ran.append(count)
        mixed = velocity[1] + task.guidance * (velocity[0] - velocity[1])
        steps.append(euler_step(x, mixed, -now))
        x = euler_step(x, mixed, after - now)
    return steps, ran


EDIT = replace(TASK, kind="edit", sources=(torch.linspace(-1, 1, 3 * 64 * 64).view(1, 3, 64, 64),))
RULED = [replace(TASK, steps=8, block_cache=x) for x in (0.4, 0.5, 0.6)] + [replace(EDIT, steps=8, block_cache=0.7)]


def test_blocks_are_reused_by_the_rule(engine):
    seen = set()
    for task in RULED:
        (found, rows), (expected, ran) = made(engine, task), by_the_book(engine, task, batch_of("a cat"))
        assert rows == [count for count in ran if count] and 2 <= sum(ran) < 16, ran
        close(found, expected)
        seen |= {*ran}
    assert seen == {0, 1, 2}, "every kind of step was met"


def test_no_more_than_a_few_steps_in_a_row_are_reused(engine):
    _, rows = made(engine, replace(TASK, steps=9, block_cache=1.0, guidance=1.0))
    assert rows == [1] * 3, "steps 0, 4 and 8"
    assert relative_change(torch.zeros(2, 3), torch.zeros(2, 3)).isnan(), "and nothing is ever less than that"


def test_weights_that_are_streamed_are_moved_only_for_blocks_that_run(engine):
    model, lanes = engine.loaded.model, Counting(torch.device("cpu"))
    tasks, batch = [replace(TASK, steps=8, block_cache=threshold) for threshold in (None, 1.0)], batch_of("a cat")
    found = [conditions(engine, task, batch) for task in tasks]

    def last(task: Task, known: deepgen.Conditions) -> Tensor:
        return [*deepgen.sample(model, known, task, batch, deepgen.schedule(model.config, task, batch))][-1]

    expected, mover = [last(*given) for given in zip(tasks, found, strict=True)], Mover(model, lanes)
    mover.place(placement(model, "streamed"))
    moved = []
    for given, known in zip(zip(tasks, found, strict=True), expected, strict=True):
        with mover.running():
            mover.enter("sample")
            lanes.bytes = 0
            assert torch.equal(last(*given), known)
        moved.append(lanes.bytes)
    mover.place(placement(model, "resident"))
    stack = sum(x.numel() * x.element_size() for x in model.dit.blocks.parameters())
    assert moved[0] >= 8 * stack and 2 * stack <= moved[1] <= 0.3 * moved[0], "two of eight passes, and nothing else"


class Counting(Lanes):
    bytes = 0

    def copy(self, target: Tensor, source: Tensor) -> None:
        self.bytes += len(source)
        super().copy(target, source)


def placement(model: deepgen.DeepGen, dit: str) -> Placement:
    where = {name: "resident" for name, _ in model.named_children()} | {"dit": dit}
    stages = {"sample": ("dit",) if dit == "streamed" else ()}
    how = {"early": frozenset(), "banded": (), "at_once": 1, "apart": False, "peaks": {}}
    return Placement(where, stages, **how, seconds=0.0, split=False, budget=0)


class Overwriting:
    """In place of a capture: a replay computes again into the same tensors, and spoils what all other graphs left."""

    def __init__(self) -> None:
        self.results: list = []

    def __call__(self, function, device, first):
        result = function()
        self.results.append(result)

        def replay() -> None:
            again = list(leaves(function()))
            for x in leaves(tuple(self.results)):
                x.fill_(torch.nan)
            for x, y in zip(leaves(result), again, strict=True):
                x.copy_(y)

        return replay, result


def leaves(x) -> Iterator[Tensor]:
    if isinstance(x, Tensor):
        yield x
    for part in parts(x) or ():
        yield from leaves(part)


def test_graphs_change_nothing_and_are_captured_once(engine, monkeypatch):
    task = replace(TASK, steps=12, cfg_interval=(0.0, 0.75), block_cache=0.55)
    expected, rows = made(engine, task)
    assert rows == [2, 1, 2, 1, 2, 1], "of two rows both, one or none run, of one as well"
    graphs = Graphs(Overwriting(), kind="cpu")
    monkeypatch.setattr(engine.loaded.model, "graphs", graphs)
    for _ in range(3):
        found, _ = made(engine, task)
        close(found, expected)
        last = graphs.counts.captures, graphs.counts.eager
    assert graphs.counts.misses == 0 and not graphs.failed and 2 <= last[0] <= 4
    made(engine, task)
    assert (graphs.counts.captures, graphs.counts.eager) == last, "all of a further picture is replayed"
    graphs.failed["round"] = "layers are streamed"  # as a placement has it
    replays = graphs.counts.replays
    close(made(engine, task)[0], expected)
    assert (graphs.counts.captures, graphs.counts.replays) == (last[0], replays)


def planned(engine: Engine, **changes) -> Plan:
    model = shapes(deepgen, engine.config, NONE, torch.bfloat16, Attention())
    task = replace(TASK, rows=8, columns=8, steps=4, **changes)
    return dry_run(Loaded(deepgen, model, engine.loaded.tokens, META), task, batch_of("a cat"), others=True)


def test_the_plan_knows_what_is_saved_and_what_is_not_known(engine):
    exact, half, never, always = (
        planned(engine, **how).stages
        for how in ({}, {"cfg_interval": (0.0, 0.5)}, {"block_cache": 0.9}, {"block_cache": 1.0})
    )
    flop = {name: [plan[name].flop for plan in (exact, half, never, always)] for name in exact if "sample" in name}
    assert set(flop) == {"sample", "sample in two passes"}
    for whole, guided, upper, lower in flop.values():
        assert guided == pytest.approx(0.75 * whole, rel=0.01)
        assert whole <= upper < 1.02 * whole and 0.25 * whole < lower < 0.6 * whole
    width = engine.config.dit.heads * engine.config.dit.head_dim
    kept = 2 * 2 * 64 * width * 2  # bytes: two tensors of two rows, 64 tokens, in bfloat16
    assert 0 < never["sample"].peak_bytes - exact["sample"].peak_bytes < 1.5 * kept


def test_fewer_steps_are_those_of_the_same_shift(engine):
    few, many = (deepgen.schedule(engine.config, replace(TASK, steps=steps), None).sigmas for steps in (13, 50))
    assert len(few) == 14 and few[0] == many[0] == 1.0 and few[-1] == many[-1] == 0.0
    assert few[-2] == pytest.approx(many[-2]) and few[6] == pytest.approx(0.7514, abs=2e-3), "half of the way"
    steps, rows = made(engine, replace(TASK, steps=3))
    assert len(steps) == 3 and rows == [2] * 3
