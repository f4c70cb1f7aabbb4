"""CUDA graphs: what a function launches is captured once and then replayed, hundreds of launches for one call.

    graphs.run("head", (rows, 5), head.advance, (run, 5), after=1)

The first calls for a key, `after` of them, run the function as always, and the last of these captures it right behind
that, while the device is still busy. Later calls replay. So nothing is computed twice, whatever has to be compiled or
set up was so before the capture, a capture that fails costs nothing but itself, and what is called less often is never
captured. Where there is no CUDA, or a reason against it, the function just runs.

A graph knows addresses, not names. What a function reads or writes besides a module's weights is therefore given to
`run`: tensors, numbers and strings, in tuples and frozen dataclasses. The graph has copies of the tensors, to which
later calls copy theirs. What is changed in place has to come from `hold` or `storage`, and what is large or goes to
many graphs should: the one copies it once, the other makes it, and then it is taken as it is. The function is one that
is equal to itself the next time, no lambda; it has no effect on Python, makes no tensor from Python's numbers, and
never waits for the device.

One `Graphs` belongs to one model in one precision; whoever moves weights calls `clear`.
"""

import gc
import time
import warnings
from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..kernels._op import OPERATORS, KernelWarning
from ..kernels._warm_up import captured
from .errors import UnipicWarning

MOST = 512  # graphs; where more are wanted, all are dropped
T = TypeVar("T")
Name = tuple[str, Hashable]


@dataclass
class Counts:
    captures: int = 0
    replays: int = 0
    eager: int = 0  # all other calls
    misses: int = 0  # of these, whose key was captured with something that did not fit: too coarse a key
    seconds: float = 0.0  # spent capturing


@dataclass(frozen=True)
class Captured:
    function: Callable[..., Any]
    given: tuple[Any, ...]
    replay: Callable[[], None]
    result: Any


