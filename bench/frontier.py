"""Quality against predicted time, of results of bench/shortcuts.py, as a picture; the first that has a way tells of it.

python bench/frontier.py bench/results/shortcuts-presets-DATE.json bench/results/shortcuts-DATE.json docs/speed.png
"""

import argparse
import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from unipic_run.bench.checkout import require_this_checkout
from unipic_run.engine.plot import FAINT, INK, PANEL, PAPER, SCALE, Pen
from unipic_run.engine.png_metadata import save_png

WIDTH, HEIGHT = 1000, 620
LEFT, RIGHT, TOP, BOTTOM = 70, 360, 92, 60  # the names are to the right
KNOB, PRESET, CONTROL = "#5b8bb5", "#f0a24a", "#9aa5b1"
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


def draw(results: Sequence[Mapping[str, Any]]) -> Image.Image:
    """Every way is a numbered dot with the interval of its loss, from the cheapest on; names beside."""
    found: dict[str, Row] = {name: row for result in reversed(results) for name, row in result["ways"].items()}
    ways = sorted(found.items(), key=lambda way: way[1]["predicted"])
    pairs = " and ".join(str(result["pictures"]) for result in results)
    image = Image.new("RGB", (WIDTH * SCALE, HEIGHT * SCALE), PAPER)
    pen = Pen(image)
    pen.text(LEFT, 18, f"What shortcuts cost: {pairs} pairs of pictures of the pocket model", 20, INK)
    pen.text(
        LEFT,
        48,
        "right pictures against exact sampling, in points, with 95 % intervals; dots of like seconds are moved apart",
        13,
        FAINT,
    )
    pen.text(WIDTH - RIGHT, HEIGHT - 26, "predicted seconds of UniPic at 1024x1024, int8, RTX 4090", 13, FAINT, "ra")
    end = 1.08 * max(row["predicted"] for _, row in ways)
    low = math.floor(min(-100 * row["high"] for _, row in ways))
    high = math.ceil(max(-100 * row["low"] for _, row in ways)) + 1
    floor = HEIGHT - BOTTOM

    def across(seconds: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * seconds / end

    def up(points: float) -> float:
        return floor - (floor - TOP) * (points - low) / (high - low)

    pen.box(LEFT, TOP, WIDTH - RIGHT, floor, PANEL)
    step = max(1, round((high - low) / 8))
    for points in range(-(-low // step) * step, high + 1, step):
        pen.line(LEFT, up(points), WIDTH - RIGHT, up(points), INK if points == 0 else "#d5dbe1")
        pen.text(LEFT - 8, up(points), f"{points:+d}" if points else "0", 13, FAINT, "rm")
    for tenth in range(0, int(10 * end), 5):
        pen.text(across(tenth / 10), floor + 8, f"{tenth / 10:g}", 13, FAINT, "ma")
    spacing = min(26.0, (floor - TOP) / len(ways))
    places = spread([across(row["predicted"]) for _, row in ways])
    for number, (x, (name, row)) in enumerate(zip(places, ways, strict=True), 1):
        y, color = up(-100 * row["lost"]), color_of(name)
        pen.line(x, up(-100 * row["high"]), x, up(-100 * row["low"]), color, 2)
        pen.box(x - DOT, y - DOT, x + DOT, y + DOT, color)
        pen.text(x, up(-100 * row["low"]) - 3, str(number), 11, INK, "mb")
        level = TOP + spacing * (number - 0.5)
        pen.box(WIDTH - RIGHT + 18, level - DOT, WIDTH - RIGHT + 18 + 2 * DOT, level + DOT, color)
        pen.text(WIDTH - RIGHT + 48, level, str(number), 12, INK, "rm")
        pen.text(WIDTH - RIGHT + 58, level, f"{name}, {row['predicted']:.2f} s", 12, INK, "lm")
    return image.resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS)


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
