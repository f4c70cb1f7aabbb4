"""Quality against predicted time, of a result of bench/shortcuts.py, as a picture.

python bench/frontier.py bench/results/shortcuts-DATE.json docs/speed.png
"""

import argparse
import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image
from unipic_run.bench.checkout import require_this_checkout
from unipic_run.engine.plot import FAINT, INK, PANEL, PAPER, SCALE, Pen
from unipic_run.engine.png_metadata import save_png

WIDTH, HEIGHT = 1000, 620
LEFT, RIGHT, TOP, BOTTOM = 70, 30, 92, 60
KNOB, PRESET, CONTROL = "#5b8bb5", "#f0a24a", "#9aa5b1"
DOT = 5
Row = Mapping[str, Any]


def main(arguments: list[str] | None = None) -> int:
    require_this_checkout(__file__)
    parser = argparse.ArgumentParser(prog="frontier", description="Draws a result of bench/shortcuts.py.")
    parser.add_argument("result", type=Path)
    parser.add_argument("png", type=Path)
    options = parser.parse_args(arguments)
    save_png(draw(json.loads(options.result.read_text(encoding="utf-8"))), options.png, overwrite=True)
    print(options.png)
    return 0


def draw(result: Mapping[str, Any]) -> Image.Image:
    """Every way is a dot with the interval of its loss, below exact's line."""
    ways: Mapping[str, Row] = result["ways"]
    image = Image.new("RGB", (WIDTH * SCALE, HEIGHT * SCALE), PAPER)
    pen = Pen(image)
    pen.text(LEFT, 18, f"What shortcuts cost: {result['pictures']} pairs of pictures of the pocket model", 20, INK)
    pen.text(LEFT, 48, "right pictures against exact sampling, in points, with 95 % intervals", 13, FAINT)
    pen.text(WIDTH - RIGHT, HEIGHT - 26, "predicted seconds of UniPic at 1024x1024, int8, RTX 4090", 13, FAINT, "ra")
    end = 1.08 * max(row["predicted"] for row in ways.values())
    low = math.floor(min(-100 * row["high"] for row in ways.values()))
    high = math.ceil(max(-100 * row["low"] for row in ways.values())) + 1
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
    for name, row in ways.items():
        x, y, color = across(row["predicted"]), up(-100 * row["lost"]), color_of(name)
        pen.line(x, up(-100 * row["high"]), x, up(-100 * row["low"]), color, 2)
        pen.box(x - DOT, y - DOT, x + DOT, y + DOT, color)
        beside = (x - 10, "rm") if x > (WIDTH + LEFT) / 2 else (x + 10, "lm")
        pen.text(beside[0], y, name, 12, INK, beside[1])
    return image.resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS)


def color_of(name: str) -> str:
    if name in ("exact", "balanced", "fast"):
        return PRESET
    return CONTROL if name.endswith("the rounds") else KNOB


if __name__ == "__main__":
    sys.exit(main())
