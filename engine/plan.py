"""What a request needs, before anything loads: the real pipeline on the meta device, counted by a meter.

    model = shapes(family, config, recipe, torch.bfloat16, Attention())
    plan = dry_run(Loaded(family, model, tokens, META), task, batch)
    plan.stages["sample"].launches, plan.seconds(gpus.card("rtx4090"))

Counts are those of the Triton path whatever this machine has. A picture at 1024x1024 in 32 rounds takes some seconds
of one CPU core: every round is run, but of its denoising steps only one chunk of each shape.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..quant.recipe import Recipe
from . import weights
from .gpus import Card
from .layers.attention import Attention
from .loaded import Loaded
from .meter import Call, Meter
from .request import PATCH, CancelToken
from .run import Watch, run_batch
from .task import Batch, Task
from .verbs import Verbs

META = torch.device("meta")


@dataclass(frozen=True)
class Stage:
    """Totals of one stage; `peak_bytes` is what lives beside the weights."""

    peak_bytes: int
    flop: int
    nbytes: int
    launches: int


@dataclass(frozen=True)
class Plan:
    """`parts`: bytes of each part's weights. `calls`: every operation and how often, of `sample` or `sample/llm`."""

    stages: dict[str, Stage]
    parts: dict[str, int]
    calls: Counter[Call]

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
            one = card.seconds(call.kind, call.precision, call.flop, call.nbytes, call.launches)
            yield stage, stack, times * one


def shapes(family: Verbs, config: Any, recipe: Recipe, dtype: torch.dtype, attend: Attention) -> nn.Module:
    """The model without its values. Raises UsageError for a recipe whose sizes do not fit."""
    return weights.prepared(partial(family.build, config, attend), recipe).to(dtype)


def dry_run(loaded: Loaded, task: Task, batch: Batch) -> Plan:
    """The plan of one batch of pictures. `loaded.model` and the task's pixels are on the meta device."""
    meter, model = Meter(), loaded.model
    watch = Watch(lambda event: None, CancelToken(), preview_every=0)
    part, method = loaded.family.repeated
    counted = once(meter, getattr(model, part), method), by_stack(meter, model, loaded.family.stacks)
    with torch.inference_mode(), counted[0], counted[1], meter:
        run_batch(loaded, task, batch, None, StageClock(meter), watch)
    stages = {name: total(meter, name) for name in meter.peaks if name and "/" not in name}
    return Plan(stages, {name: nbytes(child) for name, child in model.named_children()}, meter.calls)


def dry_answer(loaded: Loaded, side: int, question: str, limit: int) -> Plan:
    """The plan of a question about a picture of side x side tokens, answered by `limit` tokens."""
    meter, model, family = Meter(), loaded.model, loaded.family
    ids = family.question_ids(loaded.tokens, question)
    with torch.inference_mode(), meter:
        meter.stage = "condition"
        pixels = torch.empty(1, 3, side * PATCH, side * PATCH, dtype=loaded.dtype, device=META)
        cache = family.look_to_answer(model, loaded.tokens, pixels, side, side, spare=len(ids) + limit)
        meter.stage = "answer"
        family.next_logits(model, cache, ids)
        before = meter.calls.copy()
        family.next_logits(model, cache, ids[:1])
    for call, times in (meter.calls - before).items():
        meter.calls[call] += times * (limit - 2)
    stages = {name: total(meter, name) for name in ("condition", "answer")}
    return Plan(stages, {name: nbytes(child) for name, child in model.named_children()}, meter.calls)


def total(meter: Meter, stage: str) -> Stage:
    """Of a stage with its stacks."""
    names = [name for name in meter.peaks if name.partition("/")[0] == stage]
    found = [meter.total(stage=name) for name in names]
    sums = (sum(getattr(one, field) for one in found) for field in ("flop", "nbytes", "launches"))
    return Stage(max(meter.peaks[name] for name in names), *sums)


def nbytes(module: nn.Module) -> int:
    """Of all parameters and buffers."""
    return sum(x.numel() * x.element_size() for x in (*module.parameters(), *module.buffers()))


class StageClock:
    """In place of the pipeline's clock: tells the meter which stage it is in."""

    def __init__(self, meter: Meter) -> None:
        self.meter, self.device = meter, META

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        self.meter.stage = name
        yield


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


@contextmanager
def once(meter: Meter, owner: nn.Module, method: str) -> Iterator[None]:
    """Inside, calls of the method with equal shapes run once and are counted every time; it must return nothing."""
    known: dict[Any, Counter[Call]] = {}
    run: Callable[..., None] = getattr(owner, method)

    def counted(*arguments: Any) -> None:
        key = meter.stage, *map(outline, arguments)
        if key in known:
            meter.calls.update(known[key])
            return
        before = meter.calls.copy()
        run(*arguments)
        known[key] = meter.calls - before

    setattr(owner, method, counted)
    try:
        yield
    finally:
        delattr(owner, method)


def outline(x: Any) -> Any:
    """An argument without the values of its tensors."""
    if isinstance(x, Tensor):
        return x.shape, x.dtype
    if is_dataclass(x):
        return tuple(outline(getattr(x, field.name)) for field in fields(x))
    return tuple(map(outline, x)) if isinstance(x, tuple) else x
