"""From a spec to one of the many scenes that meet it: free attributes drawn, objects placed without touching.

Pictures of a prompt are composed: objects whose places it does not say stand where `COMPOSITIONS` puts as many of them,
in the order of the spec's groups, and sizes it does not say follow from the number. Colours, backgrounds, and a little
of place, size, angle and shading are free. So a small model can learn what a prompt looks like, which it could not if
an object might stand anywhere. Scenes of edits and questions are not composed: there the picture is given.
"""

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
TURN = 6.0  # degrees either way
SHADE = 3.0  # levels either way
TRIES = 40

Cell = tuple[int, int]
Cells = Sequence[Cell]
EVERYWHERE: Cells = tuple(PLACES.values())
COMPOSITIONS = {
    1: ("middle",),
    2: ("left", "right"),
    3: ("top", "bottom left", "bottom right"),
    4: ("top left", "top right", "bottom left", "bottom right"),
}
IN_LINE = {1: (1,), 2: (0, 2), 3: (0, 1, 2)}  # places of so many objects on one side of a relation
FEW = 2  # objects that are large where nothing is said


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
        x = min(max(_between(left, right, across), least), most)
        y = min(max(_between(top, bottom, down), least), most)
        if apart(x, y, reach, others):
            return replace(figure, x=x, y=y)
    return None


def _between(low: float, high: float, share: float) -> float:
    return low + share * (high - low)


def draw(rng: Generator, shape: str, colour: str, size: str) -> Figure:
    """An object of that look, its radius and angle drawn, not placed yet."""
    return Figure(shape, colour, 0.0, 0.0, float(rng.uniform(*SIZES[size])), float(rng.uniform(-TURN, TURN)))


def complete(rng: Generator, group: Group, size: str | None) -> tuple[str, str, str]:
    """(shape, colour, size) of a group, what it leaves out drawn once for all its objects; `size` where it has none."""
    return (
        group.shape or pick(rng, SHAPES),
        group.colour or pick(rng, tuple(COLOURS)),
        group.size or size or pick(rng, tuple(SIZES)),
    )


def composed(spec: Spec) -> list[Cells]:
    """The cell of each object, in the order of the groups."""
    if spec.relation is not None:
        axis, direction = RELATIONS[spec.relation]
        sides = (0, 2) if direction < 0 else (2, 0)
        cells = [(side, at) for side, group in zip(sides, spec.groups, strict=True) for at in IN_LINE[group.count]]
        return [[cell if axis == 0 else cell[::-1]] for cell in cells]
    said = [group.place and PLACES[group.place] for group in spec.groups for _ in range(group.count)]
    free = iter([cell for name in COMPOSITIONS[spec.total] if (cell := PLACES[name]) not in said])
    return [[place or next(free)] for place in said]


def anywhere(spec: Spec, rng: Generator) -> list[Cells]:
    """The cells in which each object may stand: all, but for places and relations that are said."""
    sides: Sequence[Cells] = [EVERYWHERE] * len(spec.groups)
    if spec.relation is not None:
        axis, direction = RELATIONS[spec.relation]
        low, high = [((0,), (2,)), ((0,), (1, 2)), ((0, 1), (2,))][int(rng.integers(3))]
        low, high = (high, low) if direction > 0 else (low, high)
        sides = [[c for c in EVERYWHERE if c[axis] in side] for side in (low, high)]
    pairs = zip(spec.groups, sides, strict=True)
    return [[PLACES[g.place]] if g.place else cells for g, cells in pairs for _ in range(g.count)]


def _attempt(spec: Spec, rng: Generator, compose: bool) -> tuple[Figure, ...] | None:
    size = ("large" if spec.total <= FEW else "small") if compose else None
    looks = [look for group in spec.groups for look in [complete(rng, group, size)] * group.count]
    figures: list[Figure] = []
    for look, cells in zip(looks, composed(spec) if compose else anywhere(spec, rng), strict=True):
        figure = settle(rng, draw(rng, *look), cells, figures)
        if figure is None:
            return None
        figures.append(figure)
    return tuple(figures)


def lay_out(spec: Spec, rng: Generator, compose: bool) -> Scene | None:
    """A scene that meets the spec, composed or not; None when its objects do not fit (four large stars in a row, say).

    Where a composition does not fit what is said, the objects stand anywhere.
    """
    for attempt in range(TRIES):
        figures = _attempt(spec, rng, compose and attempt < TRIES // 2)
        if figures is not None:
            shade = (float(rng.uniform(-SHADE, SHADE)), float(rng.uniform(-SHADE, SHADE)))
            return Scene(figures, spec.background or pick(rng, tuple(BACKGROUNDS)), shade)
    return None
