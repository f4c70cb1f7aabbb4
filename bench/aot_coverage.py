"""What bench/aot.py would otherwise leave out: kernels that no case leads to, and what tuned tables list."""

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar
from unittest.mock import patch

from unipic_run.bench.aot_compile import HOME
from unipic_run.kernels import _tuned
from unipic_run.kernels._tuned import Question

J = TypeVar("J")
Kernels = dict[str, dict[str, Any]]  # kernel -> shape class -> entry


def left_out(modules: Iterable[ModuleType], compiled: set[tuple[str, str]]) -> Iterator[str]:
    """Kernels, which are what is launched and so named `_x_kernel`; `compiled`: (module, name)."""
    for module in modules:
        for name, x in vars(module).items():
            own = getattr(inspect.unwrap(getattr(x, "fn", x)), "__module__", None) == module.__name__
            if name.endswith("_kernel") and own and (module.__name__, name) not in compiled:
                yield f"{module.__name__}.{name}: no case marked aot leads to it, so it was not compiled"


def tables() -> dict[int, tuple[Path, dict[str, Any]]]:
    """By compute capability. Raises ValueError for a file that is no table."""
    paths = sorted(_tuned.FOLDER.glob("sm_*.json"))
    return {int(path.stem.removeprefix("sm_")): (path, _tuned.read(path)) for path in paths}


def table_problems(questions: Sequence[Question]) -> Iterator[str]:
    """Entries that nothing asks for, or that would be ignored; `questions`: all that launchers asked."""
    asked = {(question.kernel, question.key): question for question in questions}
    for path, table in tables().values():
        for kernel, entries in table["kernels"].items():
            for key, entry in entries.items():
                if (kernel, key) not in asked:
                    yield f"{path.name}, {kernel}, {key}: no case asks for it, so it was not compiled"
                    continue
                try:
                    _tuned.check(entry.get("options"), asked[kernel, key], table["shared_bytes"])
                except (AttributeError, ValueError) as error:
                    yield f"{path.name}, {kernel}, {key}: {error}"


def elsewhere(collect: Callable[[], list[J]]) -> Iterator[tuple[J, int]]:
    """What tables of other architectures make of all launches, each for its own, also where HOME's make the same."""
    for capability, (_, table) in tables().items():
        if capability != HOME and any(table["kernels"].values()):
            with patch.object(_tuned, "HOME", capability):
                yield from [(job, capability) for job in collect()]