class Graphs:
    """`off` says why nothing is captured, `failed` what could not be and why; `counts` only ever grow.

    The user hears once of a capture that failed.
    """

    def __init__(self, capture: Callable[..., Any] | None = None, kind: str = "cuda") -> None:
        """`capture` stands for `CudaCapture` on another kind of device, in tests."""
        self.counts, self.off, self.failed = Counts(), "", {}
        self._told: set[str] = set()
        self._capture, self._kind = capture or CudaCapture(), kind
        self._drop()

    @property
    def holds(self) -> bool:
        """Whether there is anything whose memory `clear` would give back."""
        return bool(self._graphs or self._held)  # what is stored for one request is its own until a graph has it

    def clear(self, off: str = "") -> None:
        """Forget everything, since weights have moved; with a reason, and capture nothing until the next `clear`."""
        self.off, self.failed = off, {}
        self._drop()

    def refusal(self, what: str, device: torch.device | None) -> str:
        """Why `what` is not captured on a device; empty if nothing speaks against it."""
        if device is None or device.type != self._kind:
            return f"graphs are for {self._kind}, not {device and device.type}"
        return self.off or self.failed.get(what, "")

    def hold(self, what: str, key: Hashable, fresh: T, at_sight: bool = True) -> T:
        """The tensors that are kept for a key, filled with these; the next call for the key overwrites them.

        Without `at_sight` nothing is kept the first time.
        """
        name = (what, key)
        if self.refusal(what, device_of(fresh)):
            return fresh
        self._seen[name] += 1
        if not at_sight and self._seen[name] == 1:
            return fresh
        if name not in self._held or not fill(self._held[name], fresh):
            self._held[name] = keep(fresh)
        return keep(self._held[name])  # the same tensors in new containers, which may have remembered what they held

    def storage(self, what: str, key: Hashable, make: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """What `make` has made for the key, the same tensors every time, as they were left.

        They are large: those of another key go first, and every graph of `what` with them.
        """
        if self._stored.get(what, (None, ()))[0] != key:
            self._stored.pop(what, None)
            for table in (self._graphs, self._seen):
                for name in [name for name in table if name[0] == what]:
                    del table[name]
            made = make()
            if self.refusal(what, device_of(made)):
                return made
            for x in made:
                x.kept_for_graphs = True
            self._stored[what] = key, made
        return self._stored[what][1]

    def may_write(self, x: Tensor) -> bool:
        """Whether a graph may change it in place."""
        return is_kept(x)

    def run(
        self,
        what: str,
        key: Hashable,
        function: Callable[..., T],
        given: tuple[Any, ...],
        after: int = 2,
    ) -> T:
        """function(*given), captured behind call `after`. What it returns the next call of any key may overwrite."""
        name, device = (what, key), device_of(given)
        if self.refusal(what, device):
            self.counts.eager += 1
            return function(*given)
        kept = self._graphs.get(name)
        if kept is not None and kept.function == function and fill(kept.given, given):
            self.counts.replays += 1
            kept.replay()
            return kept.result
        if kept is not None:
            self.counts.misses += 1
            del self._graphs[name], kept
        self.counts.eager += 1
        result = function(*given)
        self._seen[name] += 1
        if self._seen[name] >= after:
            self._take(name, function, given, device)
        return result

    def _take(self, name: Name, function: Callable[..., Any], given: tuple[Any, ...], device: torch.device) -> None:
        if len(self._graphs) >= MOST:
            self._abandon(device)
        start = time.perf_counter()
        try:
            given = keep(given)
            replay, result = self._capture(lambda: function(*given), device, first=not self._graphs)
        except Exception as error:  # the work itself is done, and the next call will do it the same way
            what, why = name[0], reason(error)
            self.failed[what] = why
            if isinstance(error, torch.OutOfMemoryError):  # the rest of the model needs what graphs have taken
                self._abandon(device)
            self._tell(f"the CUDA graph {what!r} could not be captured ({why}): it runs uncaptured, more slowly")
        else:
            self._graphs[name] = Captured(function, given, replay, result)
            self.counts.captures += 1
        finally:
            seconds = time.perf_counter() - start
            self.counts.seconds += seconds
            captured(seconds)

    def _abandon(self, device: torch.device) -> None:
        """Drop everything in the middle of work, when the device has come to its end.

        torch waits for the stream of a capture before it unmaps the memory, not for those on which graphs are replayed.
        """
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        self._drop()

    def _tell(self, sentence: str) -> None:
        if sentence not in self._told:
            self._told.add(sentence)
            warnings.warn(sentence, UnipicWarning, stacklevel=2)

    def _drop(self) -> None:
        self._graphs: dict[Name, Captured] = {}
        self._held: dict[Name, Any] = {}
        self._stored: dict[str, tuple[Hashable, tuple[Tensor, ...]]] = {}
        self._seen: Counter[Name] = Counter()


class CudaCapture:
    """Captures on a stream of its own, so that the one in use stays usable whatever goes wrong.

    All graphs share one pool of memory: they run one after the other, and none reads what another has left. torch's own
    `torch.cuda.graph` would wait for the device and give the allocator's memory back each time.
    """

    def __init__(self) -> None:
        self._stream = self._pool = None
        self._spoilt: list[Any] = []

    def __call__(self, function: Callable[[], T], device: torch.device, first: bool) -> tuple[Callable[[], None], T]:
        """(replay, what the function returned). `first`: no graph is left, and with them torch gave up their pool."""
        if self._stream is None or self._stream.device != device:
            self._stream = torch.cuda.Stream(device)
        if first or self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        try:
            with undisturbed(), torch.cuda.stream(self._stream):
                # Other threads may do what they like meanwhile.
                graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
                try:
                    result = function()
                finally:
                    graph.capture_end()
        except BaseException:
            self._unwind(graph, device)
            raise
        return graph.replay, result

    def _unwind(self, graph: Any, device: torch.device) -> None:
        """torch 2.11 leaves its allocator in a capture that could not be ended, and lets it ask the graph about it."""
        try:
            torch._C._cuda_endAllocateToPool(device.index, self._pool)
        except Exception:  # it was ended, as it should be
            return
        self._spoilt.append(graph)
        self._stream = self._pool = None


@contextmanager
def undisturbed() -> Iterator[None]:
    """During a capture nothing may unload a kernel, and an operator that cannot be captured is not broken."""
    collecting, broken = gc.isenabled(), {operator: operator.broken for operator in OPERATORS.values()}
    gc.disable()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", KernelWarning)
            yield
    finally:
        for operator, was in broken.items():
            operator.broken = was
        if collecting:
            gc.enable()


def parts(x: Any) -> tuple[Any, ...] | None:
    """Of a tuple or a frozen dataclass, which hold the same objects for good; None of anything else."""
    if is_dataclass(x) and x.__dataclass_params__.frozen:
        return tuple(getattr(x, field.name) for field in fields(x))
    return x if isinstance(x, tuple) else None


def keep(x: T) -> T:
    """x with copies in place of all tensors but those that are such copies already."""
    if isinstance(x, Tensor):
        if not is_kept(x):
            x = x.clone(memory_format=torch.contiguous_format)
            x.kept_for_graphs = True
        return x
    inner = parts(x)
    if inner is None:
        return x
    made = tuple(keep(part) for part in inner)
    return made if type(x) is tuple else type(x)(*made)


def is_kept(x: Tensor) -> bool:
    return hasattr(x, "kept_for_graphs")


def device_of(x: Any) -> torch.device | None:
    """Of its first tensor."""
    if isinstance(x, Tensor):
        return x.device
    return next((device for part in parts(x) or () if (device := device_of(part))), None)


def fill(kept: Any, fresh: Any) -> bool:
    """Copy the tensors of `fresh` to those of `kept`, or nothing and False where they differ in more than values."""
    both = list(pairs(kept, fresh))
    if not all(fits(a, b) for a, b in both):
        return False
    for a, b in both:
        if isinstance(a, Tensor):
            a.copy_(b)
    return True


def pairs(a: Any, b: Any) -> Iterator[tuple[Any, Any]]:
    """What stands at the same place in both and is not one object; where they differ in form, as far as they do not."""
    if a is b:
        return
    inner, other = parts(a), parts(b)
    if inner is None or other is None or len(inner) != len(other):
        yield a, b
        return
    for x, y in zip(inner, other, strict=True):
        yield from pairs(x, y)


def fits(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):  # of what is kept, a copy is not what may be changed in place
        return not is_kept(b) and (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device)
    return isinstance(a, int | float | str) and type(a) is type(b) and a == b


def reason(error: BaseException) -> str:
    """What began it, in one line."""
    while error.__context__ is not None:
        error = error.__context__
    return f"{type(error).__name__}: {error}".partition("\n")[0][:200]
