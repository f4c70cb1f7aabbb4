"""What a first run spends on getting ready: compiling kernels, as Triton tells who listens, and capturing graphs."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any


@dataclass
class WarmUp:
    """Kernels that were compiled, not found on the disk, and seconds; `begun` hears once that some are."""

    begun: Callable[[], object] = int
    said: bool = False
    kernels: int = 0
    compile: float = 0.0  # how long launches waited for kernels
    capture: float = 0.0


_counted: ContextVar[WarmUp | None] = ContextVar("counted", default=None)


@contextmanager
def warming_up(into: WarmUp) -> Iterator[None]:
    """Counts what happens inside; of kernels nothing, where this Triton cannot be listened to."""
    token = _counted.set(into)
    try:
        knobs = getattr(getattr(sys.modules.get("triton"), "knobs", None), "compilation", None)
        if hasattr(knobs, "listener"):
            _listener.listen(knobs)
        yield
    finally:
        _counted.reset(token)


@contextmanager
def launching() -> Iterator[None]:
    """Around a launch: if it has to compile, all its time counts, also for C code and for loading what was made.

    What `begun` raises, such as a warning that is an error, comes from behind the launch: no kernel has failed by it.
    """
    counted = _counted.get()
    if counted is None:
        yield
        return
    before, start = counted.kernels, time.perf_counter()
    try:
        yield
    finally:
        if counted.kernels > before:
            counted.compile += time.perf_counter() - start
    if counted.kernels > before and not counted.said:
        counted.said = True
        counted.begun()


def captured(seconds: float) -> None:
    if counted := _counted.get():
        counted.capture += seconds


class _Listener:
    """Called behind each compilation and each binary found on the disk; `other` is who listened before.

    Only counts: Triton takes what is raised here for a failure of the kernel.
    """

    other: Callable[..., Any] | None = None
    listening = False

    def listen(self, knobs: Any) -> None:
        if knobs.listener is None or not self.listening:
            self.other, self.listening, knobs.listener = knobs.listener, True, self

    def __call__(self, **what: Any) -> None:
        counted = _counted.get()
        if counted is not None and not what.get("cache_hit"):
            counted.kernels += 1
        if self.other:
            self.other(**what)


_listener = _Listener()
