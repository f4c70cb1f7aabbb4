"""Counts what a computation needs while it runs, also on the meta device, where nothing is computed at all.

    with torch.inference_mode(), Meter() as meter:
        meter.stage = "sample"
        ...
    meter.peaks["sample"], meter.total(stage="sample").flop

Memory is that of storages that live, in blocks of 512 bytes as CUDA's allocator makes them, so views cost nothing and a
storage counts until its last view has gone; what the allocator would reserve for them is estimated beside it. Our own
operators say what they cost (`kernels/`); of torch's, matrix products, convolutions and attention are counted by their
formulas and everything else as free but for the bytes it moves. An operation of torch is one launch unless it only
makes a view or room. Works in inference mode only, where torch hands over whole operations such as attention.
"""

import math
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ..kernels._op import OPERATORS, Operator, recording
from .formulas import FORMULAS, KIND, bytes_of, kind_of_ours, precision
from .segments import Block, GrowingSegments, Segments, rounded

FREE = {"lift_fresh", "detach_"}  # book-keeping of torch.tensor(...)
COMPOSITE = torch._C.DispatchKey.CompositeImplicitAutograd


@dataclass(frozen=True)
class Call:
    """One operation, and what one such call costs."""

    stage: str
    kind: str  # matmul, attention, norm, elementwise, movement
    precision: str  # int8, bf16, fp16, fp32
    name: str
    shape: tuple[int, ...]  # of its first result
    flop: int
    nbytes: int  # read and written
    launches: int
    beside: int = 0  # `Cost.beside`
    programs: int = 0  # of our kernel, the most where there are several; 0 where a library's tiles are not known


@dataclass(frozen=True)
class Total:
    calls: int
    flop: int
    nbytes: int
    launches: int


@dataclass(frozen=True)
class Span:
    """What something did: its calls, and the most that lived meanwhile above what lived before."""

    calls: Counter[Call]
    above: int


