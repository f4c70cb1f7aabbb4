"""Paints a scene: Pillow shapes drawn 8 times too large and averaged down, so that edges are smooth."""

import math

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from .scenes import BACKGROUNDS, COLOURS, SIDE, Figure, Scene

FINE = 8  # drawing scale
RING_HOLE = 0.58  # inner radius over radius
STAR_WAIST = 0.62
CROSS_ARM = (1.15, 0.42)  # half length, half width


def _corners(shape: str) -> list[tuple[float, float]]:
    """Outline in radii, y down, upright."""
    if shape == "square":
        return [(-0.875, -0.875), (0.875, -0.875), (0.875, 0.875), (-0.875, 0.875)]
    if shape == "cross":
        long, wide = CROSS_ARM
        quarter = [(-wide, -long), (wide, -long), (wide, -wide)]
        return [_turn(corner, 90.0 * side) for side in range(4) for corner in quarter]
    if shape == "triangle":
        return [_turn((0.0, -1.3), 120.0 * side) for side in range(3)]
    if shape == "star":
        return [_turn((0.0, -(STAR_WAIST if tip % 2 else 1.3)), 36.0 * tip) for tip in range(10)]
    raise ValueError(f"{shape!r} has no corners")


def _turn(corner: tuple[float, float], degrees: float) -> tuple[float, float]:
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    x, y = corner
    return c * x - s * y, s * x + c * y


def stencil(figure: Figure) -> tuple[Image.Image, tuple[int, int]]:
    """(coverage as mode L, its top left corner in the picture) of one object."""
    left, top = math.floor(figure.x - figure.reach) - 1, math.floor(figure.y - figure.reach) - 1
    span = math.ceil(2 * figure.reach) + 3
    mask = Image.new("L", (span * FINE, span * FINE))
    draw = ImageDraw.Draw(mask)
    x, y = ((figure.x - left) * FINE - 0.5, (figure.y - top) * FINE - 0.5)  # Pillow counts from pixel centres

    def disc(radius: float, value: int) -> None:
        r = radius * figure.radius * FINE
        draw.ellipse((round(x - r), round(y - r), round(x + r), round(y + r)), fill=value)

    if figure.shape == "circle":
        disc(1.0, 255)
    elif figure.shape == "ring":
        disc(1.05, 255)
        disc(RING_HOLE, 0)
    else:
        scale = figure.radius * FINE
        turned = [_turn(corner, figure.angle) for corner in _corners(figure.shape)]
        draw.polygon([(round(x + scale * u), round(y + scale * v)) for u, v in turned], fill=255)
    return mask.reduce(FINE), (left, top)


def _ground(scene: Scene) -> NDArray[np.uint8]:
    colour = np.array(BACKGROUNDS[scene.background or "black"], np.float32)
    ramp = np.linspace(-1, 1, SIDE, dtype=np.float32)
    shade = scene.shade[0] * ramp + scene.shade[1] * ramp[:, None]
    return (colour + shade[..., None]).clip(0, 255).round().astype(np.uint8)


def paint(scene: Scene) -> Image.Image:
    """The scene as an RGB picture, SIDE x SIDE; the same scene always gives the same pixels."""
    image = Image.fromarray(_ground(scene))
    for figure in scene.figures:
        coverage, corner = stencil(figure)
        image.paste(
            COLOURS[figure.colour], (*corner, corner[0] + coverage.width, corner[1] + coverage.height), coverage
        )
    return image
