"""Names an outline: coverage is brought to one centre and scale, then compared with a bank of painted shapes."""

from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from .painter import stencil
from .scenes import SHAPES, Figure

Coverage = NDArray[np.float32]  # (h, w), 0 outside to 1 inside

GRID = 28  # points a side of a normalised outline
SPAN = 2.2  # its half side, in root mean square distances of the coverage from its centre; a triangle's tip is at 2.0
REPEATS = {"circle": 360.0, "square": 90.0, "triangle": 120.0, "star": 72.0, "ring": 360.0, "cross": 90.0}  # degrees
STEP = 8.0  # degrees between bank entries at most
RADII = (12.0, 19.5)
BLURS = (0.0, 1.0, 2.0)  # pixels: soft edges change a small star more than its angle does
_LATTICE = np.linspace(-SPAN, SPAN, GRID, dtype=np.float32)


@dataclass(frozen=True)
class Normal:
    """An outline without place and scale: where it was, how wide, and its unit-length samples (GRID * GRID)."""

    x: float
    y: float
    spread: float  # root mean square distance from the centre, pixels
    samples: NDArray[np.float32]


@dataclass(frozen=True)
class Outline:
    """The bank entry an outline is most like."""

    shape: str
    angle: float  # degrees
    radius: float  # pixels
    likeness: float  # cosine, 1 is identical
    lead: float  # likeness over that of the next shape


def normalise(coverage: Coverage) -> Normal | None:
    """Centre and scale a coverage map (h, w); x and y in its own pixels. None when it is empty."""
    height, width = coverage.shape
    rows, columns = np.arange(height, dtype=np.float32), np.arange(width, dtype=np.float32)
    by_row, by_column = coverage.sum(1), coverage.sum(0)
    mass = float(by_row.sum())
    if mass < 1.0:
        return None
    y, x = float(by_row @ rows) / mass, float(by_column @ columns) / mass
    spread = float(np.sqrt((by_row @ (rows - y) ** 2 + by_column @ (columns - x) ** 2) / mass))
    samples = _sample(coverage, y + spread * _LATTICE, x + spread * _LATTICE).ravel()
    return Normal(x, y, spread, samples / np.linalg.norm(samples))


def _sample(coverage: Coverage, ys: NDArray[np.float32], xs: NDArray[np.float32]) -> Coverage:
    """Bilinear values on the lattice ys x xs, zero outside the map: two small matrix products."""
    return np.asarray(_hats(ys, coverage.shape[0]) @ coverage @ _hats(xs, coverage.shape[1]).T, np.float32)


def _hats(points: NDArray[np.float32], size: int) -> NDArray[np.float32]:
    """(points, size) weights of bilinear interpolation."""
    weights: Coverage = (np.float32(1) - np.abs(points[:, None] - np.arange(size, dtype=np.float32))).clip(0)
    return weights


@cache
def _bank() -> tuple[NDArray[np.float32], list[tuple[str, float, float]], list[int]]:
    """(entries (n, GRID * GRID), of each its shape, angle and radius over spread, where each of SHAPES begins)."""
    rows: list[NDArray[np.float32]] = []
    labels, begins = [], []
    for shape in SHAPES:
        begins.append(len(rows))
        steps = 1 if REPEATS[shape] == 360.0 else int(np.ceil(REPEATS[shape] / STEP))
        for angle in np.arange(steps) * REPEATS[shape] / steps:
            for radius in RADII:
                mask = stencil(Figure(shape, "red", 64.0, 64.0, radius, float(angle)))[0]
                framed = Image.new("L", (mask.width + 16, mask.height + 16))
                framed.paste(mask, (8, 8))
                for blur in BLURS:
                    soft = framed.filter(ImageFilter.GaussianBlur(blur))
                    normal = normalise(np.asarray(soft, np.float32) / np.float32(255))
                    assert normal is not None
                    rows.append(normal.samples)
                    labels.append((shape, float(angle), radius / normal.spread))
    return np.stack(rows), labels, begins


def best_outline(normal: Normal) -> Outline:
    entries, labels, begins = _bank()
    likeness = entries @ normal.samples
    best = int(likeness.argmax())
    next_best, first = np.sort(np.maximum.reduceat(likeness, begins))[-2:].tolist()
    shape, angle, ratio = labels[best]
    return Outline(shape, angle, ratio * normal.spread, first, first - next_best)
