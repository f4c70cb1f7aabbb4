"""A sheet of pictures with captions, and a look at the model in training through the engine's own verbs."""

import copy
import textwrap
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw
from torch import Tensor

from ..engine.engine import Engine
from ..engine.models.unipic import model as family
from ..engine.models.unipic.model import UniPic
from ..engine.tokens import Tokens
from .exam import CATEGORIES, Outcome, draw_exam, sit_exam
from .scenes import SIDE

LINE, LINES, LETTERS = 12, 5, 21  # of a caption; pixels, and what fits under a picture
CAPTION = LINE * LINES + 4
COLUMNS = 8


def engine_of(model: UniPic, weights: dict[str, Tensor], tokens: Tokens) -> Engine:
    """An engine on a copy of the model with these weights; what they leave out stays as in the model."""
    copied = copy.deepcopy(model).requires_grad_(False).eval()
    copied.load_state_dict({**model.state_dict(), **weights})
    return Engine(family, copied, tokens, "pocket in training")


def look(engine: Engine, path: Path, each: int = 6) -> dict[str, float]:
    """Save a sheet of a small exam; the share of right ones by category."""
    outcomes = sit_exam(engine, draw_exam(each), {})
    save_sheet(path, outcomes)
    shares = {}
    for category in CATEGORIES:
        own = [not o.faults for o in outcomes if o.category == category]
        shares[category] = sum(own) / len(own)
    return shares


def save_sheet(path: Path, outcomes: Sequence[Outcome]) -> None:
    """Pictures over what was asked and, in red, what is wrong; an edit takes two cells."""
    cells = []
    for outcome in outcomes:
        cells += [(picture, "before", ()) for picture in outcome.pictures[:-1]]
        cells.append((outcome.pictures[-1], outcome.text, outcome.faults))
    rows = -(-len(cells) // COLUMNS)
    sheet = Image.new("RGB", (COLUMNS * (SIDE + 4), rows * (SIDE + CAPTION)), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (picture, caption, faults) in enumerate(cells):
        x, y = i % COLUMNS * (SIDE + 4), i // COLUMNS * (SIDE + CAPTION)
        sheet.paste(picture, (x, y))
        lines = [(line, "black") for line in textwrap.wrap(caption, LETTERS)]
        lines += [(line, "red") for fault in faults for line in textwrap.wrap(fault, LETTERS)]
        for row, (line, colour) in enumerate(lines[:LINES]):
            draw.text((x, y + SIDE + LINE * row), line, fill=colour)
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)
