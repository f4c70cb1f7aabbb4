"""What a request will take on a card, without weights and without the card: the numbers of `unipic-run plan`."""

from typing import Any

import torch

from . import families
from .device import as_dtype
from .errors import BudgetError, UsageError
from .forecast import Forecast
from .gpus import Card
from .gpus import card as card_called
from .layers.attention import Attention
from .loaded import Loaded
from .mover import parts_of
from .placing import CONTEXT, SLACK, as_vram
from .plan import META, shapes
from .request import PATCH
from .residency import GIB, DoesNotFit, Placement, Stage, Work, describe, fit
from .task import Task

KINDS = {"gen": "generate", "edit": "edit"}
PROMPT = "a photograph of a red fox in deep snow at night, seen from the side, with northern lights above the trees"
LIMIT = 64  # tokens of an answer


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
    try:
        card = card_called(gpu)
        recipe = families.recipe(row.name, quant)
    except ValueError as error:
        raise UsageError(str(error), "choose one of these") from None
    family, precision = families.model(row.name), as_dtype(dtype, META)
    built = shapes(family, config, recipe, precision, Attention(attention))
    forecast = Forecast(Loaded(family, built, RoughTokens(), META), recipe, card)
    res, steps = res or config.resolution, steps or config.rounds
    if res % PATCH or task not in (*KINDS, "ask"):
        raise UsageError(f"no plan for {task} at {res}", f"name gen, edit or ask, and a multiple of {PATCH}")
    side, parts = res // PATCH, parts_of(built, family.stacks)
    if task == "ask":
        costs, batch = forecast.answer_costs(side, PROMPT, LIMIT), forecast.answers(side, PROMPT, LIMIT)
    else:
        pixels = torch.empty(1, 3, res, res, dtype=precision, device=META) if task == "edit" else None
        made = Task(KINDS[task], side, side, steps, config.guidance, "constant", 1.0, pixels=pixels)
        costs, batch = forecast.costs(made, [PROMPT], images), forecast.pictures(made, [PROMPT], images, previews=False)
    may = card.vram_bytes if vram is None else as_vram(vram)
    placement = placed(Work(parts, {images: batch}, images), int((may - CONTEXT) * SLACK))
    how = {"model": model, "task": task, "res": res, "steps": steps, "images": images, "quant": quant, "dtype": dtype}
    how |= {"attention": attention, "gpu": card.name, "vram_bytes": may}
    return how | {"stages": by_stage(batch, costs, placement, card), "placement": described(placement)}


def placed(work: Work, budget: int) -> Placement:
    try:
        return fit(work, budget)
    except DoesNotFit as error:
        least = (error.smallest.peak / SLACK + CONTEXT) / GIB
        raise BudgetError(
            f"{least:.2f} GiB of GPU memory are the least this takes", f"plan with --vram {least:.2f} or more"
        ) from None


def by_stage(
    batch: tuple[Stage, ...], costs: dict[str, dict[str, Any]], placement: Placement, card: Card
) -> dict[str, dict[str, Any]]:
    """Of each stage: peak bytes, with the weights that are there, and what computing takes."""
    found = {}
    for stage in batch:
        told = costs[stage.name]
        activation = told["bands"]["activation"] if stage.name in placement.banded else told["activation"]
        found[stage.name] = {
            "peak_bytes": placement.peaks[stage.name],
            "activation_bytes": activation,
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
