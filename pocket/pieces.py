"""Connected pieces of a mask, by runs: a picture has a few hundred runs, so plain Python keeps up."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

MARGIN = 2  # pixels around a piece in its window


@dataclass(frozen=True)
class Piece:
    """One 4-connected piece: its pixels, and the window (rows, columns) of the picture it lies in, with a margin."""

    area: int
    window: tuple[slice, slice]
    mask: NDArray[np.bool_]  # the piece in its window
    others: NDArray[np.bool_]  # pixels of other pieces in its window


def _runs(mask: NDArray[np.bool_]) -> list[tuple[int, int, int]]:
    """(row, start, end) of every horizontal run, in reading order."""
    height, width = mask.shape
    padded = np.zeros((height, width + 2), np.int8)
    padded[:, 1:-1] = mask
    step = np.diff(padded, axis=1)
    rows, starts = np.nonzero(step == 1)
    ends = np.nonzero(step == -1)[1]
    return list(zip(rows.tolist(), starts.tolist(), ends.tolist(), strict=True))


def _roots(runs: list[tuple[int, int, int]]) -> list[int]:
    """For each run the first run of its piece (union-find over runs that touch in neighbouring rows)."""
    parent = list(range(len(runs)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    above = 0  # runs before it end too early to touch the current one or any later one
    for i, (row, start, end) in enumerate(runs):
        while above < i and (runs[above][0] < row - 1 or (runs[above][0] == row - 1 and runs[above][2] <= start)):
            above += 1
        j = above
        while j < i and runs[j][0] == row - 1 and runs[j][1] < end:
            low, high = sorted((root(i), root(j)))
            parent[high] = low
            j += 1
    return [root(i) for i in range(len(runs))]


def pieces(mask: NDArray[np.bool_]) -> list[Piece]:
    """All pieces of a mask (H, W), the ones nearest the top first."""
    runs = _runs(mask)
    members: dict[int, list[tuple[int, int, int]]] = {}
    for run, root in zip(runs, _roots(runs), strict=True):
        members.setdefault(root, []).append(run)
    return [_piece(mask, own) for own in members.values()]


def _piece(mask: NDArray[np.bool_], runs: list[tuple[int, int, int]]) -> Piece:
    height, width = mask.shape
    top, bottom = max(runs[0][0] - MARGIN, 0), min(runs[-1][0] + 1 + MARGIN, height)
    left = max(min(start for _, start, _ in runs) - MARGIN, 0)
    right = min(max(end for _, _, end in runs) + MARGIN, width)
    own = np.zeros((bottom - top, right - left), bool)
    for row, start, end in runs:
        own[row - top, start - left : end - left] = True
    window = (slice(top, bottom), slice(left, right))
    return Piece(sum(end - start for _, start, end in runs), window, own, mask[window] & ~own)
