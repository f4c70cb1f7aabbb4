"""Configurations out of JSON: frozen dataclasses, every field of which is checked before anything is built from it."""

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any

from ..checks import MAX_SIDE, PATCH

_HOLDS: dict[str, Callable[[Any, Any], bool]] = {
    "equal to": operator.eq,
    "a multiple of": lambda a, b: a % b == 0,
    "at most": operator.le,
    "below": operator.lt,
    "twice the sum of": lambda a, b: a == 2 * sum(b),
}

# Fields that families share, and what must hold between them.
BOUNDS: dict[str, tuple[float, float]] = {
    "llm.vocab": (1, 2**22),
    "llm.width": (1, 2**16),
    "llm.layers": (1, 256),
    "llm.heads": (1, 1024),
    "llm.kv_heads": (1, 1024),
    "llm.head_dim": (2, 1024),
    "llm.mlp": (1, 2**20),
    "llm.rope_theta": (1.0, 1e12),
    "llm.norm_eps": (1e-12, 1.0),
    "llm.max_positions": (1, 2**24),
    "vae.base": (1, 4096),
    "vae.multipliers": (1, 64),  # each of them
    "vae.latent": (1, 1024),
    "vae.groups": (1, 1024),
    "vae_scale": (1e-6, 1e6),
    "image_token": (0, 2**22),
    "eos_token": (0, 2**22),
    "repetition_penalty": (0.01, 100.0),
    "resolution": (PATCH, MAX_SIDE),
    "rounds": (1, 10**4),
    "guidance": (0.0, 1000.0),
}
RULES: tuple[tuple[str, str, str | int], ...] = (
    ("llm.width", "equal to", "llm.heads x llm.head_dim"),
    ("llm.heads", "a multiple of", "llm.kv_heads"),
    ("llm.head_dim", "a multiple of", 2),
    ("vae.base", "a multiple of", "vae.groups"),
    ("image_token", "below", "llm.vocab"),
    ("eos_token", "below", "llm.vocab"),
    ("resolution", "a multiple of", PATCH),
)


@dataclass(frozen=True)
class Checks:
    """What a family's fields may be. A field is named by its path from the configuration, as in `llm.width`."""

    parts: dict[str, type]  # the dataclasses inside
    # Smallest and largest value that anybody could mean; where they are floats, whole numbers are fine too.
    bounds: dict[str, tuple[float, float]]
    # What must hold between two fields, or between one and a constant; `x` multiplies. Of a list, for each entry.
    rules: tuple[tuple[str, str, str | int], ...]
    lists: dict[str, tuple[int, int]] = field(default_factory=dict)  # fewest and most entries; `bounds` are of each
    flags: frozenset[str] = frozenset()  # what is true or false

    def build(self, kind: type, data: object) -> Any:
        """The configuration `kind` from a JSON object. Raises ValueError with the value and the rule that it breaks."""
        config = self._built(kind, data, "")
        for path, rule, other in self.rules:
            left, right = _at(config, path), other if type(other) is int else _at(config, str(other))
            if not all(_HOLDS[rule](each, right) for each in (left if type(left) is tuple else (left,))):
                raise ValueError(
                    f"{path} is {left}, which is not {rule} {'' if right == other else f'{other}, '}{right}"
                )
        return config

    def number(self, path: str, value: object) -> Any:
        """`value`, once it is a number that the field `path` can have. Raises ValueError."""
        low, high = self.bounds[path]
        kind, kinds = ("a number", (int, float)) if type(low) is float else ("a whole number", (int,))
        if type(value) not in kinds or not low <= value <= high:
            raise ValueError(f"{path} is {value!r:.80}, which is not {kind} from {low} to {high}")
        return type(low)(value)

    def _built(self, kind: type, data: object, path: str) -> Any:
        """The dataclass `kind` from a JSON object of exactly its fields."""
        names = [field.name for field in fields(kind)]
        if type(data) is not dict or set(data) != set(names):
            given = sorted(map(str, data)) if type(data) is dict else data
            raise ValueError(f"{path.rstrip('.') or 'config'} has {given!r:.200}, which are not the fields {names}")
        return kind(**{name: self._value(path + name, data[name]) for name in names})

    def _value(self, path: str, value: Any) -> Any:
        if path in self.parts:
            return self._built(self.parts[path], value, f"{path}.")
        if path in self.lists:
            few, most = self.lists[path]
            if type(value) not in (list, tuple) or not few <= len(value) <= most:
                count = few if few == most else f"{few} to {most}"
                raise ValueError(f"{path} is {value!r:.80}, which is not a list of {count} numbers")
            return tuple(self.number(path, each) for each in value)
        if path in self.flags:
            if type(value) is not bool:
                raise ValueError(f"{path} is {value!r:.80}, which is not true or false")
            return value
        return self.number(path, value)


def _at(config: object, path: str) -> Any:
    """The field `path`, or the product of several, or of whole numbers."""
    factors = path.split(" x ")
    return math.prod(int(each) if each.isdecimal() else operator.attrgetter(each)(config) for each in factors)
