"""What a request will take on a card, without weights and without the card: the numbers of `unipic-run plan`."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from ..kernels._tuned import left_to_torch
from . import families
from .device import as_dtype, dtype_name
from .errors import UsageError
from .forecast import Forecast
from .foreseen import ALL, Held
from .gpus import Card
from .gpus import card as card_called
from .layers.attention import Attention
from .loaded import Loaded
from .making import GPU_BATCH
from .mover import parts_of
from .placing import CONTEXT, as_vram, no_room, usable
from .plan import BANDED, META, Plan, Stage, shapes
from .request import PATCH, GenerateRequest, as_sampling
from .residency import DoesNotFit, Placement, Work, describe, fit
from .segments import STEP, Segments, rounded
from .task import Task

KINDS = {"gen": "generate", "edit": "edit"}
PROMPT = "a photograph of a red fox in deep snow at night, seen from the side, with northern lights above the trees"
LIMIT = 64  # tokens of an answer
PLANNED = ("none", "int8")  # bitsandbytes has no way to say what it would do
OURS = ("sdpa", "int8-qk")


class RoughTokens:
    """In place of a tokenizer, which only matters for how long a prompt is: about four letters a token."""

    def encode(self, text: str) -> list[int]:
        return [0] * -(-len(text) // 4)


@dataclass(frozen=True)
class Asked:
    """A checked request to a model that has no weights here, on a card of which `vram_bytes` may be used."""

    name: str
    forecast: Forecast
    task: Task | None  # None: a question
    side: int  # tokens
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
            "res": self.side * PATCH,
            "steps": self.task and self.task.steps,
            "images": self.images,
            "quant": self.forecast.recipe.scheme,
            "dtype": dtype_name(loaded.dtype),
            "attention": loaded.family.attention_backend(loaded.model),
            "gpu": self.card.name,
            "vram_bytes": self.vram_bytes,
        }

    def is_kept(self) -> bool:
        """Whether no dry run is needed."""
        if self.task is None:
            return self.forecast.answer_is_kept(self.side, PROMPT, LIMIT)
        return all(self.forecast.is_kept(self.task, [PROMPT], size) for size in self.sizes)

    def plan(self, at_once: int) -> Plan:
        if self.task is None:
            return self.forecast.answer_plan(self.side, PROMPT, LIMIT)
        return self.forecast.plan(self.task, [PROMPT], at_once)

    def placement(self) -> Placement:
        """The fastest that fits. Raises BudgetError."""
        if self.task is None:
            batches = {1: self.forecast.answers(self.side, PROMPT, LIMIT)}
        else:
            how = {"previews": False}
            batches = {size: self.forecast.pictures(self.task, [PROMPT], size, **how) for size in self.sizes}
        parts = parts_of(self.model, self.forecast.loaded.family.stacks)
        try:
            return fit(Work(parts, batches, self.images), usable(self.vram_bytes))
        except DoesNotFit as error:
            raise no_room(error) from None


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
) -> Asked:
    """`task`: gen, edit or ask; `vram`: GiB, by default all of the card. Raises UsageError."""
    row, config = families.architecture(model)
    if quant not in PLANNED or attention not in OURS:
        what = f"quant {quant} with attention {attention} cannot be planned"
        raise UsageError(what, f"plan with {' or '.join(PLANNED)}, and {' or '.join(OURS)}")
    if task not in (*KINDS, "ask"):
        raise UsageError(f"no plan for {task!r:.40}", "name gen, edit or ask")
    res, steps = config.resolution if res is None else res, config.rounds if steps is None else steps
    GenerateRequest((PROMPT,), (res, res), as_sampling(0, {"n": images, "steps": steps}))  # refuses what gen would
    try:
        card = card_called(gpu)
        recipe = families.recipe(row.name, quant)
    except ValueError as error:
        raise UsageError(str(error), "choose one of these") from None
    family, precision = families.model(row.name), as_dtype(dtype, META)
    built = weightless(row.name, config, quant, precision, attention)
    forecast = Forecast(Loaded(family, built, RoughTokens(), META), recipe, card)
    side, made = res // PATCH, None
    if task != "ask":
        pixels = torch.empty(1, 3, res, res, dtype=precision, device=META) if task == "edit" else None
        made = Task(KINDS[task], side, side, steps, config.guidance, "constant", 1.0, pixels=pixels)
    may = card.vram_bytes if vram is None else min(as_vram(vram), card.vram_bytes)
    return Asked(model, forecast, made, side, images if made else 1, card, may)


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
    plan, room = asked.plan(placement.at_once), asked.vram_bytes - CONTEXT
    graphs, reserved = graphs_of(plan, placement), reserved_by_stage(asked.model, plan, placement)
    fit_too = 0 < graphs.nbytes <= room - placement.peak
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
    return {
        **asked.settings(),
        "stages": stages,
        "graphs": asdict(graphs) | {"fit": fit_too},
        "left_to_torch": left_to_torch(asked.card.capability),  # and counted as ours all the same
        "placement": {
            "where": dict(placement.where),
            "bands": list(placement.banded),
            "peak_bytes": placement.peak,
            "reserved_bytes": min(max(reserved.values()) + graphs.nbytes * fit_too, room),
            "seconds": placement.seconds,
            "line": describe(placement),
        },
    }


def stages_of(plan: Plan, placement: Placement, card: Card) -> Iterator[tuple[str, int, Stage, float]]:
    """(name, peak bytes with the weights that are there, what computing takes, seconds) of each stage of a batch."""
    seconds = plan.seconds(card)
    for name, peak in placement.peaks.items():
        how = BANDED if name in placement.banded else name
        yield name, peak, plan.stages[how], seconds[how]


def graphs_of(plan: Plan, placement: Placement) -> Held:
    """What CUDA graphs would hold: of rounds nothing where layers are streamed, which have no address."""
    streamed = "streamed" in placement.where.values()
    return plan.graphs.get("head" if streamed else ALL, Held(0, 0))


def reserved_by_stage(model: nn.Module, plan: Plan, placement: Placement) -> dict[str, int]:
    """An estimate of what torch's allocator reserves, without graphs: segments of weights and those of activations."""
    resident, parts = Segments(), dict(model.named_children())
    for name, part in parts.items():
        if placement.where[name] == "resident":
            for x in (*part.parameters(), *part.buffers()):
                resident.take(x.numel() * x.element_size())
    guests = {part.name: part for part in parts_of(model, placement.where)}
    room = {
        name: rounded(guests[name].nbytes if where == "staged" else guests[name].streamed_bytes, STEP)
        for name, where in placement.where.items()
    }
    found = {}
    for (name, here), (then, coming) in pairwise([*placement.stages.items(), ("", ())]):
        there = {*here, *(coming if then in placement.early else ())}
        how = BANDED if name in placement.banded else name
        found[name] = resident.reserved + sum(room[part] for part in there) + plan.stages[how].reserved_bytes
    return found
