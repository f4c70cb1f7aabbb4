"""What CUDA graphs would hold on to, found in a dry run: it has this in place of the model's `Graphs`.

Nothing is captured on the meta device. What is run through here runs as always, and its allocations are followed in
segments of their own, as a capture makes them in the graphs' pool. What graphs keep are copies of what they are given
and what they return. Counted is what they have once two pictures of one shape, or two tokens, were made. Whether
segments of such a pool grow depends on the version of torch; here they do not, so a pool may turn out smaller.
"""

import weakref
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor

from .meter import Meter, tensors_in
from .segments import Segments, rounded

ALL = ""  # everything that is captured
T = TypeVar("T")


@dataclass(frozen=True)
class Held:
    """Bytes of the pool, reserved, and of what is kept beside it."""

    pool: int
    kept: int

    @property
    def nbytes(self) -> int:
        return self.pool + self.kept


class ForeseenGraphs:
    def __init__(self, meter: Meter) -> None:
        self.meter = meter
        self._pools: dict[str, Segments] = {ALL: Segments()}
        self._kept: dict[tuple[str, str, Hashable], int] = {}  # by what, whether given or returned, key
        self._copies: dict[int, weakref.ref[Tensor]] = {}  # tensors that would be graphs' own

    def hold(self, what: str, key: Hashable, fresh: T, at_sight: bool = True) -> T:
        self._keep(what, "held", key, fresh)
        return fresh

    def storage(self, what: str, key: Hashable, make: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """It lives, and so counts, as long as what it was made for; nothing is kept beside it."""
        made = make()
        self._copies |= {id(tensor): weakref.ref(tensor) for tensor in made}
        return made

    def may_write(self, x: Tensor) -> bool:
        return self._is_copy(x)

    def run(self, what: str, key: Hashable, function: Callable[..., T], given: tuple[Any, ...], after: int = 2) -> T:
        self._keep(what, "given", key, given)
        with self.meter.followed_by(self._pools[ALL], self._pools.setdefault(what, Segments())):
            result = function(*given)
        self._keep(what, "returned", key, result)
        return result

    def held(self) -> dict[str, Held]:
        """By what is captured: what it would take alone, and all of it under ALL."""
        return {
            what: Held(pool.reserved, sum(n for (by, *_), n in self._kept.items() if what in (by, ALL)))
            for what, pool in self._pools.items()
        }

    def _keep(self, what: str, how: str, key: Hashable, x: Any) -> None:
        fresh = [tensor for tensor in tensors_in(x) if not self._is_copy(tensor)]
        self._kept.setdefault((what, how, key), sum(rounded(t.nbytes) for t in fresh))
        for tensor in fresh:
            self._copies[id(tensor)] = weakref.ref(tensor)

    def _is_copy(self, tensor: Tensor) -> bool:
        known = self._copies.get(id(tensor))
        return known is not None and known() is tensor