class Meter(TorchDispatchMode):
    """`calls` counts equal operations together; `peaks` are the most bytes that lived, by stage.

    `reserved`: what the allocator had reserved by the end of each stage. `history`: what was called and the peak
    meanwhile, in order.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[Call] = Counter()
        self.history: list[tuple[Counter[Call], int]] = []
        self.current = 0
        self.peaks: dict[str, int] = {}
        self.reserved: dict[str, int] = {}
        self._living: dict[int, tuple[weakref.ref, int, list[tuple[Segments, Block]]]] = {}  # by the storage's address
        self._segments: list[Segments] = [GrowingSegments()]  # the card's, and those that follow along for a while
        self._inside: list[int] = []  # launches so far in the operators of ours that are running, the innermost last
        self._since = self._highest = 0  # the peaks since the last call, and in the span that is being followed
        self.stage = ""

    @property
    def stage(self) -> str:
        """What is counted from now on belongs to it, and what lives already counts towards its peak."""
        return self._stage

    @stage.setter
    def stage(self, name: str) -> None:
        self._stage, self._since = name, self.current
        self._peak(self.current)

    @property
    def peak(self) -> int:
        return max(self.peaks.values())

    @contextmanager
    def followed_by(self, *segments: Segments) -> Iterator[None]:
        """Inside, what is allocated on the card is allocated there as well."""
        before, self._segments = self._segments, [*self._segments, *segments]
        try:
            yield
        finally:
            self._segments = before

    @contextmanager
    def aside(self, stage: str) -> Iterator[None]:
        """Inside is another stage, in the same memory; afterwards the allocator is as it was before."""
        before, outer = self._segments, self.stage
        self._segments = [before[0].copy()]
        self.stage = stage
        try:
            yield
        finally:
            self._segments = before
            self.stage = outer

    def span(self, work: Callable[[], Any]) -> tuple[Any, Span]:
        """What the work returned, and what it did."""
        calls, outer, start = self.calls.copy(), self._highest, self.current
        self._highest = start
        result = work()
        span = Span(self.calls - calls, self._highest - start)
        self._highest = max(outer, self._highest)
        return result, span

    def repeat(self, span: Span) -> None:
        """The same once more, without doing it."""
        self.calls.update(span.calls)
        self._peak(self.current + span.above)
        self._remember(span.calls)

    def hold(self, tensors: Iterable[Tensor]) -> None:
        """Count tensors that were there before, such as weights, as living."""
        for tensor in tensors:
            self._live(tensor)

    def total(self, **wanted: str) -> Total:
        """The sum over the calls whose fields (stage, kind, ...) are as given."""
        found = [
            (call, times)
            for call, times in self.calls.items()
            if all(getattr(call, name) == value for name, value in wanted.items())
        ]
        flop, nbytes, launches = (
            sum(getattr(call, name) * times for call, times in found) for name in ("flop", "nbytes", "launches")
        )
        return Total(sum(times for _, times in found), flop, nbytes, launches)

    def __enter__(self) -> "Meter":
        if not torch.is_inference_mode_enabled():
            raise RuntimeError("a meter counts in torch.inference_mode() only")
        return super().__enter__()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if operator := OPERATORS.get(function._schema.name):
            return self._ours(operator, args, kwargs)
        if function._opname not in FORMULAS and is_composite(function):
            with self:
                return function._op_dk(COMPOSITE, *args, **kwargs)
        result = function(*args, **kwargs)
        self._torchs(function, args, kwargs, result)
        return result

    def _ours(self, operator: Operator, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        self._inside.append(0)
        try:
            with recording() as launches, self:  # sees what the launcher allocates and copies
                result = operator.triton(*args, **kwargs)
        finally:
            seen = self._inside.pop()
        cost = operator.cost(*args, **kwargs)
        count = len(launches) + max(seen, cost.launches)  # a library's are not seen on the meta device
        if self._inside:  # the operator around it has said what it costs
            self._inside[-1] += count
            return result
        tensors = list(tensors_in((args, kwargs)))
        kind = kind_of_ours(operator.name)
        programs = max((math.prod(launch.grid) for launch in launches), default=0)
        costs = cost.flop, cost.nbytes, count, cost.beside, programs
        self._note(kind, precision(tensors), operator.name, result, *costs)
        return result

    def _torchs(self, function: Any, args: Sequence[Any], kwargs: dict[str, Any], result: Any) -> None:
        name = function._opname
        results = list(tensors_in(result))
        read = list(tensors_in((args, kwargs)))
        fresh = [x for x in results if self._live(x, read)]
        writes = function._schema.is_mutable
        if "empty" in name or name in FREE or not (writes or fresh) or not any(x.numel() for x in results):
            return
        if self._inside:
            self._inside[-1] += 1
            return
        flop = FORMULAS[name](args, kwargs, result) if name in FORMULAS else 0
        moved = bytes_of(name, read, results)
        self._note(KIND.get(name, "elementwise"), precision(read or results), name, result, flop, moved, 1)

    def _note(self, kind: str, how: str, name: str, result: Any, *costs: int) -> None:
        """`costs`: the last fields of a `Call`."""
        shape = next((tuple(x.shape) for x in tensors_in(result)), ())
        call = Call(self.stage, kind, how, name, shape, *costs)
        self.calls[call] += 1
        self._remember(Counter((call,)))

    def _remember(self, calls: Counter[Call]) -> None:
        self.history.append((calls, self._since))
        self._since = self.current

    def _live(self, tensor: Tensor, read: Sequence[Tensor] = ()) -> bool:
        """Whether the tensor's storage is new, and not that of an argument; if so it counts until it dies."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, rounded(storage.nbytes())
        if key in self._living or any(x.untyped_storage()._cdata == key for x in read):
            return False
        blocks = [(segments, segments.take(size)) for segments in self._segments if size]
        self._living[key] = weakref.ref(storage, lambda _: self._died(key)), size, blocks
        self.current += size
        self._peak(self.current)
        return True

    def _peak(self, level: int) -> None:
        self.peaks[self.stage] = max(self.peaks.get(self.stage, 0), level)
        self.reserved[self.stage] = max(self.reserved.get(self.stage, 0), self._segments[0].reserved, level)
        self._since, self._highest = max(self._since, level), max(self._highest, level)

    def _died(self, key: int) -> None:
        _, size, blocks = self._living.pop(key)
        self.current -= size
        for segments, block in blocks:
            segments.give(block)


@cache
def is_composite(function: Any) -> bool:
    """Whether torch makes the operation of others, on every device that has no kernel of its own for it.

    What `decompose` would do is said in Python as well, also for operations that a device has a kernel for.
    """
    return torch._C._dispatch_has_kernel_for_dispatch_key(function.name(), "CompositeImplicitAutograd")


def tensors_in(x: Any) -> Iterator[Tensor]:
    if isinstance(x, Tensor):
        yield x
    elif isinstance(x, (tuple, list, dict)):
        for part in x.values() if isinstance(x, dict) else x:
            yield from tensors_in(part)
    elif is_dataclass(x):
        yield from tensors_in(tuple(getattr(x, field.name) for field in fields(x)))
