"""What a request will take on a card, without weights and without the card: the numbers of `unipic-run plan`."""

from typing import Any

import torch

from . import families
from .device import as_dtype
from .errors import UsageError
from .forecast import Forecast
from .gpus import card as card_called
from .layers.attention import Attention
from .loaded import Loaded
from .making import GPU_BATCH
from .mover import parts_of
from .placing import as_vram, no_room, usable
from .plan import META, shapes
from .request import PATCH, GenerateRequest, as_sampling
from .residency import DoesNotFit, Placement, Stage, Work, describe, fit
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


def estimate(
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
) -> dict[str, Any]:
    """By stage, and how the weights would lie within `vram` GiB, or all of the card. `task`: gen, edit or ask.

    Raises UsageError; BudgetError where no placement fits.
    """
    row, config = families.architecture(model)
    if quant not in PLANNED or attention not in OURS:
        what = f"quant {quant} with attention {attention} cannot be planned"
        raise UsageError(what, f"plan with {' or '.join(PLANNED)}, and {' or '.join(OURS)}")
    res, steps = config.resolution if res is None else res, config.rounds if steps is None else steps
    GenerateRequest((PROMPT,), (res, res), as_sampling(0, {"n": images, "steps": steps}))  # refuses what gen would
    try:
        card = card_called(gpu)
        recipe = families.recipe(row.name, quant)
    except ValueError as error:
        raise UsageError(str(error), "choose one of these") from None
    family, precision = families.model(row.name), as_dtype(dtype, META)
    built = shapes(family, config, recipe, precision, Attention(attention))
    forecast = Forecast(Loaded(family, built, RoughTokens(), META), recipe, card)
    if task not in (*KINDS, "ask"):
        raise UsageError(f"no plan for {task!r:.40}", "name gen, edit or ask")
    side, parts = res // PATCH, parts_of(built, family.stacks)
    if task == "ask":
        batches = {1: forecast.answers(side, PROMPT, LIMIT)}
    else:
        pixels = torch.empty(1, 3, res, res, dtype=precision, device=META) if task == "edit" else None
        made = Task(KINDS[task], side, side, steps, config.guidance, "constant", 1.0, pixels=pixels)
        sizes = {1, min(images, GPU_BATCH)}
        batches = {size: forecast.pictures(made, [PROMPT], size, previews=False) for size in sizes}
    may = card.vram_bytes if vram is None else as_vram(vram)
    try:
        placement = fit(Work(parts, batches, images), usable(min(may, card.vram_bytes)))
    except DoesNotFit as error:
        raise no_room(error) from None
    how = {"model": model, "task": task, "res": res, "steps": steps, "images": images, "quant": quant, "dtype": dtype}
    how |= {"attention": attention, "gpu": card.name, "vram_bytes": may}
    at_once = placement.at_once
    costs = forecast.answer_costs(side, PROMPT, LIMIT) if task == "ask" else forecast.costs(made, [PROMPT], at_once)
    return how | {"stages": by_stage(batches[at_once], costs, placement), "placement": described(placement)}


def by_stage(
    batch: tuple[Stage, ...], costs: dict[str, dict[str, Any]], placement: Placement
) -> dict[str, dict[str, Any]]:
    """Of each stage of one batch: peak bytes, with the weights that are there, and what computing takes."""
    found = {}
    for stage in batch:
        told = costs[stage.name]
        told = told | told["bands"] if stage.name in placement.banded else told
        found[stage.name] = {
            "peak_bytes": placement.peaks[stage.name],
            "activation_bytes": told["activation"],
            **{name: told[name] for name in ("flop", "nbytes", "launches", "seconds")},
        }
    return found


def described(placement: Placement) -> dict[str, Any]:
    return {
        "where": dict(placement.where),
        "bands": list(placement.banded),
        "peak_bytes": placement.peak,
        "seconds": placement.seconds,
        "line": describe(placement),
    }
