"""The files behind a loaded model, from which parts of it are read again.

A language model that was tuned to condition pictures is not the one that answers. Where a folder also holds the tuned
parts as they were before, the model has the one set of weights or the other, by what is asked of it.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import nn

from ..quant.recipe import Recipe
from . import weights
from .checkpoint.manifest import Progress
from .checkpoint.shards import UNTUNED

UNVERIFIED = "answers are unverified: the language model inside was tuned to condition pictures, not to answer"


class Source:
    """`model`, as `build` makes it, and the `folder` that it is filled from."""

    def __init__(
        self,
        build: Callable[[], nn.Module],
        folder: Path,
        recipe: Recipe,
        dtype: torch.dtype,
        devices: tuple[torch.device, torch.device],
        tuned: Sequence[str],
        say: Callable[[str], object],
    ) -> None:
        """`devices`: where weights go, and where those go that are in a format of bitsandbytes.

        `tuned`: the parts that the folder may hold as they were before. `say` hears that they are exchanged.
        """
        self.build, self.folder, self.recipe, self.dtype, self.devices = build, folder, recipe, dtype, devices
        self.model = self._empty()
        self.untuned = tuple(tuned) if (folder / UNTUNED).is_dir() else ()
        self.say = say
        self.held: dict[str, str] = {}  # of each part that is filled, which set of weights it has

    def stale(self, answering: bool) -> list[str]:
        """The parts that have other weights than those for answers, or for pictures."""
        wanted = self._wanted(answering)
        return [name for name, which in wanted.items() if self.held.get(name) != which]

    def fill(self, answering: bool, on_progress: Progress | None = None) -> None:
        """Give them those. What they had is let go first: there may be no room for both."""
        stale, wanted = self.stale(answering), self._wanted(answering)
        if self.held and stale:
            why = "to answer: as it was before it was tuned" if answering else "as it was tuned, to make pictures"
            self.say(f"reading the language model {why}")
            fresh = self._empty()  # layers of bitsandbytes cannot be filled twice
            for name in stale:
                self.held.pop(name, None)
                setattr(self.model, name, getattr(fresh, name))
        for which in sorted({wanted[name] for name in stale}):
            parts = [name for name in stale if wanted[name] == which]
            self._load(parts, which, self.devices[0], on_progress)
            self.held |= dict.fromkeys(parts, which)

    def reread(self, part: str) -> None:
        """Fill one part again, in the memory of the host."""
        self._load([part], self.held[part], torch.device("cpu"))

    def _wanted(self, answering: bool) -> dict[str, str]:
        names = [name for name, _ in self.model.named_children()]
        return {name: UNTUNED if answering and name in self.untuned else "" for name in names}

    def _empty(self) -> nn.Module:
        """On the meta device."""
        return weights.prepared(self.build, self.recipe).eval()

    def _load(
        self, parts: Sequence[str], which: str, device: torch.device, on_progress: Progress | None = None
    ) -> None:
        every = len(parts) == len([*self.model.children()])  # then names that belong to no part are found, too
        how = {"recipe": self.recipe, "packed": self.devices[1], "parts": () if every else parts, "which": which}
        weights.load(self.model, self.folder, device, self.dtype, on_progress, **how)
