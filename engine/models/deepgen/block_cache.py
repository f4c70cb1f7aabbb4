"""Steps of the diffusion transformer that reuse what an earlier one made of all blocks but the first.

The first-block cache of ParaAttention (github.com/chengzeyi/ParaAttention): the first block runs in every step, and
what it adds to the noisy tokens is compared with what it added when the others ran last,

    moved = mean |now - then| / mean |then|

Where that is below a threshold, the others would add nearly what they added then, and that is taken. Every row decides
for itself: what a picture becomes depends neither on its neighbours in a batch nor on whether guidance rows run side by
side. What is kept of a row is what the first block added and what all others did, of the noisy tokens alone, as only
those come out of the last block.

The comparison comes to the host, one number a row and one wait for all of them: the card has nothing to do from the end
of the first block until the next launch reaches it. Letters as in mmdit.py.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...graphs import Graphs
from .mmdit import MMDiT

# In a row, of one row's steps: DBCache bounds it by 2 to 4 (github.com/vipshop/cache-dit).
MOST_REUSED = 3
# What a dry run takes `moved` for, since it has no numbers: any threshold below 1 reuses nothing, 1 all that may be.
UNKNOWN = 1 - 2**-20


@dataclass
class Kept:
    first: Tensor  # (n, D) what the first block added when the others ran last
    rest: Tensor  # (n, D) what they added then
    reused: int = 0  # times since


class BlockCache:
    """Of one group of pictures, by the number of the row."""

    def __init__(self, dit: MMDiT, graphs: Graphs, threshold: float) -> None:
        self.dit, self.graphs, self.threshold = dit, graphs, threshold
        self.kept: dict[int, Kept] = {}

    def velocity(
        self, begin: int, latents: Tensor, context: Tensor, modulation: Tensor, references: Tensor | None
    ) -> Tensor:
        """As `MMDiT.forward` has it, of the rows whose numbers begin with `begin`."""
        image, text, first = self.run("first", self.dit.first, latents, context, modulation, references)
        noisy, rows = first.shape[1], range(begin, begin + len(context))
        reused = self.reusable(rows, first)
        made = {row: image[row - begin, :noisy] + self.kept[row].rest for row in reused}
        if stale := [row for row in rows if row not in reused]:
            now = {row: first[row - begin].clone() for row in stale}
            del first  # what is not needed any more goes before the others run
            for row in stale:
                self.kept.pop(row, None)
            given = (some(x, [row - begin for row in stale], len(context)) for x in (image, text, modulation))
            out, rest = self.run("rest", self.dit.rest, *given, noisy)
            self.kept |= {row: Kept(now[row], added.clone()) for row, added in zip(stale, rest, strict=True)}
            made |= zip(stale, out, strict=True)
        x = torch.stack([made[row] for row in rows])
        return self.dit.velocity(x, modulation, *latents.shape[2:])

    def reusable(self, rows: Sequence[int], first: Tensor) -> list[int]:
        """The rows, of which first block's additions (R, n, D) are given, that need no others; counts them."""
        known = [row for row in rows if row in self.kept and self.kept[row].reused < MOST_REUSED]
        if not known:
            return []
        moved = torch.stack([relative_change(first[row - rows[0]], self.kept[row].first) for row in known])
        numbers = [UNKNOWN] * len(known) if moved.is_meta else moved.tolist()
        found = [row for row, number in zip(known, numbers, strict=True) if number < self.threshold]
        for row in found:
            self.kept[row].reused += 1
        return found

    def run(self, what: str, function: Callable[..., tuple[Tensor, ...]], *given: Tensor | int | None) -> tuple:
        key = what, *(tuple(x.shape) if isinstance(x, Tensor) else x for x in given)
        return self.graphs.run("round", key, function, given)


def relative_change(now: Tensor, then: Tensor) -> Tensor:
    """mean |now - then| / mean |then|, () float32."""
    norm, whole = torch.linalg.vector_norm, torch.float32
    return norm(now - then, 1, dtype=whole) / norm(then, 1, dtype=whole)


def some(x: Tensor, rows: Sequence[int], of: int) -> Tensor:
    """These of `of` rows, each row of x (K, ...) being that of as many; all of them as they are."""
    if len(rows) == of:
        return x
    return torch.stack([x[row // (of // len(x))] for row in rows])
