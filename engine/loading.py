"""From a model's name and a few words to a filled model: what `Engine.from_pretrained` does."""

import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch

from . import budget, families, hub, limits, weights
from .allocator import grow_segments
from .checkpoint.cache import folder_named
from .checkpoint.manifest import Progress
from .choosing import AUTO, Blueprint, scheme_for
from .device import as_device, as_dtype, current, out_of_memory
from .errors import UsageError
from .gpus import GIB
from .layers.attention import resolve
from .placing import card_of
from .prepare import check_kind
from .request import LargestOptions, as_largest
from .source import Source
from .tokens import Tokens

T = TypeVar("T")


def load(
    make: Callable[..., T],
    model: str | os.PathLike[str],
    *,
    device: str | torch.device,
    dtype: str | torch.dtype,
    quant: str | None,
    attention: str,
    vram: float | str | None,
    drop_idle: bool,
    largest: LargestOptions | None,
    exact_rope: bool,
    revision: str | None,
    offline: bool,
    on_progress: Progress | None,
    say: Callable[[str], None] | None,
) -> T:
    """make(family, model, tokens, name, recipe, device, budget, say, source, drop_idle, release): as an Engine's."""
    if drop_idle and vram is None:
        what = "drop_idle has no effect without vram: all weights stay where they are"
        raise UsageError(what, "add --vram auto (Engine keyword vram), or leave --drop-idle out")
    if not isinstance(model, str | os.PathLike):
        known = ", ".join(families.short_names())
        raise UsageError(f"model {model!r:.80} is no name", f"give a folder, a hub id (org/name) or {known}")
    ready_for = as_largest(largest)
    place = as_device(device)
    precision = as_dtype(dtype, place)
    scheme = AUTO if quant == AUTO else weights.as_scheme(quant)
    attend = resolve(attention, place, precision)
    bound = None if vram == budget.AUTO else budget.bound_on(place, vram)  # a wrong number is refused at once
    if vram is not None:
        budget.measure_context(place)
    if model in families.FAMILIES:  # what it cannot do is known before it is fetched
        check_kind(ready_for.task, families.model(model))
    folder = hub.resolve(model, revision=revision, offline=offline, on_progress=on_progress, say=say)
    if vram == budget.AUTO:  # what is free behind a pull, which may take long
        bound = budget.bound_on(place, vram)
    if bound is not None and vram == budget.AUTO and say:
        say(f"vram auto: {bound / GIB:.2f} GiB, what is free of the GPU less {budget.MARGIN / GIB:g}")
    row, config = families.read(folder)
    family = families.model(row.name)
    check_kind(ready_for.task, family)
    if exact_rope and config.round_inv_freq:
        config = replace(config, round_inv_freq=False)
    tokens = Tokens(folder / "tokenizer.json", family.IMAGE, config.image_token)
    if scheme == AUTO:
        plan = Blueprint(row.name, family, config, tokens, precision, attend, ready_for)
        scheme = scheme_for(plan, place, bound, weights.stored_scheme(folder), say or str)
    elif scheme is None:
        scheme = weights.stored_scheme(folder)
    recipe = families.recipe(row.name, scheme)
    build = partial(family.build, config, attend)
    first = place if bound is None else torch.device("cpu")  # from where they go to their places
    with limits.held_to(place, bound) as release:
        with out_of_memory("loading the model"), current(place):
            grow_segments(place, say or str)
            source = Source(build, folder, recipe, precision, (first, place), family.tuned, say or str)
            source.fill(ready_for.task == "ask", on_progress)
        usable = None if bound is None else budget.overhead(card_of(place), place).usable(bound)
        name = named(model, folder)
        return make(family, source.model, tokens, name, recipe, place, usable, say, source, drop_idle, release)


def named(model: str | os.PathLike[str], folder: Path) -> str:
    """What pictures say of their model: a folder is named without its path, since pictures are passed on."""
    if model in families.short_names() or not folder_named(model):
        return os.fspath(model)
    return folder.name
