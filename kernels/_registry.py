"""Every operator with its cases and its reference, found by name: a new kernel file needs no list to be added to.

`x_cases()` is for the operator `x`, and for those of the same file that take the same arguments and have no cases of
their own (as `norm_cases` is for `norm` and `norm_int8`), unless a case names its operators. The reference of `x_y`
is `x_y_ref`, else `x_ref`.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from ._op import OPERATORS, Case, Operator


@dataclass(frozen=True)
class Check:
    """One operator on one case."""

    operator: Operator
    case: Case
    reference: Callable[..., Any] | None  # takes the operator's arguments

    def __str__(self) -> str:
        return f"{self.operator.name}: {self.case.why}"


def kernel_modules() -> list[ModuleType]:
    """Every file of this folder, imported; names that begin with _ hold no operators."""
    stems = sorted(path.stem for path in Path(__file__).parent.glob("[!_]*.py"))
    return [import_module(f".{stem}", __package__) for stem in stems]


def checks(mark: str, modules: Iterable[ModuleType] | None = None) -> list[Check]:
    """What there is to check where `mark` (interp, aot, gpu) says so; `modules` are all of them by default."""
    found = (check for module in (kernel_modules() if modules is None else modules) for check in _of(module))
    return [check for check in found if mark in check.case.marks.split()]


def _of(module: ModuleType) -> Iterator[Check]:
    own = {name: x for name, x in vars(module).items() if getattr(x, "__module__", None) == module.__name__}
    operators = [x for x in OPERATORS.values() if x.triton.__module__ == module.__name__]
    for name in [name for name in own if name.endswith("_cases")]:
        whom = [x for x in operators if _speaks_for(name.removesuffix("_cases"), x, own)]
        for case in own[name]():
            named = [OPERATORS[f"unipic::{operator}"] for operator in case.operators.split()]
            if not named and not whom:
                raise ValueError(f"{module.__name__}.{name}: no operator of that name, and {case.why!r} names none")
            yield from (Check(operator, case, _reference(own, operator.name)) for operator in named or whom)


def _speaks_for(name: str, operator: Operator, own: dict[str, Any]) -> bool:
    first = OPERATORS.get(f"unipic::{name}")
    if operator is first or first is None:
        return operator is first
    return f"{operator.name}_cases" not in own and _arguments(operator) == _arguments(first)


def _arguments(operator: Operator) -> str:
    return str(operator.op.default._schema).partition("(")[2].rpartition(" -> ")[0]


def _reference(own: dict[str, Any], name: str) -> Callable[..., Any] | None:
    while name and f"{name}_ref" not in own:
        name = name.rpartition("_")[0]
    return own.get(f"{name}_ref")
