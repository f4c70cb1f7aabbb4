"""`quant="auto"`: the first of no quantisation, int8 and nf4 in which the largest request that is declared fits a card.

By default that is one picture of the trained size. As many pictures as are declared are computed together. A request
fits where no stack of layers has to go through the card layer by layer. Under a budget parts may still wait on the
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
from .forecast import Forecast
from .gpus import GIB, Card
from .layers.attention import Attention
from .loaded import Loaded
from .mover import parts_of
from .outline import PROMPT, size_of, task_of
from .placing import card_of, planned, unpacked
from .plan import META, shapes
from .request import AskRequest, Largest
from .residency import Work, least
from .tokens import Tokens
from .verbs import Verbs

AUTO = "auto"
ORDER = ("none", "int8", "nf4")  # the more bits, the closer to the released model


@dataclass(frozen=True)
class Blueprint:
    """All of a model but its weights, and the largest request it is to be ready for; `name` is its family's."""

    name: str
    family: Verbs
    config: Any
    tokens: Tokens
    dtype: torch.dtype
    attend: Attention
    largest: Largest


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
    what, takes = told(plan.largest, plan.config), []
    for scheme in ORDER:
        if scheme == "nf4" and not has_bitsandbytes():
            continue
        whole = least_whole(plan, scheme, card, moving)
        takes.append(f"{beside.needed(whole):.2f} in {dtype_name(plan.dtype) if scheme == 'none' else scheme}")
        why = f"{what} {', '.join(takes)} of the {may / GIB:.2f} GiB that may be used"
        if whole <= beside.usable(may):
            return scheme, why
    then = "layers come when they are needed" if moving else "vram auto lets weights wait on the host"
    return "int8", f"{why}: {then}"


def told(largest: Largest, config: Any) -> str:
    """Such as `4 pictures of 1024x1024 take`."""
    size = "x".join(map(str, size_of(largest, config)))
    if largest.task == "gen":
        return f"{largest.n} pictures of {size} take" if largest.n > 1 else f"{size} takes"
    words = {"edit": "an edit of", "ask": "a question about"}[largest.task]
    return f"{largest.n} edits of {size} take" if largest.n > 1 else f"{words} {size} takes"


def least_whole(plan: Blueprint, scheme: str, card: Card, moving: bool) -> int:
    """Bytes of weights and activations that `largest` takes at least where layers do not come one by one."""
    recipe, config, largest = families.recipe(plan.name, scheme), plan.config, plan.largest
    model = shapes(plan.family, config, recipe, plan.dtype, plan.attend)
    forecast = Forecast(Loaded(plan.family, model, plan.tokens, META), planned(recipe), card)
    task, parts = task_of(largest, plan.family, config, plan.dtype), parts_of(model, streamed=())
    if task is None:
        size = size_of(largest, config)
        seen = plan.family.question_size(config, size, max(size))
        stages = forecast.answers(seen, PROMPT, AskRequest.max_new_tokens)
    else:
        stages = forecast.pictures(task, [PROMPT], largest.n, largest.previews)
    if not moving:
        parts = tuple(replace(part, fixed=True) for part in parts)
        stages = tuple(replace(stage, bands=None) for stage in stages)
    return least(Work(parts, {largest.n: stages})) + unpacked(model)


def has_bitsandbytes() -> bool:
    try:
        package()
    except MissingPackageError:
        return False
    return True
