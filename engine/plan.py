"""What a request needs, before anything loads: the real pipeline on the meta device, counted by a meter.

    model = shapes(family, config, recipe, torch.bfloat16, Attention())
    plan = dry_run(Loaded(family, model, tokens, META), task, batch)
    plan.stages["sample"].launches, plan.seconds(gpus.card("rtx4090"))

Counts are those of the Triton path whatever this machine has. Every round is run, but of layers and denoising steps
only one of each shape.
"""

from collections import Counter, deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from ..quant.recipe import Recipe
from . import weights
from .foreseen import ForeseenGraphs, Held
from .gpus import Card
from .layers.attention import Attention
from .loaded import Loaded, Placed
from .meter import Call, Meter
from .outcome import CancelToken, Event
from .repeats import once
from .residency import Placement
from .run import Watch, run_batch, to_levels
from .task import Batch, Task
from .verbs import Verbs

META = torch.device("meta")
BANDED = "decode in bands"  # a stage in place of `decode`
APART = "sample in two passes"  # in place of `sample`


@dataclass(frozen=True)
class Stage:
    """Totals of one stage; `peak_bytes` is what lives beside the weights.

    `reserved_bytes`: an estimate of what torch's allocator has reserved for that by the end of the stage.
    """

    peak_bytes: int
    reserved_bytes: int
    flop: int
    nbytes: int
    launches: int


@dataclass(frozen=True)
class Plan:
    """`calls`: every operation and how often, of `sample` or `sample/llm`.

    `graphs`: what CUDA graphs would hold, by what is captured; `history`: the operations in order, each with the peak
    meanwhile. Of pictures, `between_rounds` and `before_decode` are bytes that live then beside the weights.
    """

    stages: dict[str, Stage]
    calls: Counter[Call]
    between_rounds: int = 0
    before_decode: int = 0
    graphs: dict[str, Held] = field(default_factory=dict)
    history: Sequence[tuple[Counter[Call], int]] = ()

    def seconds(self, card: Card) -> dict[str, float]:
        """The roofline of each stage: the sum over its operations of arithmetic or memory, and of their launches."""
        found = dict.fromkeys(self.stages, 0.0)
        for stage, _, seconds in self._timed(card):
            found[stage] += seconds
        return found

    def shares(self, card: Card) -> dict[str, dict[str, float]]:
        """Of each stage, the seconds in each stack."""
        found: dict[str, dict[str, float]] = {stage: {} for stage in self.stages}
        for stage, stack, seconds in self._timed(card):
            if stack:
                found[stage][stack] = found[stage].get(stack, 0.0) + seconds
        return found

    def _timed(self, card: Card) -> Iterator[tuple[str, str, float]]:
        """(stage, stack or nothing, seconds) of each kind of call."""
        for call, times in self.calls.items():
            stage, _, stack = call.stage.partition("/")
            yield stage, stack, times * seconds_of(call, card)


def seconds_of(call: Call, card: Card) -> float:
    flop = (call.flop + call.beside) * card.in_whole_turns(call.programs)
    return card.seconds(call.kind, call.precision, flop, call.nbytes, call.launches)


def shapes(family: Verbs, config: Any, recipe: Recipe, dtype: torch.dtype, attend: Attention) -> nn.Module:
    """The model without its values. Raises UsageError for a recipe whose sizes do not fit."""
    return weights.prepared(partial(family.build, config, attend), recipe).to(dtype)


