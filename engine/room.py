"""A model as it lies for one request, and how the request goes on where that took more memory than there is."""

import warnings
from collections.abc import Callable

from .errors import BudgetError, HostMemoryError, UnipicWarning
from .loaded import Loaded

OFF = "memory ran out"  # why graphs are off until the next request


class Room:
    """`loaded` is how the model lies now, `at_once` how many images it makes together."""

    def __init__(self, loaded: Loaded, at_once: int = 1, less: Callable[[], tuple[Loaded, int]] | None = None) -> None:
        """`less` finds the next smaller way to lie, says so, and raises BudgetError where there is none.

        Graphs that an earlier request had to do without are tried again.
        """
        self.loaded, self.at_once, self.less = loaded, at_once, less
        if loaded.model.graphs.off == OFF:
            loaded.model.graphs.clear()

    def shrink(self, error: BudgetError) -> bool:
        """Go on in less memory: what graphs hold is the first to go, then weights; False where nothing can.

        Where weights stay, images are made one at a time. On a GPU nothing of that frees memory of the host.
        To be called when nothing is held any more of what has failed.
        """
        if isinstance(error, HostMemoryError) and self.loaded.device.type != "cpu":
            return False
        graphs = self.loaded.model.graphs
        if graphs.holds:
            graphs.clear(OFF)
            warnings.warn("out of memory: going on without CUDA graphs", UnipicWarning, stacklevel=2)
            return True
        if self.less is not None:
            self.loaded, self.at_once = self.less()
            return True
        if self.at_once == 1:
            return False
        self.at_once = 1
        warnings.warn("out of memory: going on with one image at a time", UnipicWarning, stacklevel=2)
        return True
