"""What is stored in fewer bits, as data: a scheme, and the modules it takes by exact names with a wildcard for layers.

int8    ours: int8 weights and activations (quant/int8.py)
bnb8    LLM.int8() of bitsandbytes (arXiv 2208.07339)
nf4     4-bit NormalFloat weights of bitsandbytes (arXiv 2305.14314)
none    as the checkpoint is
"""

from collections.abc import Iterable
from dataclasses import dataclass

SCHEMES = ("none", "int8", "bnb8", "nf4")
LAYER = "*"  # a component of a name that is a layer's number


@dataclass(frozen=True)
class Rotation:
    """The modules around one residual stream, for quant/rotate.py."""

    table: str  # embedding whose rows enter the stream, and whose transpose makes the logits
    writers: tuple[str, ...]  # modules whose outputs enter the stream or are added to it
    readers: tuple[tuple[str, str], ...]  # (RMSNorm of the stream, the linear module that reads it)
    last: str  # the norm in front of the logits
    rows: tuple[str, ...] = ()  # parameters whose rows enter the stream like the table's
    taps: tuple[str, ...] = ()  # linear modules that read it without a norm, one state or several side by side


@dataclass(frozen=True)
class Recipe:
    scheme: str
    modules: tuple[str, ...] = ()
    rotation: Rotation | None = None
    rotated_inputs: tuple[str, ...] = ()  # of the modules in int8, those that rotate their inputs (quant/int8.py)

    def __post_init__(self) -> None:
        if self.scheme not in SCHEMES:
            raise ValueError(f"scheme {self.scheme!r} is none of {', '.join(SCHEMES)}")
        if self.rotated_inputs and self.scheme != "int8":
            raise ValueError(f"only int8 rotates inputs, and {self.rotated_inputs} are to be {self.scheme}")


NONE = Recipe("none")


def recipe_of(
    scheme: str, modules: tuple[str, ...], rotation: Rotation | None, rotated_inputs: tuple[str, ...]
) -> Recipe:
    """A model's recipe for a scheme. bitsandbytes has its own ways with outliers: rotations are for int8 alone.

    Raises ValueError for a scheme that is none.
    """
    if scheme == "none":
        return NONE
    return Recipe(scheme, modules, rotation, rotated_inputs) if scheme == "int8" else Recipe(scheme, modules)


def expand(pattern: str, names: Iterable[str]) -> list[str]:
    """The names that a pattern stands for. Raises ValueError if there is none: a recipe must not silently do less."""
    wanted = pattern.split(".")
    found = [name for name in names if _fits(wanted, name.split("."))]
    if not found:
        raise ValueError(f"no module is called {pattern}, which a recipe names")
    return found


def _fits(wanted: list[str], found: list[str]) -> bool:
    return len(wanted) == len(found) and all(
        b.isdecimal() if a == LAYER else a == b for a, b in zip(wanted, found, strict=True)
    )
