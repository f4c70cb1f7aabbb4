"""A model as it lies for one request, and how the request goes on where that took more memory than there is."""

import warnings
from collections.abc import Callable

from .errors import UnipicWarning
from .loaded import Loaded


class Room:
    """`loaded` is how the model lies now, `at_once` how many images it makes together."""

    def __init__(self, loaded: Loaded, at_once: int = 1, less: Callable[[], tuple[Loaded, int]] | None = None) -> None:
        """`less` finds the next smaller way to lie, says so, and raises BudgetError where there is none."""
        self.loaded, self.at_once, self.less = loaded, at_once, less
        self._captures = 0

    def shrink(self) -> bool:
        """Go on in less memory: what graphs hold is the first to go, then weights; False where nothing can.

        To be called when nothing is held any more of what has failed.
        """
        graphs = self.loaded.model.graphs
        if graphs.counts.captures > self._captures:
            self._captures = graphs.counts.captures
            graphs.clear("memory ran out")
            warnings.warn("out of memory: going on without CUDA graphs", UnipicWarning, stacklevel=2)
            return True
        if self.less is None:
            return False
        self.loaded, self.at_once = self.less()
        return True
