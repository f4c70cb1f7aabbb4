"""A look at the model in training: a sheet of samples through the engine's own verbs, and how many are right."""

import copy
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from torch import Tensor

from ..engine.engine import Engine
from ..engine.models.unipic import model as family
from ..engine.models.unipic.model import UniPic
from ..engine.tokens import Tokens
from .detector import check
from .edits import KINDS, check_edit, sample_edit
from .painter import paint
from .questions import KINDS as ASKED
from .questions import check_answer, sample_question
from .samples import SCORED, Split, sample
from .scenes import SIDE

CAPTION = 26  # pixels
BATCH = 8


def engine_of(model: UniPic, weights: dict[str, Tensor], tokens: Tokens) -> Engine:
    """An engine on a copy of the model with these weights; what they leave out stays as in the model."""
    copied = copy.deepcopy(model).requires_grad_(False).eval()
    copied.load_state_dict({**model.state_dict(), **weights})
    return Engine(family, copied, tokens, "pocket in training")


def look(engine: Engine, path: Path, each: int = 4, seed: int = 0, split: Split = "test") -> dict[str, float]:
    """Save a sheet of `each` samples of every category and kind; the share of right ones of generations, edits and
    questions (of which there are ten times as many, unseen on the sheet)."""
    rng = np.random.default_rng(seed)
    drawn = [sample(rng, category, split) for category in SCORED for _ in range(each)]
    made = engine.generate([s.prompt for s in drawn], seed=seed, batch_size=BATCH).images
    right = [bool(check(image, s.spec)) for image, s in zip(made, drawn, strict=True)]
    cells = [(image, s.prompt, ok) for image, s, ok in zip(made, drawn, right, strict=True)]
    edits = [sample_edit(rng, kind, split) for kind in KINDS for _ in range(max(each // 2, 1))]
    results = [engine.edit(paint(edit.source), edit.instruction, seed=seed).images[0] for edit in edits]
    changed = [bool(check_edit(image, edit)) for image, edit in zip(results, edits, strict=True)]
    for image, edit, ok in zip(results, edits, changed, strict=True):
        cells += [(paint(edit.source), "before", True), (image, edit.instruction, ok)]
    questions = [sample_question(rng, kind, split) for kind in ASKED for _ in range(each)]
    answers = [engine.ask(paint(q.scene), q.text, max_new_tokens=40).text for q in questions]
    answered = [check_answer(answer, q) for answer, q in zip(answers, questions, strict=True)]
    save_sheet(path, cells, columns=2 * each)
    shares = {"generation": right, "edit": changed, "question": answered}
    return {name: sum(outcomes) / len(outcomes) for name, outcomes in shares.items()}


def save_sheet(path: Path, cells: list[tuple[Image.Image, str, bool]], columns: int) -> None:
    """Pictures with captions, in red where they are wrong."""
    rows = -(-len(cells) // columns)
    sheet = Image.new("RGB", (columns * (SIDE + 4), rows * (SIDE + CAPTION)), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (image, caption, ok) in enumerate(cells):
        x, y = i % columns * (SIDE + 4), i // columns * (SIDE + CAPTION)
        sheet.paste(image, (x, y))
        lines = [caption[:22], caption[22:44]]
        for line, text in enumerate(lines):
            draw.text((x, y + SIDE + 12 * line), text, fill="black" if ok else "red")
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)
