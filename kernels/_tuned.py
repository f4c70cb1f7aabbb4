"""Measured tile sizes, warps and stages by architecture; where nothing is listed, a kernel's own heuristic holds.

`tuned/sm_89.json` and its like are written by bench/tune.py on a card of that architecture and shipped:

    source         "measured", with device_name, torch, triton and date; or "heuristic" as long as nothing was measured
    shared_bytes   of one block on that architecture
    kernels        kernel -> shape class -> {"options": {"BLOCK_M": 64, ...}, "microseconds": ..., ...}
    torch          operator -> class of calls -> {"microseconds": ..., "torch_microseconds": ...}; may be missing. These
                   calls are torch's on that architecture, where it was the faster one

A launcher asks for its shape class with its heuristic as the default. An entry may set only what the default has, and
one that cannot be right is ignored with a warning: a table never makes a run fail. Nothing is ever measured here.
"""

import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ._failure import KernelWarning

FOLDER = Path(__file__).with_name("tuned")
HOME = 89  # where there is no card to ask: what bench/aot.py compiles every configuration for
MOST = {"num_warps": 16, "num_stages": 8, "SPLIT": 64}  # of what is no block; blocks are at most 1024
Options = dict[str, int]


@dataclass(frozen=True)
class Question:
    """What a launcher wanted to know."""

    kernel: str
    key: str
    default: Options
    staged: Callable[[Options], int] | None


_asked: ContextVar[list[Question] | None] = ContextVar("asked", default=None)
_tried: ContextVar[Mapping[str, Options] | None] = ContextVar("tried", default=None)
_accepted: dict[tuple[int, str, str], Options] = {}  # what was read and checked, by capability, kernel and key


def tuned(
    kernel: str,
    key: str,
    default: Options,
    device: torch.device,
    staged: Callable[[Options], int] | None = None,
) -> Options:
    """The options of a launch: `default`, with what is listed for this kernel, this shape class and the device's card.

    `staged` says from the options how many bytes of operands one step of the kernel's loop keeps in shared memory.
    """
    asked, tried = _asked.get(), _tried.get()
    if asked is not None:
        asked.append(Question(kernel, key, dict(default), staged))
    if tried is not None and kernel in tried:
        return default | tried[kernel]
    capability = _capability(device.index) if device.type == "cuda" else HOME
    if key not in _table(capability)["kernels"].get(kernel, ()):
        return default
    at = (capability, kernel, key)
    if at not in _accepted:
        _accepted[at] = _checked(capability, Question(kernel, key, default, staged))
    return default | _accepted[at]


@contextmanager
def asking() -> Iterator[list[Question]]:
    """Collects what launchers ask for inside, which on the meta device costs nothing."""
    questions: list[Question] = []
    token = _asked.set(questions)
    try:
        yield questions
    finally:
        _asked.reset(token)


@contextmanager
def trying(kernel: str, options: Options) -> Iterator[None]:
    """Inside, this kernel takes these options, whatever is listed."""
    token = _tried.set({**(_tried.get() or {}), kernel: options})
    try:
        yield
    finally:
        _tried.reset(token)


def torch_is_faster(operator: str, arguments: Sequence[Any]) -> bool:
    """Whether this class of an operator's calls is listed as torch's for the card that has the arguments."""
    device = next(x.device for x in arguments if isinstance(x, Tensor))
    if device.type != "cuda":
        return False
    listed = _table(_capability(device.index)).get("torch", {}).get(operator)
    return bool(listed) and call_class(arguments) in listed


def left_to_torch(capability: int) -> dict[str, list[str]]:
    """By operator, the classes of calls that are torch's on cards of a compute capability (89)."""
    return {operator: sorted(calls) for operator, calls in _table(capability).get("torch", {}).items()}


def call_class(arguments: Sequence[Any]) -> str:
    """Types, rows as in `row_class` by columns of every tensor, flags: "bfloat16 512x1536 2048x1536 True"."""
    words, dtype = [], None
    for x in arguments:
        if isinstance(x, Tensor):
            words += [] if x.dtype == dtype else [dtype_class(dtype := x.dtype)]
            columns = x.shape[-1] if x.dim() else 1
            words.append(f"{row_class(x.numel() // max(columns, 1))}x{columns}")
        elif isinstance(x, bool | str | torch.dtype):
            words.append(str(x).removeprefix("torch."))
    return " ".join(words)


def dtype_class(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def row_class(rows: int) -> int:
    """Rows change from round to round: those up to the same power of two share their options."""
    return 1 << (rows - 1).bit_length() if rows > 1 else rows


def check(options: Any, question: Question, shared_bytes: int) -> None:
    """ValueError where options cannot be right: unknown, not of the right kind, or more than a block may have."""
    default = question.default
    if not isinstance(options, dict) or not options or options.keys() - default.keys():
        raise ValueError(f"options {options!r:.100} are not some of {', '.join(default)}")
    for name, value in options.items():
        least, most = min(16, default[name]) if name.startswith("BLOCK") else 1, MOST.get(name, 1024)
        if type(value) is not int or not least <= value <= most:
            raise ValueError(f"{name} is {value!r:.40}, not a whole number from {least} to {most}")
        if value & (value - 1) and name not in ("num_stages", "SPLIT"):
            raise ValueError(f"{name} is {value}, not a power of two")
    whole = default | options
    # The compiler keeps the operands of all stages but the one in use.
    needed = question.staged(whole) * max(whole.get("num_stages", 1) - 1, 1) if question.staged else 0
    if needed > shared_bytes:
        raise ValueError(f"{options} needs {needed} bytes of shared memory, a block may have {shared_bytes}")


def read(path: Path) -> dict[str, Any]:
    """A table, with the form of its outer levels checked. Raises ValueError."""
    table = json.loads(path.read_text("utf-8"))  # JSONDecodeError is a ValueError
    if not isinstance(table, dict) or table.get("source") not in ("heuristic", "measured"):
        raise ValueError(f"{path.name} does not say whether its source is heuristic or measured")
    if type(table.get("shared_bytes")) is not int:
        raise ValueError(f"{path.name} does not say how many shared_bytes a block may have")
    kernels = table.get("kernels")
    if not isinstance(kernels, dict) or not all(isinstance(entries, dict) for entries in kernels.values()):
        raise ValueError(f"{path.name} has no kernels, each with its shape classes")
    slower = table.get("torch", {})
    if not isinstance(slower, dict) or not all(isinstance(calls, dict) for calls in slower.values()):
        raise ValueError(f"{path.name} has under torch something else than operators, each with its classes of calls")
    return table


def forget() -> None:
    """Read tables anew."""
    _table.cache_clear()
    _accepted.clear()


@cache
def _capability(index: int) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


@cache
def _table(capability: int) -> dict[str, Any]:
    path = FOLDER / f"sm_{capability}.json"
    try:
        return read(path)
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        warnings.warn(f"tuned kernel options are not used: {error}", KernelWarning, 3)
    return {"kernels": {}}


def _checked(capability: int, question: Question) -> Options:
    table = _table(capability)
    entry = table["kernels"][question.kernel][question.key]
    options = entry.get("options") if isinstance(entry, dict) else entry
    try:
        check(options, question, table["shared_bytes"])
    except ValueError as error:
        where = f"sm_{capability}.json, {question.kernel}, {question.key}"
        warnings.warn(f"tuned kernel options are not used: {where}: {error}", KernelWarning, 3)
        return {}
    return options
