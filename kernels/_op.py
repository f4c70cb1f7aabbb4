"""What every kernel file is built on: an operator that torch sees on any device, its cost, its cases, its launches.

CUDA runs Triton, the meta device only notes what would be launched, everything else runs plain torch in the tensors'
own dtype. So do inputs that want a gradient, operators that were measured to be slower than torch on this card, and
operators whose kernels cannot be compiled here: one warning for all that fail alike.
"""

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ._failure import KernelWarning, NotCompiled, failure, of_the_device
from ._tuned import torch_is_faster
from ._warm_up import launching

try:
    if os.environ.get("UNIPIC_RUN_TRITON") == "0":
        raise ImportError("switched off")
    import triton
    import triton.language as tl

    HAS_TRITON = True
except ImportError:  # Windows and macOS, or UNIPIC_RUN_TRITON=0 for a comparison with torch
    HAS_TRITON = False

    class _Absent:
        """Lets kernel files be imported where there is no Triton: an attribute is itself, a decorator nothing."""

        def __getattr__(self, name: str) -> Any:
            return self

        def __call__(self, function: Any = None, **options: Any) -> Any:
            return self if function is None else function

    triton = tl = _Absent()

# Triton's own of these take several microseconds a call, and a launch needs a few.


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()


LIBRARY = torch.library.Library("unipic", "DEF")
_interpreted: ContextVar[bool] = ContextVar("interpreted", default=False)
_recorded: ContextVar["list[Launch] | None"] = ContextVar("recorded", default=None)
_all_recorded: ContextVar["list[Launch] | None"] = ContextVar("all_recorded", default=None)
_told: set[str] = set()  # the kinds of failure that users have heard of


@dataclass(frozen=True)
class Cost:
    """Of one call: multiply-adds count two, bytes are what must be read and written once.

    `beside`: what is computed in vain, and instructions around a product as the operations that tensor cores could have
    done meanwhile. A prediction of seconds adds it to `flop`; a share of the roof does not.
    """

    flop: int
    nbytes: int
    launches: int = 0  # of the library's kernels, which `launch` does not see
    beside: int = 0


@dataclass(frozen=True)
class Case:
    """Arguments worth a check: why, how to make them on a device, and for which of interp, aot and gpu."""

    why: str
    make: Callable[[torch.device | str], tuple[Any, ...]]
    marks: str = "interp aot gpu"
    operators: str = ""  # whom they are for, by name; what that is by default says kernels/_registry.py


def random_tensor(*shape: int, dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """For cases: the same for a shape."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(device, dtype)


@dataclass(frozen=True)
class Launch:
    """One launch as it was, or would have been."""

    kernel: Any  # the jitted function
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    options: dict[str, Any]  # constexprs, num_warps, num_stages


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """Launch a jitted function; while `recording`, note it too, and on the meta device nothing else.

    Raises NotCompiled where Triton has no kernel to launch, and what the device says as it is.
    """
    if not all(grid):
        return
    for recorded in (_recorded.get(), _all_recorded.get()):
        if recorded is not None:
            recorded.append(Launch(kernel, grid, arguments, options))
    if any(isinstance(x, Tensor) and x.is_meta for x in arguments):
        return
    with launching():
        try:
            kernel[grid](*arguments, **options)
        except Exception as error:
            if _interpreted.get() or of_the_device(error):
                raise
            raise NotCompiled(f"{type(error).__name__}: {error}") from error


@contextmanager
def recording() -> Iterator[list[Launch]]:
    """Collects the launches made inside, but not those of a recording within."""
    yield from _collected(_recorded)


@contextmanager
def recording_all() -> Iterator[list[Launch]]:
    """Collects the launches made inside, whoever else records them, as dry runs do."""
    yield from _collected(_all_recorded)


def _collected(where: ContextVar[list[Launch] | None]) -> Iterator[list[Launch]]:
    launches: list[Launch] = []
    token = where.set(launches)
    try:
        yield launches
    finally:
        where.reset(token)


@contextmanager
def interpreted() -> Iterator[None]:
    """CPU tensors take the Triton path inside; the process must have been started with TRITON_INTERPRET=1."""
    token = _interpreted.set(True)
    try:
        yield
    finally:
        _interpreted.reset(token)


def launches(x: Tensor) -> bool:
    """Whether operators on x launch kernels, or on the meta device count them."""
    return x.is_meta or (HAS_TRITON and (x.is_cuda or _interpreted.get()))


def row_share(width: int) -> dict[str, int]:
    """A program's share of a row; heuristic: eight bfloat16 values a thread."""
    block = min(1024, next_power_of_2(width))
    return {"D": width, "BLOCK": block, "num_warps": 4 if block >= 512 else 1}


def unit_rows(x: Tensor) -> Tensor:
    """x with a contiguous last dimension: a copy only where it has none."""
    return x if x.stride(-1) == 1 else x.contiguous()


class Operator:
    """`torch` and `triton` compute the same from the arguments of `schema`, the second by way of `launch`."""

    def __init__(
        self,
        schema: str,
        *,
        torch: Callable[..., Any],
        triton: Callable[..., Any],
        cost: Callable[..., Cost],
    ) -> None:
        self.name, self.torch, self.triton, self.cost = schema.partition("(")[0], torch, triton, cost
        self.broken = "" if HAS_TRITON else "Triton is not here"  # why torch does its work
        LIBRARY.define(schema)
        LIBRARY.impl(self.name, triton, "CompositeExplicitAutograd")
        OPERATORS[f"unipic::{self.name}"] = self

    @property
    def op(self) -> Any:
        return getattr(torch.ops.unipic, self.name)

    def written(self, arguments: Sequence[Any]) -> list[Tensor]:
        """Those of the arguments that a call writes to."""
        told = [argument.alias_info for argument in self.op.default._schema.arguments]
        return [x for x, alias in zip(arguments, told, strict=True) if x is not None and alias and alias.is_write]

    def __call__(self, *arguments: Any) -> Any:
        tensors = [x for x in arguments if isinstance(x, Tensor)]
        if tensors[0].is_meta:
            return self.op(*arguments)
        if self.broken or not launches(tensors[0]) or _wants_gradient(tensors) or torch_is_faster(self.name, arguments):
            return self.torch(*arguments)
        try:
            return self.op(*arguments)
        except NotCompiled as error:
            self._give_up(error)
            return self.torch(*arguments)

    def _give_up(self, error: NotCompiled) -> None:
        """Leave it to torch from now on, and all operators if none can do better."""
        why = failure(error.__cause__ or error)
        for operator in OPERATORS.values() if why.everywhere else [self]:
            operator.broken = operator.broken or str(error)
        if why.kind not in _told:
            warnings.warn(why.sentence(self.name), KernelWarning, 2)
            _told.add(why.kind)


OPERATORS: dict[str, Operator] = {}  # by the name under which a dispatch mode sees them


def _wants_gradient(tensors: list[Tensor]) -> bool:
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
