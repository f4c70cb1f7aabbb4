"""Rules that the values of a request keep, one function each; a broken one is a UsageError."""

from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from typing import Any

from .errors import UsageError

PATCH = 16  # pixels per latent token side, the same for every supported VAE
MAX_SIDE = 16384  # beyond this a size is a typing error; the model's context is checked separately


def check_size(width: int, height: int) -> None:
    check_side("width", width)
    check_side("height", height)


def check_side(name: str, side: int) -> None:
    """A positive multiple of 16, and not absurd."""
    check_whole(name, side, PATCH, MAX_SIDE)
    if side % PATCH:
        below = side // PATCH * PATCH
        raise UsageError(f"{name} {side} is not a multiple of {PATCH}", f"use {below} or {below + PATCH}")


def check_known(options: Mapping[str, Any], allowed: Any, *more: str) -> None:
    known = [*more, *allowed.__annotations__]
    for name in options:
        if name not in known:
            raise UsageError(f"option {name!r} is unknown", f"known are {', '.join(known)}")


def as_plain(value: Any) -> Any:
    """numpy's numbers as Python's, which neither overflow nor trouble JSON."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return value
    return int(value) if isinstance(value, Integral) else float(value)


def as_numbers(name: str, value: Any, count: int, wanted: str) -> Any:
    value = value.tolist() if hasattr(value, "tolist") else value  # an array's numbers, as Python's
    if isinstance(value, str) or not isinstance(value, Sequence) or len(value) != count:
        raise UsageError(f"{name} {value!r} does not have {count} numbers", f"give {wanted}")
    return tuple(map(as_plain, value))


def check_whole(name: str, value: object, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, Integral):  # numpy's integers are welcome
        raise UsageError(f"{name} {value!r} is not a whole number", f"use {low} to {high}")
    if not low <= value <= high:
        raise UsageError(f"{name} {value} is out of range", f"use {low} to {high}")


def check_number(name: str, value: object, low: float, high: float) -> None:
    good = isinstance(value, Real) and not isinstance(value, bool)  # numpy's are
    if not (good and low <= value <= high):  # which nan is not
        raise UsageError(f"{name} {value!r} is not a number from {low:g} to {high:g}", "choose one in that range")


def check_text(name: str, value: object) -> None:
    if not isinstance(value, str):
        raise UsageError(f"{name} is {type(value).__name__}, not text", "pass a string")
    if not value.strip():
        raise UsageError(f"the {name} is empty", "write what you want")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise UsageError(f"the {name} is not valid Unicode", "retype it") from None
    if "\0" in value:  # of text in UTF-16, most likely
        raise UsageError(f"the {name} holds a null character", "retype it, or save its file as UTF-8")


def check_function(name: str, value: object) -> None:
    if value is not None and not callable(value):
        raise UsageError(f"{name} is {type(value).__name__}, not a function", f"pass a function, or leave {name} out")


def check_one_of(name: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise UsageError(f"{name} {value!r} is unknown", f"choose from {', '.join(allowed)}")
