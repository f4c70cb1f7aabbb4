"""torch's limit on a device: one for the whole process, and so the sum of what the engines there may use.

An engine without a bound may use all of the card: as long as one lives, there is no limit that would hold it back, and
the others only keep to their plans. When none is left, torch has the limit that it had before the first came.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch

from .budget import context_on

_lock = threading.RLock()  # the end of an engine may come while another one is entered
_shared: dict[torch.device, "Shared"] = {}


class Shared:
    """The engines of one device: `bounds` by engine, each with CUDA's context in it, None for one without."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.bounds = device, {}
        self.before = self.share = torch.cuda.get_per_process_memory_fraction(device)
        self.others = torch.cuda.memory_reserved(device)  # which the rest of the process has, and may keep
        self.total = torch.cuda.get_device_properties(device).total_memory

    def apply(self) -> None:
        share, bounds = self.before, list(self.bounds.values())
        if bounds and None not in bounds:
            tensors = sum(max(0, bound - context_on(self.device)) for bound in bounds)
            share = min(share, (self.others + tensors) / self.total)
        if share != self.share:
            torch.cuda.set_per_process_memory_fraction(share, self.device)
            self.share = share


@contextmanager
def held_to(device: torch.device, bound: int | None) -> Iterator[Callable[[], None]]:
    """Count an engine that may use so many bytes of a device, None for all of it, among those that share it.

    Yields what ends that, to be called once or more often; an error inside ends it at once.
    """
    if device.type != "cuda" and bound is None:
        yield lambda: None
        return
    engine = object()
    leave = partial(_leave, device, engine)
    with _lock:
        shared = _shared.get(device) or _shared.setdefault(device, Shared(device))
        shared.bounds[engine] = bound
        shared.apply()
    try:
        yield leave
    except BaseException:
        leave()
        raise


def _leave(device: torch.device, engine: object) -> None:
    with _lock:
        shared = _shared.get(device)
        if shared is None or engine not in shared.bounds:
            return
        del shared.bounds[engine]
        shared.apply()
        if not shared.bounds:
            del _shared[device]