def dry_run(loaded: Loaded, task: Task, batch: Batch, others: bool = False) -> Plan:
    """The plan of one batch of pictures. `loaded.model` and the task's sources are on the meta device.

    With `others` it also has BANDED, as if that had come in place of `decode`, and of one picture of a family that can
    do it APART.
    """
    meter, model, lived = Meter(), loaded.model, []
    clock, graphs = StageClock(meter), ForeseenGraphs(meter)

    def note(event: Event) -> None:
        lived.append(meter.current)

    def enter(stage: str) -> None:
        if others and stage == "decode":
            with meter.aside(BANDED):
                shape = loaded.family.latents(model.config, len(batch.noises), task.rows, task.columns)
                latents = torch.empty(shape, **like)
                to_levels(loaded.family.decode(model, latents, task.rows, task.columns, bands=True))

    like = {"dtype": loaded.dtype, "device": META}
    watch, loaded = Watch(note, CancelToken(), preview_every=0), replace(loaded, placed=Placed(enter))
    counted = once(meter, model, loaded.family.repeated), by_stack(meter, model, loaded.family.stacks)
    with torch.inference_mode(), in_place_of_graphs(model, graphs), counted[0], counted[1], meter:
        conditions = run_batch(loaded, task, batch, None, clock, watch).conditions
        if others and can_be_apart(loaded.family, task, len(batch.noises)):
            with meter.aside(APART), in_place_of_graphs(model, ForeseenGraphs(meter)):
                how = task, replace(batch, apart=True)
                deque(loaded.family.sample(model, conditions, *how, loaded.family.schedule(model.config, *how)), 0)
    live = {"between_rounds": max(lived), "before_decode": clock.entered["decode"]}
    return Plan(stages_of(meter), meter.calls, **live, graphs=graphs.held(), history=meter.history)


def can_be_apart(family: Verbs, task: Task, images: int) -> bool:
    """Whether a batch may be computed with guidance in two passes; of several pictures, fewer at once save as much."""
    return family.parts_guidance and task.guidance != 1.0 and images == 1


def taken(placement: Placement, stage: str) -> str:
    """The stage of a plan that stands for this one in a placement."""
    if stage in placement.banded:
        return BANDED
    return APART if placement.apart and stage == "sample" else stage


def dry_answer(loaded: Loaded, size: tuple[int, int], question: str, limit: int) -> Plan:
    """The plan of a question about a picture of that size (width, height), answered by `limit` tokens."""
    meter, model, family = Meter(), loaded.model, loaded.family
    graphs = ForeseenGraphs(meter)
    ids = family.question_ids(loaded.tokens, question)
    counted = once(meter, model, family.repeated), by_stack(meter, model, family.stacks)
    with torch.inference_mode(), in_place_of_graphs(model, graphs), counted[0], counted[1], meter:
        meter.stage = "look"
        seen = family.look_to_answer(model, torch.empty(1, 3, *reversed(size), dtype=loaded.dtype, device=META))
        meter.stage = "condition"
        cache = family.read_image(model, loaded.tokens, seen, spare=len(ids) + limit)
        del seen
        meter.stage = "answer"
        family.next_logits(model, cache, ids)
        _, token = meter.span(lambda: family.next_logits(model, cache, ids[:1]))
        for _ in range(limit - 2):
            meter.repeat(token)
    return Plan(stages_of(meter), meter.calls, graphs=graphs.held(), history=meter.history)


def stages_of(meter: Meter) -> dict[str, Stage]:
    """Of each stage with its stacks."""
    found = {}
    for stage in dict.fromkeys(name.partition("/")[0] for name in meter.peaks if name):
        names = [name for name in meter.peaks if name.partition("/")[0] == stage]
        totals = [meter.total(stage=name) for name in names]
        sums = (sum(getattr(one, which) for one in totals) for which in ("flop", "nbytes", "launches"))
        memory = (max(table[name] for name in names) for table in (meter.peaks, meter.reserved))
        found[stage] = Stage(*memory, *sums)
    return found


class StageClock:
    """In place of the pipeline's clock: tells the meter which stage it is in, and notes what lives as it begins."""

    def __init__(self, meter: Meter) -> None:
        self.meter, self.device = meter, META
        self.entered: dict[str, int] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        self.meter.stage, self.entered[name] = name, self.meter.current
        yield


@contextmanager
def in_place_of_graphs(model: nn.Module, graphs: ForeseenGraphs) -> Iterator[None]:
    before, model.graphs = model.graphs, graphs
    try:
        yield
    finally:
        model.graphs = before


@contextmanager
def by_stack(meter: Meter, model: nn.Module, stacks: Sequence[str]) -> Iterator[None]:
    """Inside, what a stack's forward pass does counts under `stage/stack`."""

    def begin(name: str, *_: Any) -> None:
        meter.stage = f"{meter.stage}/{name}"

    def end(*_: Any) -> None:
        meter.stage = meter.stage.partition("/")[0]

    hooks = []
    for name in stacks:
        part = model.get_submodule(name)
        hooks += [part.register_forward_pre_hook(partial(begin, name)), part.register_forward_hook(end)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
