"""One error for everything that is wrong with a set of tensors, not one error a tensor."""

from collections.abc import Sequence

from ..errors import CorruptWeightsError

Shapes = dict[str, tuple[int, ...]]
SHOWN = 20


def refuse_differences(expected: Shapes, found: Shapes, where: str) -> None:
    """Raise CorruptWeightsError if names or shapes differ, listing all of them."""
    shared = [name for name in expected if name in found]
    refuse(
        where,
        missing=[name for name in expected if name not in found],
        unexpected=[name for name in found if name not in expected],
        misshapen=[f"{n} {[*found[n]]}, not {[*expected[n]]}" for n in shared if found[n] != expected[n]],
    )


def refuse(where: str, **problems: Sequence[str]) -> None:
    """Raise CorruptWeightsError naming each kind of problem that has entries."""
    told = [
        f"{len(names)} {kind}: {', '.join(name[:200] for name in names[:SHOWN])}{', ...' if len(names) > SHOWN else ''}"
        for kind, names in problems.items()
        if names
    ]
    if told:
        raise CorruptWeightsError(f"{where} does not fit the model ({'; '.join(told)})", "get this model's own weights")
