"""What torch's caching allocator would reserve: its rules for segments, played through with numbers in place of memory.

    segments = GrowingSegments()
    block = segments.take(nbytes)
    segments.give(block)
    segments.reserved              # never falls, as a cache that nobody empties

The rules are those of torch's documentation and headers. Blocks are multiples of 512 bytes; up to 1 MiB they are kept
apart from larger ones. The smallest free block that is large enough is taken and split; what is given back joins its
free neighbours. On a card this is an estimate: the order in which streams give memory back is not followed.
"""

from bisect import bisect_left, insort

BLOCK = 512  # bytes: what a size is a multiple of
SMALL, LARGE = 2**20, 10 * 2**20  # up to the first out of a shared small segment, below the second out of a shared one
SMALL_SEGMENT, SHARED_SEGMENT, STEP = 2 * 2**20, 20 * 2**20, 2 * 2**20


def rounded(nbytes: int, step: int = BLOCK) -> int:
    return -(-nbytes // step) * step


class Block:
    """A piece of a segment, between two others or its ends."""

    __slots__ = ("after", "before", "free", "nbytes", "small")

    def __init__(self, nbytes: int, small: bool, before: "Block | None" = None, after: "Block | None" = None) -> None:
        self.nbytes, self.small, self.before, self.after, self.free = nbytes, small, before, after, False


class Segments:
    """torch's default. Small blocks come out of segments of 2 MiB, larger ones out of segments of 20 MiB, or from
    10 MiB on out of one of their own, a multiple of 2 MiB. Blocks of ever larger sizes leave behind what is too small.
    """

    def __init__(self) -> None:
        self.reserved = 0
        self._free: dict[bool, list[tuple[int, int, Block]]] = {True: [], False: []}  # small or not, by size
        self._known = 0  # orders blocks of one size

    def take(self, nbytes: int) -> Block:
        size = rounded(max(nbytes, 1))
        small = size <= SMALL
        block = self._fitting(size, small) or self._segment(size, small)
        return self._cut(block, size, least=BLOCK if small else SMALL + BLOCK)

    def give(self, block: Block) -> None:
        if block.after and block.after.free:
            self._forget(block.after)
            block = self._joined(block, block.after)
        if block.before and block.before.free:
            self._forget(block.before)
            block = self._joined(block.before, block)
        self._keep(block)

    def copy(self) -> "Segments":
        """Others in the same state. What lives there is never given back, so it only keeps free blocks apart."""
        other = type(self)()
        other.reserved = self.reserved
        for *_, block in (*self._free[True], *self._free[False]):
            other._keep(Block(block.nbytes, block.small))
        return other

    def _segment(self, size: int, small: bool) -> Block:
        nbytes = SMALL_SEGMENT if small else SHARED_SEGMENT if size < LARGE else rounded(size, STEP)
        self.reserved += nbytes
        return Block(nbytes, small)

    def _fitting(self, size: int, small: bool) -> Block | None:
        """The smallest free block of at least that size, which is free no more."""
        free = self._free[small]
        at = bisect_left(free, (size,))
        return free.pop(at)[2] if at < len(free) else None

    def _cut(self, block: Block, size: int, least: int) -> Block:
        """The block in use; what it has above the size is free, if it is not less than `least`."""
        block.free = False
        rest = block.nbytes - size
        if rest >= least:
            block.nbytes, behind = size, Block(rest, block.small, block, block.after)
            if block.after:
                block.after.before = behind
            block.after = behind
            self._keep(behind)
        return block

    def _joined(self, block: Block, behind: Block) -> Block:
        block.nbytes, block.after = block.nbytes + behind.nbytes, behind.after
        if behind.after:
            behind.after.before = block
        return block

    def _keep(self, block: Block) -> None:
        block.free, self._known = True, self._known + 1
        insort(self._free[block.small], (block.nbytes, self._known, block))

    def _forget(self, block: Block) -> None:
        """As a free one."""
        free = self._free[block.small]
        at = bisect_left(free, (block.nbytes,))
        while free[at][2] is not block:
            at += 1
        del free[at]


class GrowingSegments(Segments):
    """With `expandable_segments:True`, which `allocator.py` asks for: one segment for small blocks, one for all others.

    They grow at their end by pages of 2 and 20 MiB. What is free before that end is a hole, and taken first.
    """

    def __init__(self) -> None:
        super().__init__()
        self._top: dict[bool, Block | None] = {True: None, False: None}  # the last block in use
        self._tail = {True: 0, False: 0}  # free bytes behind it

    def take(self, nbytes: int) -> Block:
        size = rounded(max(nbytes, 1))
        small = size <= SMALL
        if hole := self._fitting(size, small):
            return self._cut(hole, size, least=BLOCK)
        pages = rounded(max(0, size - self._tail[small]), SMALL_SEGMENT if small else SHARED_SEGMENT)
        self.reserved += pages
        self._tail[small] += pages - size
        below = self._top[small]
        self._top[small] = block = Block(size, small, before=below)
        if below:
            below.after = block
        return block

    def give(self, block: Block) -> None:
        if block is not self._top[block.small]:
            super().give(block)
            return
        below = block.before
        self._tail[block.small] += block.nbytes
        if below and below.free:
            self._forget(below)
            self._tail[block.small] += below.nbytes
            below = below.before
        if below:
            below.after = None
        self._top[block.small] = below

    def copy(self) -> "GrowingSegments":
        other = super().copy()
        other._tail = dict(self._tail)
        return other
