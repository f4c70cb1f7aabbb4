"""The exam: prompts, edits and questions of the pocket world put to an engine, and what was wrong with its work."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from ..engine.engine import Engine
from ..engine.noise import PhiloxNoise
from ..engine.sampling import SamplingOptions
from .detector import check
from .edits import KINDS as EDITED
from .edits import Edit, check_edit, sample_edit
from .painter import paint
from .questions import KINDS as ASKED
from .questions import Question, check_answer, sample_question
from .samples import SCORED, Sample, Split, sample

LONGEST_ANSWER = 48  # tokens
CATEGORIES = (*SCORED, "edit", "question")


@dataclass(frozen=True)
class Outcome:
    """One test: `faults` are empty when it was passed; `pictures` are one, or those before and after an edit."""

    category: str
    text: str
    faults: tuple[str, ...]
    pictures: tuple[Image.Image, ...]


@dataclass(frozen=True)
class Exam:
    """What is asked, the same for the same seed; a shorter exam is the beginning of a longer one."""

    samples: tuple[Sample, ...]
    edits: tuple[Edit, ...]
    questions: tuple[Question, ...]


def draw_exam(each: int, seed: int = 0, split: Split = "test") -> Exam:
    """`each` prompts a category, as many edits and as many questions, their kinds by turns."""

    def rng(number: int) -> np.random.Generator:
        return np.random.default_rng((seed, number))

    samples = tuple(
        sample(draw, category, split) for i, category in enumerate(SCORED) for draw in [rng(i)] for _ in range(each)
    )
    draw_edit, draw_question = rng(len(SCORED)), rng(len(SCORED) + 1)
    edits = tuple(sample_edit(draw_edit, EDITED[i % len(EDITED)], split) for i in range(each))
    questions = tuple(sample_question(draw_question, ASKED[i % len(ASKED)], split) for i in range(each))
    return Exam(samples, edits, questions)


def generations(
    engine: Engine, samples: Sequence[Sample], how: SamplingOptions, seed: int = 0, batch: int = 8
) -> list[Outcome]:
    """Picture i has seed + i; `batch` of them are made together."""
    outcomes: list[Outcome] = []
    for at in range(0, len(samples), batch):
        some = samples[at : at + batch]
        noise = [PhiloxNoise(seed + at + i) for i in range(len(some))]
        made = engine.generate([s.prompt for s in some], seed=seed, noise=noise, batch_size=batch, **how)
        outcomes += [
            Outcome(s.category, s.prompt, check(image, s.spec).reasons, (image,))
            for s, image in zip(some, made.images, strict=True)
        ]
    return outcomes


def edited(engine: Engine, edits: Sequence[Edit], how: SamplingOptions, seed: int = 0) -> list[Outcome]:
    outcomes = []
    for i, edit in enumerate(edits):
        before = paint(edit.source)
        after = engine.edit(before, edit.instruction, seed=seed + i, **how).images[0]
        outcomes.append(Outcome("edit", edit.instruction, check_edit(after, edit).reasons, (before, after)))
    return outcomes


def answered(engine: Engine, questions: Sequence[Question]) -> list[Outcome]:
    outcomes = []
    for question in questions:
        picture = paint(question.scene)
        answer = engine.ask(picture, question.text, max_new_tokens=LONGEST_ANSWER).text
        faults = () if check_answer(answer, question) else (f"said {answer!r}, not {question.answer!r}",)
        outcomes.append(Outcome("question", question.text, faults, (picture,)))
    return outcomes


def sit_exam(engine: Engine, exam: Exam, how: SamplingOptions, seed: int = 0) -> list[Outcome]:
    return [
        *generations(engine, exam.samples, how, seed),
        *edited(engine, exam.edits, how, seed),
        *answered(engine, exam.questions),
    ]
