"""From a spec to one of the many scenes that meet it: free attributes drawn, objects placed without touching."""

from collections.abc import Sequence
from dataclasses import replace

from numpy.random import Generator

from .scenes import (
    BACKGROUNDS,
    BANDS,
    COLOURS,
    PLACES,
    RELATIONS,
    SHAPES,
    SIDE,
    SIZES,
    Figure,
    Group,
    Scene,
    Spec,
)

EDGE = 4.0  # pixels kept clear around the picture: the detector reads the background there
GAP = 7.0  # pixels between two objects: blur must not join them
TURN = 15.0  # degrees either way
SHADE = 5.0  # levels either way
TRIES = 40

Cells = Sequence[tuple[int, int]]
EVERYWHERE: Cells = tuple(PLACES.values())


def pick(rng: Generator, options: Sequence[str]) -> str:
    return options[int(rng.integers(len(options)))]


def apart(x: float, y: float, reach: float, others: Sequence[Figure]) -> bool:
    """Whether an object of that reach keeps its distance there."""
    return all((x - o.x) ** 2 + (y - o.y) ** 2 >= (reach + o.reach + GAP) ** 2 for o in others)


def clear(figure: Figure, others: Sequence[Figure]) -> bool:
    """Whether an object keeps its distance from the others and from the edge."""
    least, most = figure.reach + EDGE, SIDE - figure.reach - EDGE
    inside = least <= figure.x <= most and least <= figure.y <= most
    return inside and apart(figure.x, figure.y, figure.reach, others)


def settle(rng: Generator, figure: Figure, cells: Cells, others: Sequence[Figure]) -> Figure | None:
    """The object moved to a clear spot in one of the cells; None when none was found."""
    reach = figure.reach
    least, most = reach + EDGE, SIDE - reach - EDGE
    for cell, across, down in zip(rng.integers(len(cells), size=8), *rng.random((2, 8)).tolist(), strict=True):
        (left, right), (top, bottom) = (BANDS[i] for i in cells[cell])
        x = _between(max(left, least), min(right, most), across)
        y = _between(max(top, least), min(bottom, most), down)
        if apart(x, y, reach, others):
            return replace(figure, x=x, y=y)
    return None


def _between(low: float, high: float, share: float) -> float:
    return low + share * (high - low)


def draw(rng: Generator, shape: str, colour: str, size: str) -> Figure:
    """An object of that look, its radius and angle drawn, not placed yet."""
    return Figure(shape, colour, 0.0, 0.0, float(rng.uniform(*SIZES[size])), float(rng.uniform(-TURN, TURN)))


def complete(rng: Generator, group: Group) -> tuple[str, str, str]:
    """(shape, colour, size) of a group, what it leaves out drawn once for all its objects."""
    return (
        group.shape or pick(rng, SHAPES),
        group.colour or pick(rng, tuple(COLOURS)),
        group.size or pick(rng, tuple(SIZES)),
    )


def _sides(rng: Generator, relation: str) -> tuple[Cells, Cells]:
    """Cells for the two groups of a relation: whole columns (rows) that lie on the right sides of each other."""
    axis, direction = RELATIONS[relation]
    low, high = [((0,), (2,)), ((0,), (1, 2)), ((0, 1), (2,))][int(rng.integers(3))]
    if direction > 0:
        low, high = high, low
    return [c for c in EVERYWHERE if c[axis] in low], [c for c in EVERYWHERE if c[axis] in high]


def _attempt(spec: Spec, rng: Generator) -> tuple[Figure, ...] | None:
    sides: Sequence[Cells] = [EVERYWHERE] * len(spec.groups)
    if spec.relation is not None:
        sides = _sides(rng, spec.relation)
    figures: list[Figure] = []
    for group, cells in zip(spec.groups, sides, strict=True):
        shape, colour, size = complete(rng, group)
        if group.place is not None:
            cells = [PLACES[group.place]]
        for _ in range(group.count):
            figure = settle(rng, draw(rng, shape, colour, size), cells, figures)
            if figure is None:
                return None
            figures.append(figure)
    return tuple(figures)


def lay_out(spec: Spec, rng: Generator) -> Scene | None:
    """A scene that meets the spec; None when its objects do not fit (four large stars in one row, say)."""
    for _ in range(TRIES):
        figures = _attempt(spec, rng)
        if figures is not None:
            shade = (float(rng.uniform(-SHADE, SHADE)), float(rng.uniform(-SHADE, SHADE)))
            return Scene(figures, spec.background or pick(rng, tuple(BACKGROUNDS)), shade)
    return None
