"""Quality against predicted time, of results of bench/shortcuts.py, as a picture; the first that has a way tells of it.

python bench/frontier.py bench/results/shortcuts-presets-DATE.json bench/results/shortcuts-DATE.json docs/speed.png

Seconds are predicted anew: a result has those of its day.
"""

import argparse
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from unipic_run.bench.checkout import require_this_checkout
from unipic_run.bench.shortcuts import WAYS, predicted
from unipic_run.engine.plot import FAINT, INK, PANEL, PAPER, SCALE, Pen
from unipic_run.engine.png_metadata import save_png

WIDTH, HEIGHT = 1000, 620
LEFT, RIGHT, TOP, BOTTOM = 70, 360, 92, 60  # the names are to the right
FLOOR = HEIGHT - BOTTOM
KNOB, PRESET, CONTROL, LINE = "#5b8bb5", "#f0a24a", "#9aa5b1", "#d5dbe1"
DOT = 4
APART = 9  # pixels between two dots
Row = Mapping[str, Any]


def main(arguments: list[str] | None = None) -> int:
    require_this_checkout(__file__)
    parser = argparse.ArgumentParser(prog="frontier", description="Draws a result of bench/shortcuts.py.")
    parser.add_argument("results", type=Path, nargs="+")
    parser.add_argument("png", type=Path)
    options = parser.parse_args(arguments)
    results = [json.loads(path.read_text(encoding="utf-8")) for path in options.results]
    save_png(draw(results), options.png, overwrite=True)
    print(options.png)
    return 0


@dataclass(frozen=True)
class Scales:
    """Where seconds, up to `end`, and points, from `low` to `high`, are in the picture."""

    end: float
    low: int
    high: int

    def across(self, seconds: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * seconds / self.end

    def up(self, points: float) -> float:
        return FLOOR - (FLOOR - TOP) * (points - self.low) / (self.high - self.low)


def draw(results: Sequence[Mapping[str, Any]]) -> Image.Image:
    """Every way is a numbered dot with the interval of its loss, from the cheapest on; names beside."""
    found: dict[str, Row] = {name: row for result in reversed(results) for name, row in result["ways"].items()}
    found = {name: {**row, "predicted": predicted(WAYS[name])} for name, row in found.items()}
    ways = sorted(found.items(), key=lambda way: way[1]["predicted"])
    rows = [row for _, row in ways]
    scales = Scales(
        end=1.08 * max(row["predicted"] for row in rows),
        low=math.floor(min(-100 * row["high"] for row in rows)),
        high=math.ceil(max(-100 * row["low"] for row in rows)) + 1,
    )
    image = Image.new("RGB", (WIDTH * SCALE, HEIGHT * SCALE), PAPER)
    pen = Pen(image)
    titles(pen, " and ".join(str(result["pictures"]) for result in results))
    axes(pen, scales)
    spacing = min(26.0, (FLOOR - TOP) / len(ways))
    places = spread([scales.across(row["predicted"]) for row in rows])
    for number, (x, (name, row)) in enumerate(zip(places, ways, strict=True), 1):
        dot(pen, scales, x, row, number, color_of(name))
        said = f"{name}, {row['predicted']:.2f} s"
        legend(pen, TOP + spacing * (number - 0.5), number, said, color_of(name))
    return image.resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS)


def titles(pen: Pen, pairs: str) -> None:
    said = "right pictures against exact sampling, in points, with 95 % intervals; dots of like seconds are moved apart"
    pen.text(LEFT, 18, f"What shortcuts cost: {pairs} pairs of pictures of the pocket model", 20, INK)
    pen.text(LEFT, 48, said, 13, FAINT)
    pen.text(WIDTH - RIGHT, HEIGHT - 26, "predicted seconds of UniPic at 1024x1024, int8, RTX 4090", 13, FAINT, "ra")


def axes(pen: Pen, scales: Scales) -> None:
    pen.box(LEFT, TOP, WIDTH - RIGHT, FLOOR, PANEL)
    step = max(1, round((scales.high - scales.low) / 8))
    for points in range(-(-scales.low // step) * step, scales.high + 1, step):
        level = scales.up(points)
        pen.line(LEFT, level, WIDTH - RIGHT, level, INK if points == 0 else LINE)
        pen.text(LEFT - 8, level, f"{points:+d}" if points else "0", 13, FAINT, "rm")
    for tenth in range(0, int(10 * scales.end), 5):
        pen.text(scales.across(tenth / 10), FLOOR + 8, f"{tenth / 10:g}", 13, FAINT, "ma")


def dot(pen: Pen, scales: Scales, x: float, row: Row, number: int, color: str) -> None:
    """A way's gain with its interval; a gain is a loss below zero."""
    bottom, y, top = (scales.up(-100 * row[name]) for name in ("high", "lost", "low"))
    pen.line(x, bottom, x, top, color, 2)
    pen.box(x - DOT, y - DOT, x + DOT, y + DOT, color)
    pen.text(x, top - 3, str(number), 11, INK, "mb")


def legend(pen: Pen, level: float, number: int, said: str, color: str) -> None:
    left = WIDTH - RIGHT + 18
    pen.box(left, level - DOT, left + 2 * DOT, level + DOT, color)
    pen.text(left + 30, level, str(number), 12, INK, "rm")
    pen.text(left + 40, level, said, 12, INK, "lm")


def spread(places: Sequence[float]) -> list[float]:
    """Ascending places moved apart to APART at least, between moving them right only and left only."""
    right, left = list(places), list(places)
    for i in range(1, len(places)):
        right[i] = max(right[i], right[i - 1] + APART)
    for i in reversed(range(len(places) - 1)):
        left[i] = min(left[i], left[i + 1] - APART)
    return [(a + b) / 2 for a, b in zip(left, right, strict=True)]


def color_of(name: str) -> str:
    if name in ("exact", "balanced", "fast"):
        return PRESET
    return CONTROL if name.endswith("the rounds") else KNOB


if __name__ == "__main__":
    sys.exit(main())
