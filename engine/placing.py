"""An engine's memory under a budget: for every request the fastest placement of its weights that keeps to it.

    placing = Placing(loaded, recipe, budget)
    with placing.running():
        loaded, at_once = placing.pictures(task, prompts, at_once=4, previews=False)
        ...                              # out of memory:
        loaded, at_once = placing.less()

What a request needs is known beforehand: `forecast.py`.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace

import torch
from torch import nn

from ..quant.bnb import is_packed
from ..quant.recipe import NONE, Recipe
from .budget import Overhead, overhead
from .device import out_of_memory
from .errors import BudgetError, HostMemoryError
from .forecast import Forecast
from .gpus import CARDS, DEVICE_NAMES, Card
from .loaded import Loaded, Placed
from .mover import Mover, parts_of
from .residency import DoesNotFit, Placement, Work, describe, fit, smaller
from .task import Task
from .transfer import lanes
from .verbs import Verbs

UNKNOWN = "rtx4090"  # whose rates stand for those of a card that is not listed


def card_of(device: torch.device) -> Card:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return DEVICE_NAMES.get(name, CARDS[UNKNOWN])


def planned(recipe: Recipe) -> Recipe:
    """The recipe that stands for another in a dry run: layers of bitsandbytes do nothing there, so floating ones do."""
    return recipe if recipe.scheme in ("none", "int8") else NONE


def unpacked(model: nn.Module) -> int:
    """Bytes that layers of bitsandbytes take while they compute: of the largest weight, as floats; heuristic."""
    packed = [layer.in_features * layer.out_features for layer in model.modules() if is_packed(layer)]
    return max(packed, default=0) * next(model.parameters()).element_size()


class Placing:
    """The weights of one engine; `line` says how they lie."""

    def __init__(
        self,
        loaded: Loaded,
        recipe: Recipe,
        budget: int,
        say: Callable[[str], object],
        reread: Callable[[str], None] | None = None,
    ) -> None:
        """`budget`: bytes of weights and activations together. `say` hears `line` when it changes.

        `reread(part)` fills a part anew; with it, idle parts are dropped.
        """
        self.spare = unpacked(loaded.model)
        self.loaded, self.budget, self.say, self.line = loaded, budget - self.spare, say, ""
        self.forecast = Forecast(loaded, planned(recipe), card_of(loaded.device))
        self.mover = Mover(loaded.model, lanes(loaded.device), on_leave=self._left, reread=reread)
        self.parts = parts_of(loaded.model, loaded.family.stacks)
        self.work: Work | None = None
        self.placement: Placement | None = None

    def running(self) -> AbstractContextManager[None]:
        return self.mover.running()

    def pictures(self, task: Task, prompts: Sequence[str], at_once: int, previews: bool) -> tuple[Loaded, int]:
        """The model placed for a request, and how many of its images to make at once. Raises BudgetError."""
        return self._take(self.forecast.work(self.parts, task, prompts, min(at_once, len(prompts)), previews))

    def answers(self, size: tuple[int, int], question: str, limit: int) -> Loaded:
        """The model placed for a question about a picture of that size (width, height). Raises BudgetError."""
        return self._take(Work(self.parts, {1: self.forecast.answers(size, question, limit)}))[0]

    def forget(self, parts: Sequence[str]) -> None:
        """Parts that are about to be filled anew, in the memory of the host."""
        self.mover.forget(parts)
        self.placement = None
        self._forget_graphs()

    def less(self) -> tuple[Loaded, int]:
        """The same in less memory than that which was not enough. Raises BudgetError where there is no less."""
        self.mover.leave()
        self._forget_graphs()
        return self._take(self.work, self.placement)

    def _take(self, work: Work, failed: Placement | None = None) -> tuple[Loaded, int]:
        while True:
            try:
                found = fit(work, self.budget) if failed is None else smaller(work, failed)
            except DoesNotFit as error:
                beside = overhead(self.forecast.card, self.loaded.device)
                raise no_room(error, beside, failed, self.spare) from None
            try:
                with out_of_memory("moving weights"):
                    self._settle(found)
                break
            except HostMemoryError:  # of which the next placement would need more
                raise
            except BudgetError:
                failed = found
        self.work, self.placement, before = work, found, self.line
        self.line = describe(found)
        if self.line != before:
            self.say(f"weights: {self.line}")
        placed = Placed(self.mover.enter, bands="decode" in found.banded, apart=found.apart)
        return replace(self.loaded, placed=placed), found.at_once

    def _settle(self, found: Placement) -> None:
        now = self.placement
        if now is None or (now.where, now.stages, now.early) != (found.where, found.stages, found.early):
            self.placement = None  # until the model has another one
            self._forget_graphs()  # whose memory the weights may need
            self.mover.place(found)
            self.placement = found
            self._forget_graphs()

    def _left(self, part: str) -> None:
        """A part that comes back comes to other addresses."""
        placement = self.placement
        if placement is None or placement.where[part] != "staged":
            return
        if part in replayed(self.loaded.family, placement)[1]:
            self._forget_graphs()

    def _forget_graphs(self) -> None:
        graphs = self.loaded.model.graphs
        graphs.clear(graphs.off)
        if self.placement is not None and is_streamed(self.loaded.family, self.placement):
            graphs.failed[replayed(self.loaded.family, self.placement)[0]] = "layers are streamed"


def replayed(family: Verbs, placement: Placement) -> tuple[str, Sequence[str]]:
    """What is captured whole of a request that is placed so, and the parts that it runs."""
    if "answer" in placement.stages:
        return "token", family.needs("ask")["answer"]
    return "round", family.needs("generate")["sample"]


def is_streamed(family: Verbs, placement: Placement) -> bool:
    """Whether some of that has no address that a graph could know."""
    return any(placement.where[part] == "streamed" for part in replayed(family, placement)[1])


def no_room(error: DoesNotFit, beside: Overhead, failed: Placement | None = None, spare: int = 0) -> BudgetError:
    """What a user is told; `failed`: the smallest placement, where even that ran out of memory.

    `spare`: bytes that are needed beside what a placement counts.
    """
    least = beside.needed(error.smallest.peak + spare)
    if failed is not None:
        what = f"out of memory in the smallest way there is, which was predicted to take {least:.2f} GiB of the GPU"
        return BudgetError(what, "free memory of the GPU, or ask for less at once: fewer or smaller pictures")
    what = f"{least:.2f} GiB of GPU memory are the least this takes"
    return BudgetError(
        what, f"give --vram {least:.2f} or more if the card has it, or ask for fewer or smaller pictures"
    )
