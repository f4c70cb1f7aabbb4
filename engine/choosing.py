"""`quant="auto"`: the first of no quantisation, int8 and nf4 in which one picture of the trained size fits the card.

It fits where no stack of layers has to go through the card layer by layer. Under a budget parts may still wait on the
host for the stage that needs them, and the picture may be decoded in bands; without one, all has to be there at once.
What is chosen stays for as long as the model is loaded, and of its placements each request takes the fastest.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..quant.bnb import MissingPackageError, package
from . import families
from .budget import Overhead, context_on, free_on, overhead
from .device import dtype_name
from .estimate import PROMPT
from .forecast import Forecast
from .gpus import Card
from .layers.attention import Attention
from .loaded import Loaded
from .mover import parts_of
from .placing import card_of, planned, unpacked
from .plan import META, shapes
from .request import PATCH
from .residency import GIB, Work, least
from .task import Task
from .tokens import Tokens
from .verbs import Verbs

AUTO = "auto"
ORDER = ("none", "int8", "nf4")  # the more bits, the closer to the released model


@dataclass(frozen=True)
class Blueprint:
    """All of a model but its weights; `name` is its family's."""

    name: str
    family: Verbs
    config: Any
    tokens: Tokens
    dtype: torch.dtype
    attend: Attention


def scheme_for(
    plan: Blueprint, device: torch.device, bound: int | None, stored: str, say: Callable[[str], object]
) -> str:
    """What `auto` stands for on a device of which `bound` bytes may be used; `say` hears it and why."""
    if stored != "none":
        scheme, why = stored, "as the checkpoint is stored"
    elif device.type != "cuda":
        scheme, why = "none", f"on the {device.type}"
    else:
        card, may = card_of(device), bound
        if may is None:
            may = min(torch.cuda.get_device_properties(device).total_memory, free_on(device) + context_on(device))
        scheme, why = choose(plan, card, overhead(card, device), may, moving=bound is not None)
    say(f"quant auto: {scheme}, {why}")
    return scheme


def choose(plan: Blueprint, card: Card, beside: Overhead, may: int, moving: bool) -> tuple[str, str]:
    """(scheme, why) for a card of which so many bytes may be used; `moving`: weights may wait on the host."""
    side, takes = plan.config.resolution, []
    for scheme in ORDER:
        if scheme == "nf4" and not has_bitsandbytes():
            continue
        whole = least_whole(plan, scheme, card, moving)
        takes.append(f"{beside.needed(whole):.2f} in {dtype_name(plan.dtype) if scheme == 'none' else scheme}")
        told = f"{side}x{side} takes {', '.join(takes)} of the {may / GIB:.2f} GiB that may be used"
        if whole <= beside.usable(may):
            return scheme, told
    then = "layers come when they are needed" if moving else "vram auto lets weights wait on the host"
    return "int8", f"{told}: {then}"


def least_whole(plan: Blueprint, scheme: str, card: Card, moving: bool) -> int:
    """Bytes of weights and activations that one picture takes at least where layers do not come one by one."""
    recipe, config = families.recipe(plan.name, scheme), plan.config
    model = shapes(plan.family, config, recipe, plan.dtype, plan.attend)
    forecast = Forecast(Loaded(plan.family, model, plan.tokens, META), planned(recipe), card)
    side = config.resolution // PATCH
    task = Task("generate", side, side, config.rounds, config.guidance, "constant", 1.0)
    parts, stages = parts_of(model, streamed=()), forecast.pictures(task, [PROMPT], 1, previews=False)
    if not moving:
        parts = tuple(replace(part, fixed=True) for part in parts)
        stages = tuple(replace(stage, bands=None) for stage in stages)
    return least(Work(parts, {1: stages})) + unpacked(model)


def has_bitsandbytes() -> bool:
    try:
        package()
    except MissingPackageError:
        return False
    return True
