"""Work that costs the same for equal shapes, done once in a dry run and counted every time."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from ..quant.recipe import expand
from .kv_cache import KVCache
from .meter import Meter, Span, tensors_in


@dataclass(frozen=True)
class Mould:
    """A tensor's form: `of` is the argument whose memory it shares, or -1."""

    of: int
    room: int  # elements of its storage
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    @classmethod
    def taken(cls, x: Tensor, given: Sequence[Tensor]) -> "Mould":
        memory = x.untyped_storage()
        shares = (i for i, other in enumerate(given) if other.untyped_storage()._cdata == memory._cdata)
        form = tuple(x.shape), tuple(x.stride()), x.storage_offset()
        return cls(next(shares, -1), memory.nbytes() // x.element_size(), x.dtype, *form)

    def blank(self, given: Sequence[Tensor]) -> Tensor:
        if self.of >= 0:
            return given[self.of].as_strided(self.shape, self.stride, self.offset)
        if self.room == prod(self.shape):
            return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device="meta")
        room = torch.empty(self.room, dtype=self.dtype, device="meta")
        return room.as_strided(self.shape, self.stride, self.offset)


@contextmanager
def once(meter: Meter, model: nn.Module, repeated: Sequence[tuple[str, str]]) -> Iterator[None]:
    """Inside, calls of these methods with equal shapes run once and are counted every time.

    `repeated`: (modules, method), names of modules with `*` for a number. A method returns a tensor, several or
    nothing. Whole numbers that `partial` binds to a function among its arguments, such as a layer's, do not tell calls
    apart: no cost may depend on them.
    """
    known: dict[Any, tuple[Span, Any]] = {}
    wrapped: list[tuple[nn.Module, str]] = []
    names = [name for name, _ in model.named_modules()]
    try:
        for pattern, method in repeated:
            for owner in map(model.get_submodule, expand(pattern, names)):
                run = getattr(owner, method)
                setattr(owner, method, partial(_counted, meter, known, (form(owner), method), run))
                wrapped.append((owner, method))
        yield
    finally:
        for owner, method in wrapped:
            delattr(owner, method)


def _counted(
    meter: Meter,
    known: dict[Any, tuple[Span, Any]],
    who: Any,
    run: Callable[..., Any],
    *given: Any,
    **named: Any,
) -> Any:
    key = meter.stage, who, outline(given), outline(tuple(sorted(named.items())))
    tensors = list(tensors_in(given))
    if key not in known:
        result, span = meter.span(lambda: run(*given, **named))
        known[key] = span, taken(result, tensors)
        return result
    span, mould = known[key]
    meter.repeat(span)
    return blank(mould, tensors)


def taken(result: Any, given: Sequence[Tensor]) -> Any:
    """The mould of a tensor, those of several, or nothing of nothing."""
    if isinstance(result, tuple):
        return tuple(taken(one, given) for one in result)
    return None if result is None else Mould.taken(result, given)


def blank(mould: Any, given: Sequence[Tensor]) -> Any:
    if isinstance(mould, tuple):
        return tuple(blank(one, given) for one in mould)
    return None if mould is None else mould.blank(given)


def form(module: nn.Module) -> Any:
    """A module without the values of its tensors."""
    return tuple((type(part), *map(tuple, own(part))) for part in module.modules())


def own(module: nn.Module) -> Iterator[Iterator[Any]]:
    """What a module has itself: the forms of its tensors, and plain values."""
    tensors = (*module._parameters.items(), *module._buffers.items())
    yield ((name, x.shape, x.dtype) for name, x in tensors if x is not None)
    yield ((name, x) for name, x in vars(module).items() if isinstance(x, int | float | str))


def outline(x: Any) -> Any:
    """An argument without the values of its tensors."""
    if isinstance(x, Tensor):
        return tuple(x.shape), tuple(x.stride()), x.dtype
    if isinstance(x, KVCache):
        return x.own, outline(x.keys), outline(x.base)
    if isinstance(x, partial):
        return x.func, outline(tuple(y for y in x.args if not isinstance(y, int))), outline(tuple(x.keywords.items()))
    if is_dataclass(x):
        return type(x), outline(tuple(getattr(x, field.name) for field in fields(x)))
    return tuple(map(outline, x)) if isinstance(x, tuple) else x
