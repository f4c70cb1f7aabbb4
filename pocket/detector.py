"""Finds the objects of a pocket picture, and says whether the picture is what a prompt asked for.

Plain image processing: fit the background to the frame, take what differs from it, split that into connected pieces,
and name each by its core colour and the painted outline it is most like. Whatever cannot be named is a fault, and a
picture with a fault is never correct: noise, blur, fragments and two-coloured blobs do not pass.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from .outlines import best_outline, normalise
from .pieces import Piece, pieces
from .scenes import BACKGROUNDS, COLOURS, SIDE, SIZES, Figure, Scene, Spec, broken

Pixels = NDArray[np.float32]  # (h, w, 3), levels 0 to 255
Picture = Image.Image | NDArray[np.uint8]

FRAME = 3  # pixels at the edge that show only background
GROUND_SPREAD = 14.0  # levels a channel may stray from the shading, root mean square; noise of 6 gives 6
GROUND_OFF = 37.0  # levels from a named background; the nearest two are 75 apart
GROUND_LEAST = 0.3  # share of the picture; four large circles leave 0.66
DIFFERS = 45.0  # levels from the background that make a pixel an object's
SPECK = 25  # pixels: smaller pieces are let pass, up to SPECKS in all
SPECKS = 100
FRAGMENT = 140  # pixels, half the smallest object
COLOUR_OFF = 49.0  # levels from a named colour; the nearest two are 99 apart
FADED = 0.5  # weight of the levels an object's colour lacks towards the background: small things lose some in a decoder
FOREIGN = 45.0  # levels off the line from background to core colour
FOREIGN_SHARE = 0.25  # of a piece
CRISP = 0.13  # coverage gained per pixel across an edge: 0.4 / sigma under a Gaussian blur
LIKE = 0.94  # cosine to the best outline; painted ones have 0.965, an ellipse of 1.5 to 1 has 0.92
LEAD = 0.006  # over the next shape; painted ones have 0.03, and 0.0095 under a blur of 2
SIZE_SLACK = 1.2  # how far outside the painted radii a size keeps its name


@dataclass(frozen=True)
class Seen:
    """The scene as found, and what about the picture is not of this world."""

    scene: Scene
    faults: tuple[str, ...]


@dataclass(frozen=True)
class Verdict:
    """True when the picture is correct; otherwise the reasons say what is wrong."""

    reasons: tuple[str, ...]

    def __bool__(self) -> bool:
        return not self.reasons


def check(image: Picture, spec: Spec) -> Verdict:
    """Whether a picture (PIL, or uint8 (h, w, 3)) holds exactly what the spec asks."""
    seen = detect(image)
    return Verdict(seen.faults + broken(seen.scene, spec))


def detect(image: Picture) -> Seen:
    """Objects and background of a picture; one that is not SIDE x SIDE is averaged to that first."""
    pixels = _pixels(image)
    ground, name, faults = _background(pixels)
    offset = pixels - ground
    differs = np.einsum("hwc,hwc->hw", offset, offset) > DIFFERS**2
    if differs.mean() > 1 - GROUND_LEAST or "uneven background" in faults:
        return Seen(Scene((), name), (*faults, "no objects to tell from the background"))
    figures, specks = [], 0
    for piece in pieces(differs):
        if piece.area < SPECK:
            specks += piece.area
            continue
        found = _name(piece, offset[piece.window], ground[piece.window])
        if isinstance(found, Figure):
            figures.append(found)
        else:
            faults.append(found)
    if specks > SPECKS:
        faults.append(f"{specks} stray pixels")
    return Seen(Scene(tuple(figures), name), tuple(faults))


def _pixels(image: Picture) -> Pixels:
    picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
    picture = picture.convert("RGB")
    if picture.size != (SIDE, SIDE):
        picture = picture.resize((SIDE, SIDE), Image.Resampling.BOX)
    return np.asarray(picture, np.float32)


_AXIS = np.linspace(-1, 1, SIDE, dtype=np.float32)
_PLANE = np.stack([np.ones((SIDE, SIDE), np.float32), *np.meshgrid(_AXIS, _AXIS)], -1)  # (h, w, 3): 1, x, y
_IN_FRAME = np.ones((SIDE, SIDE), bool)
_IN_FRAME[FRAME:-FRAME, FRAME:-FRAME] = False
_FRAME_PLANE = _PLANE[_IN_FRAME]
_PALETTE = np.array(list(COLOURS.values()), np.float32)


def _background(pixels: Pixels) -> tuple[Pixels, str | None, list[str]]:
    """(shaded background at every pixel, its name, faults), from the frame without what lies on it."""
    frame = pixels[_IN_FRAME]
    near = np.linalg.norm(frame - np.median(frame, axis=0), axis=1) < DIFFERS
    if near.mean() < 0.8:
        return np.broadcast_to(frame.mean(0), pixels.shape), None, ["uneven background"]
    frame, plane = frame[near], _FRAME_PLANE[near]
    fit = np.linalg.solve(plane.T @ plane, plane.T @ frame)  # (3, 3): rows 1, x, y
    stray = float(np.sqrt(np.mean((frame - plane @ fit) ** 2)))
    faults = ["uneven background"] if stray > GROUND_SPREAD else []
    name = min(BACKGROUNDS, key=lambda name: math.dist(fit[0], BACKGROUNDS[name]))
    if math.dist(fit[0], BACKGROUNDS[name]) > GROUND_OFF:
        return _PLANE @ fit, None, [*faults, "background without a name"]
    return _PLANE @ fit, name, faults


def _colour(core: NDArray[np.float32], ground: NDArray[np.float32]) -> tuple[str, float]:
    """(name, levels off) of the object colour nearest to `core` (3, from the ground), which may be a little faded."""
    named = _PALETTE - ground
    strength = (named @ core) / np.einsum("nc,nc->n", named, named)
    along = (1 - strength) * np.linalg.norm(named, axis=1) * np.where(strength < 1, FADED, 1.0)
    off = np.hypot(along, np.linalg.norm(core - strength[:, None] * named, axis=1))
    best = int(off.argmin())
    return tuple(COLOURS)[best], float(off[best])


def _name(piece: Piece, offset: Pixels, ground: Pixels) -> Figure | str:
    """The object a piece is, or why it is none. `offset` and `ground` are those of its window."""
    row, column = piece.window[0].start, piece.window[1].start
    where = f"at ({column + piece.mask.shape[1] // 2}, {row + piece.mask.shape[0] // 2})"
    if piece.area < FRAGMENT:
        return f"fragment {where}"
    inside = _eroded(piece.mask)
    if inside.sum() < 0.25 * FRAGMENT:
        return f"no solid object {where}"
    core = _core(offset[inside])
    colour, off = _colour(core, ground[inside].mean(0))
    if off > COLOUR_OFF:
        return f"colour without a name {where}"
    coverage = (offset @ core) / float(core @ core)
    if _foreign(offset[inside], coverage[inside], core) > FOREIGN_SHARE:
        return f"more than one colour {where}"
    coverage[piece.others] = 0
    if _crispness(coverage) < CRISP:
        return f"blurred object {where}"
    normal = normalise(((coverage - 0.15) / 0.7).clip(0, 1))  # noise outside and inside is cut off evenly
    if normal is None:
        return f"no solid object {where}"
    outline = best_outline(normal)
    if outline.likeness < LIKE:
        return f"no known shape {where}"
    if outline.lead < LEAD:
        return f"{outline.shape} or another shape {where}"
    figure = Figure(outline.shape, colour, normal.x + column + 0.5, normal.y + row + 0.5, outline.radius, outline.angle)
    least, most = SIZES[figure.size]
    if not least / SIZE_SLACK <= figure.radius <= most * SIZE_SLACK:
        return f"{figure.shape} neither small nor large {where}"
    return figure


def _eroded(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    inside = mask.copy()
    inside[1:] &= mask[:-1]
    inside[:-1] &= mask[1:]
    inside[:, 1:] &= mask[:, :-1]
    inside[:, :-1] &= mask[:, 1:]
    return inside


def _core(offset: Pixels) -> NDArray[np.float32]:
    """The offset (3) of an object's own colour: the median of its pixels furthest from the background."""
    distance = np.einsum("nc,nc->n", offset, offset)
    core: NDArray[np.float32] = np.median(offset[distance >= np.median(distance)], axis=0)
    return core


def _foreign(offset: Pixels, coverage: NDArray[np.float32], core: NDArray[np.float32]) -> float:
    """Share of the pixels that are no mixture of background and core colour."""
    stray = offset - coverage[:, None] * core
    return float(np.mean(np.einsum("nc,nc->n", stray, stray) > FOREIGN**2))


def _crispness(coverage: NDArray[np.float32]) -> float:
    """Median slope of the coverage where an edge runs, per pixel."""
    down, across = np.gradient(coverage)
    edge = np.abs(coverage - 0.5) < 0.25
    return float(np.median(np.hypot(down, across)[edge])) if edge.any() else 1.0
