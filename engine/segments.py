"""What torch's caching allocator would reserve: its rules for segments, played through with numbers in place of memory.

    segments = Segments()
    block = segments.take(nbytes)
    segments.give(block)
    segments.reserved              # never falls, as a cache that nobody empties

The rules are those of torch's documentation and headers with its default settings: blocks are multiples of 512 bytes;
up to 1 MiB they come out of segments of 2 MiB; larger ones out of segments of 20 MiB, or from 10 MiB on out of one of
their own, a multiple of 2 MiB. The smallest free block that is large enough is taken and split; what is given back
joins its free neighbours. On a card this is an estimate: the order in which streams give memory back is not followed.
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
    def __init__(self) -> None:
        self.reserved = 0
        self._firsts: list[Block] = []  # of each segment
        self._free: dict[bool, list[tuple[int, int, Block]]] = {True: [], False: []}  # small or not, by size
        self._known = 0  # orders blocks of one size

    def take(self, nbytes: int) -> Block:
        size = rounded(max(nbytes, 1))
        small = size <= SMALL
        free = self._free[small]
        at = bisect_left(free, (size,))
        block = free.pop(at)[2] if at < len(free) else self._segment(size, small)
        block.free = False
        rest = block.nbytes - size
        if rest >= BLOCK if small else rest > SMALL:
            block.nbytes, behind = size, Block(rest, small, block, block.after)
            if block.after:
                block.after.before = behind
            block.after = behind
            self._keep(behind)
        return block

    def give(self, block: Block) -> None:
        if block.after and block.after.free:
            self._forget(block.after)
            block = self._joined(block, block.after)
        if block.before and block.before.free:
            self._forget(block.before)
            block = self._joined(block.before, block)
        self._keep(block)

    def copy(self) -> "Segments":
        """Others in the same state. What lives there is never given back."""
        other = Segments()
        other.reserved = self.reserved
        for block in self._firsts:
            before = None
            while block:
                made = Block(block.nbytes, block.small, before)
                if before:
                    before.after = made
                else:
                    other._firsts.append(made)
                if block.free:
                    other._keep(made)
                before, block = made, block.after
        return other

    def _segment(self, size: int, small: bool) -> Block:
        nbytes = SMALL_SEGMENT if small else SHARED_SEGMENT if size < LARGE else rounded(size, STEP)
        self.reserved += nbytes
        self._firsts.append(Block(nbytes, small))
        return self._firsts[-1]

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
