"""A picture of memory over time: a panel for each stage, weights below, activations on top, and what may be used.

Time is that of computing: transfers of weights take none of it.
"""

import os
from collections.abc import Sequence
from itertools import groupby

from PIL import Image, ImageDraw, ImageFont

from .estimate import Asked
from .gpus import GIB
from .png_metadata import save_png
from .residency import describe
from .timeline import Moment, timeline

SCALE = 2  # drawn larger and scaled down, for smooth lines
WIDTH, HEIGHT = 1200, 640
LEFT, RIGHT, TOP, BOTTOM = 76, 28, 112, 62
GAP, NARROWEST = 10, 0.15  # pixels between panels; share of the width of the shortest stage
PAPER, INK, FAINT, PANEL = "#ffffff", "#1f2933", "#6b7785", "#f4f6f8"
WEIGHTS, ACTIVATIONS, LIMIT = "#5b8bb5", "#f0a24a", "#c0392b"
STEPS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50)  # GiB between two lines


def save_plot(asked: Asked, path: str | os.PathLike[str], overwrite: bool = False) -> None:
    """Draw what is asked to a PNG. Raises BudgetError, OutputError."""
    placement, how = asked.placement(), asked.settings()
    bits = how["dtype"] if how["quant"] == "none" else how["quant"]
    title = f"{how['model']} {how['task']} {how['res']}x{how['res']} in {bits} on {how['gpu']}"
    image = draw(
        [*timeline(asked, placement)], title, f"predicted, not measured: {describe(placement)}", placement.budget
    )
    save_png(image, path, overwrite=overwrite)


def draw(moments: Sequence[Moment], title: str, subtitle: str, budget: int) -> Image.Image:
    """`budget`: bytes that weights and activations may take together."""
    stages = [(name, list(group)) for name, group in groupby(moments, key=lambda moment: moment.stage)]
    peak = max(moment.weights + moment.activations for moment in moments)
    top = 1.06 * (budget if budget < 1.8 * peak else peak)
    image = Image.new("RGB", (WIDTH * SCALE, HEIGHT * SCALE), PAPER)
    pen = Pen(image)
    pen.text(LEFT, 22, title, 21, INK)
    pen.text(LEFT, 52, subtitle, 14, FAINT)
    legend(pen, budget, shown=budget <= top)
    lows, highs = TOP, HEIGHT - BOTTOM

    def level(nbytes: float) -> float:
        return highs - (highs - lows) * nbytes / top

    for (name, group), (start, end) in zip(stages, panels([seconds(group) for _, group in stages]), strict=True):
        pen.box(start, lows, end, highs, PANEL)
        for x, weights, activations in columns(group, start, end):
            pen.box(x, level(weights), x + 1 / SCALE, highs, WEIGHTS)
            pen.box(x, level(weights + activations), x + 1 / SCALE, level(weights), ACTIVATIONS)
        most = max(moment.weights + moment.activations for moment in group)
        pen.text((start + end) / 2, highs + 10, name, 15, INK, "ma")
        pen.text((start + end) / 2, highs + 31, f"{spoken(seconds(group))}, {most / GIB:.2f} GiB", 13, FAINT, "ma")
    step = next((step for step in STEPS if top / GIB / step <= 8), STEPS[-1])
    for index in range(int(top / GIB / step) + 1):
        y = level(index * step * GIB)
        pen.line(LEFT - 6, y, WIDTH - RIGHT, y, "#d5dbe1" if index else INK)
        pen.text(LEFT - 12, y, f"{index * step:g}", 13, FAINT, "rm")
    pen.text(LEFT - 12, lows - 7, "GiB", 13, FAINT, "rm")
    if budget <= top:
        for x in range(LEFT, WIDTH - RIGHT, 12):
            pen.line(x, level(budget), min(x + 7, WIDTH - RIGHT), level(budget), LIMIT, 2)
    return image.resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS)


def legend(pen: "Pen", budget: int, shown: bool) -> None:
    x, y = LEFT, 89
    for color, words in ((WEIGHTS, "weights on the card"), (ACTIVATIONS, "activations")):
        pen.box(x, y - 6, x + 12, y + 6, color)
        x = pen.text(x + 19, y, words, 13, INK, "lm") + 26
    if shown:
        pen.line(x, y, x + 16, y, LIMIT, 2)
    beyond = "" if shown else ", above this picture"
    pen.text(x + (23 if shown else 0), y, f"may be used: {budget / GIB:.1f} GiB{beyond}", 13, INK, "lm")


def panels(lengths: Sequence[float]) -> list[tuple[int, int]]:
    """Left and right of each: as wide as its stage takes long, but never too narrow to be seen."""
    room = WIDTH - LEFT - RIGHT - GAP * (len(lengths) - 1)
    least = [max(length / sum(lengths), NARROWEST) for length in lengths]
    over, spare = sum(least) - 1, sum(share - NARROWEST for share in least)
    shares = [share - over * (share - NARROWEST) / spare if spare else 1 / len(least) for share in least]
    found, x = [], LEFT
    for share in shares:
        found.append((round(x), round(x + share * room)))
        x += share * room + GAP
    return found


def columns(moments: Sequence[Moment], start: int, end: int) -> list[tuple[float, int, int]]:
    """(x, weights, activations) of every column of pixels: the most of all moments in it."""
    count, whole, passed = (end - start) * SCALE, seconds(moments), 0.0
    most = [0] * count
    for moment in moments:
        first = min(count - 1, int(count * passed / whole))
        passed += moment.seconds
        for column in range(first, min(count, int(count * passed / whole) + 1)):
            most[column] = max(most[column], moment.activations)
    return [(start + index / SCALE, moments[0].weights, activations) for index, activations in enumerate(most)]


def seconds(moments: Sequence[Moment]) -> float:
    return sum(moment.seconds for moment in moments) or 1e-9


def spoken(time: float) -> str:
    return f"{time:.1f} s" if time >= 1 else f"{1000 * time:.0f} ms"


class Pen:
    """Draws in final pixels."""

    def __init__(self, image: Image.Image) -> None:
        self.draw = ImageDraw.Draw(image)

    def box(self, left: float, upper: float, right: float, lower: float, color: str) -> None:
        x, y, x2, y2 = (round(SCALE * edge) for edge in (left, upper, right, lower))
        if x2 > x and y2 > y:
            self.draw.rectangle((x, y, x2 - 1, y2 - 1), fill=color)

    def line(self, x: float, y: float, x2: float, y2: float, color: str, width: int = 1) -> None:
        self.draw.line([round(SCALE * edge) for edge in (x, y, x2, y2)], fill=color, width=width * SCALE)

    def text(self, x: float, y: float, words: str, size: int, color: str, anchor: str = "la") -> float:
        """Returns its right end."""
        font = ImageFont.load_default(size * SCALE)
        self.draw.text((SCALE * x, SCALE * y), words, fill=color, font=font, anchor=anchor)
        return x + font.getlength(words) / SCALE
