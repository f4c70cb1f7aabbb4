"""What a request will take on a card, without weights and without the card: the numbers of `unipic-run plan`."""

import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from ..kernels._tuned import left_to_torch
from . import families
from .budget import bound_of, overhead
from .checks import check_whole
from .choosing import AUTO, Blueprint, choose
from .device import as_dtype, dtype_name
from .errors import UnipicWarning, UsageError
from .forecast import Forecast
from .foreseen import ALL, Held
from .gpus import Card
from .gpus import card as card_called
from .layers.attention import Attention
from .loaded import Loaded
from .mover import parts_of
from .outline import KINDS, LIMIT, PROMPT, task_of
from .placing import is_streamed, no_room
from .plan import META, Plan, Stage, shapes, taken
from .prepare import check_shortcuts, defaults_of, settled
from .request import GPU_BATCH, TASKS, Largest
from .residency import DoesNotFit, Placement, Work, describe, fit
from .sampling import MAX_IMAGES, SHORTCUTS, Sampling, SamplingOptions, as_sampling
from .segments import STEP, GrowingSegments, rounded
from .task import Task
from .verbs import Verbs

PLANNED = ("none", "int8")  # bitsandbytes has no way to say what it would do
OURS = ("sdpa", "int8-qk")


class RoughTokens:
    """In place of a tokenizer, which only matters for how long a prompt is: about four letters a token."""

    def encode(self, text: str, by: str = "") -> list[int]:
        return [0] * -(-len(text) // 4)


@dataclass(frozen=True)
class Asked:
    """A checked request to a model that has no weights here, on a card of which `vram_bytes` may be used."""

    name: str
    forecast: Forecast
    task: Task | None  # None: a question
    res: int
    images: int
    card: Card
    vram_bytes: int

    @property
    def model(self) -> nn.Module:
        return self.forecast.loaded.model

    @property
    def sizes(self) -> set[int]:
        """Of batches that may be tried."""
        return {1, min(self.images, GPU_BATCH)}

    def settings(self) -> dict[str, Any]:
        loaded = self.forecast.loaded
        return {
            "model": self.name,
            "task": next((name for name, kind in KINDS.items() if self.task and kind == self.task.kind), "ask"),
            "res": self.res,
            "steps": self.task and self.task.steps,
            **({} if self.task is None else {name: getattr(self.task, name) for name in SHORTCUTS}),
            "images": self.images,
            **({"max_new_tokens": LIMIT} if self.task is None else {}),
            "quant": self.forecast.recipe.scheme,
            "dtype": dtype_name(loaded.dtype),
            "attention": loaded.family.attention_backend(loaded.model),
            "gpu": self.card.name,
            "vram_bytes": self.vram_bytes,
        }

    @property
    def seen(self) -> tuple[int, int]:
        """(width, height) of the picture that a question is about."""
        loaded = self.forecast.loaded
        return loaded.family.question_size(loaded.config, (self.res, self.res), self.res)

    def is_kept(self) -> bool:
        """Whether no dry run is needed."""
        if self.task is None:
            return self.forecast.answer_is_kept(self.seen, PROMPT, LIMIT)
        return all(self.forecast.is_kept(self.task, [PROMPT], size) for size in self.sizes)

    def plan(self, at_once: int) -> Plan:
        if self.task is None:
            return self.forecast.answer_plan(self.seen, PROMPT, LIMIT)
        return self.forecast.plan(self.task, [PROMPT], at_once)

    def placement(self) -> Placement:
        """The fastest that fits. Raises BudgetError."""
        parts, beside = parts_of(self.model, self.forecast.loaded.family.stacks), overhead(self.card)
        if self.task is None:
            work = Work(parts, {1: self.forecast.answers(self.seen, PROMPT, LIMIT)})
        else:
            work = self.forecast.work(parts, self.task, [PROMPT] * self.images, max(self.sizes), previews=False)
        try:
            return fit(work, beside.usable(self.vram_bytes))
        except DoesNotFit as error:
            raise no_room(error, beside) from None


def ask_for(
    model: str,
    task: str,
    *,
    res: int | None = None,
    steps: int | None = None,
    images: int = 1,
    quant: str = "none",
    dtype: str = "bf16",
    attention: str = "sdpa",
    gpu: str = "rtx4090",
    vram: float | str | None = None,
    shortcuts: SamplingOptions | None = None,
    say: Callable[[str], object] = str,
) -> Asked:
    """`task`: gen, edit or ask; `vram`: GiB, or auto, which leaves a margin; by default all of the card.

    `shortcuts` are those of `Sampling`, `speed` among them. `quant` auto is what the engine would take for this;
    `say` hears it. Raises UsageError.
    """
    row, config = families.architecture(model)
    if quant not in (*PLANNED, AUTO) or attention not in OURS:
        what = f"quant {quant} with attention {attention} cannot be planned"
        raise UsageError(what, f"plan with {', '.join(PLANNED)} or {AUTO}, and {' or '.join(OURS)}")
    if task not in TASKS:
        raise UsageError(f"no plan for {task!r:.40}", "name gen, edit or ask")
    family = families.model(row.name)
    if task not in tasks_of(family):
        raise UsageError(f"{model} does not {task}", f"plan {' or '.join(tasks_of(family))}")
    check_whole("n", images, 1, MAX_IMAGES)
    size = None if res is None else (res, res)
    largest = Largest(task, size, 1 if task == "ask" else min(images, GPU_BATCH), steps)  # refuses what gen would
    try:
        card = card_called(gpu)
    except ValueError as error:
        raise UsageError(str(error), "choose one of these") from None
    precision, may = as_dtype(dtype, META), bound_of(card, vram)
    made = task_of(largest, family, config, precision)
    if shortcuts:
        asked = as_sampling(0, {"steps": steps, **shortcuts})
        made = shortened(made, family, config, asked)
    refuse_too_large(family, config, made, res or config.resolution)
    if quant == AUTO:
        plan = Blueprint(row.name, family, config, RoughTokens(), precision, Attention(attention), largest)
        quant, why = choose(plan, card, overhead(card), may, moving=vram is not None)
        say(f"quant auto: {quant}, {why}")
        if quant not in PLANNED:
            what = f"{quant} is what the engine would take there, and it cannot be planned"
            raise UsageError(what, "add --quant int8")
    built = weightless(row.name, config, quant, precision, attention)
    forecast = Forecast(Loaded(family, built, RoughTokens(), META), families.recipe(row.name, quant), card)
    return Asked(model, forecast, made, res or config.resolution, images if made else 1, card, may)


def shortened(task: Task | None, family: Verbs, config: Any, sampling: Sampling) -> Task:
    """Raises UsageError for shortcuts that mean nothing here."""
    if task is None:
        raise UsageError("a question is not sampled", "plan gen or edit with shortcuts")
    task = replace(task, **settled(sampling, defaults_of(family, config)))
    check_shortcuts(task, family)
    return task


def refuse_too_large(family: Verbs, config: Any, task: Task | None, res: int) -> None:
    """Raise UsageError for what the model has no positions for, as the engine would."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnipicWarning)  # which are about what is made
        if task is None:
            family.check_question(config, RoughTokens(), family.question_size(config, (res, res), res), PROMPT, LIMIT)
        else:
            family.check_prompts(config, RoughTokens(), task, [PROMPT])


def tasks_of(family: Verbs) -> list[str]:
    """What can be planned of what a family does."""
    return [task for task in TASKS if KINDS.get(task, task) in family.kinds]


@lru_cache(maxsize=4)  # `doctor` asks about a few models again and again
def weightless(name: str, config: Any, quant: str, dtype: torch.dtype, attention: str) -> nn.Module:
    return shapes(families.model(name), config, families.recipe(name, quant), dtype, Attention(attention))


def estimate(model: str, task: str, **how: Any) -> dict[str, Any]:
    """By stage, and how the weights would lie; arguments as in `ask_for`.

    Raises UsageError; BudgetError where no placement fits.
    """
    return told(ask_for(model, task, **how))


def told(asked: Asked) -> dict[str, Any]:
    """What `plan --json` says. Raises BudgetError."""
    placement = asked.placement()
    plan, beside = asked.plan(placement.at_once), overhead(asked.card)
    room = asked.vram_bytes - beside.context
    graphs = graphs_of(asked.forecast.loaded.family, plan, placement)
    reserved = reserved_by_stage(asked.model, plan, placement)
    reserved = {name: nbytes + beside.workspace for name, nbytes in reserved.items()}
    fit_too = 0 < graphs.nbytes <= room - placement.peak - beside.workspace
    stages = {
        name: {
            "peak_bytes": peak,
            "activation_bytes": stage.peak_bytes,
            "reserved_bytes": min(reserved[name], room),
            **{which: getattr(stage, which) for which in ("flop", "nbytes", "launches")},
            "seconds": seconds,
        }
        for name, peak, stage, seconds in stages_of(plan, placement, asked.card)
    }
    computing = -(-asked.images // placement.at_once) * sum(stage["seconds"] for stage in stages.values())
    return {
        **asked.settings(),
        "stages": stages,
        "graphs": asdict(graphs) | {"fit": fit_too},
        "workspace_bytes": beside.workspace,
        "left_to_torch": left_to_torch(asked.card.capability),  # and counted as ours all the same
        "placement": {
            "where": dict(placement.where),
            "bands": list(placement.banded),
            "peak_bytes": placement.peak,
            "reserved_bytes": min(max(reserved.values()) + graphs.nbytes * fit_too, room),
            "seconds": placement.seconds,
            "waiting_seconds": max(0.0, placement.seconds - computing),
            "line": describe(placement),
        },
    }


def stages_of(plan: Plan, placement: Placement, card: Card) -> Iterator[tuple[str, int, Stage, float]]:
    """(name, peak bytes with the weights that are there, what computing takes, seconds) of each stage of a batch."""
    seconds = plan.seconds(card)
    for name, peak in placement.peaks.items():
        how = taken(placement, name)
        yield name, peak, plan.stages[how], seconds[how]


def graphs_of(family: Verbs, plan: Plan, placement: Placement) -> Held:
    """What CUDA graphs would hold: of rounds and tokens nothing where their layers are streamed."""
    return plan.graphs.get("head" if is_streamed(family, placement) else ALL, Held(0, 0))


def reserved_by_stage(model: nn.Module, plan: Plan, placement: Placement) -> dict[str, int]:
    """An estimate of what torch's allocator reserves, without graphs: segments of weights and those of activations."""
    resident, parts = GrowingSegments(), dict(model.named_children())
    for name, part in parts.items():
        if placement.where[name] == "resident":
            for x in (*part.parameters(), *part.buffers()):
                resident.take(x.nbytes)
    guests = {part.name: part for part in parts_of(model, placement.where)}
    room = {
        name: rounded(guests[name].nbytes if where == "staged" else guests[name].streamed_bytes, STEP)
        for name, where in placement.where.items()
    }
    found = {}
    for (name, here), (then, coming) in pairwise([*placement.stages.items(), ("", ())]):
        there = {*here, *(coming if then in placement.early else ())}
        how = taken(placement, name)
        found[name] = resident.reserved + sum(room[part] for part in there) + plan.stages[how].reserved_bytes
    return found
