"""Edits change exactly what they say, questions have one true answer, and the vocabulary is closed."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from unipic_run.pocket import edits, questions
from unipic_run.pocket.edits import Edit, check_edit, sample_edit
from unipic_run.pocket.painter import paint
from unipic_run.pocket.phrases import described, words
from unipic_run.pocket.questions import Question, check_answer, sample_question
from unipic_run.pocket.samples import CATEGORIES, sample
from unipic_run.pocket.scenes import BACKGROUNDS, SIDE, Figure, Group, Scene
from unipic_run.pocket.split import held_out
from unipic_run.pocket.vocabulary import unknown_words, vocabulary

SPLITS = ("train", "test")


@pytest.fixture(scope="module")
def drawn_edits():
    rng = np.random.default_rng(7)
    return [(split, sample_edit(rng, kind, split)) for split in SPLITS for kind in edits.KINDS for _ in range(25)]


@pytest.fixture(scope="module")
def drawn_questions():
    rng = np.random.default_rng(8)
    return [
        (split, sample_question(rng, kind, split)) for split in SPLITS for kind in questions.KINDS for _ in range(100)
    ]


def test_an_edit_changes_what_it_says_and_nothing_else(drawn_edits):
    gone_new = {
        "recolour": (1, 1),
        "remove": (1, 0),
        "add": (0, 1),
        "background": (0, 0),
        "move": (1, 1),
        "swap": (1, 1),
    }
    for _, edit in drawn_edits:
        before, after = set(edit.source.figures), set(edit.target.figures)
        gone, new = tuple(before - after), tuple(after - before)
        assert (len(gone), len(new)) == gone_new[edit.kind], edit.instruction
        assert (edit.source.background == edit.target.background) is (edit.kind != "background")
        assert edit.source.shade == edit.target.shade and set(edit.kept) == before & after
        if gone and new:
            differs = {"recolour": {"colour"}, "move": {"x", "y"}, "swap": {"shape"}}[edit.kind]
            found = {name for name in vars(gone[0]) if getattr(gone[0], name) != getattr(new[0], name)}
            assert found and found <= differs  # two places may share a row or a column
        if edit.kind == "background":
            assert edit.target.background in words(edit.instruction.replace("grey", "gray"))
        if edit.kind == "recolour":
            assert new[0].colour == words(edit.instruction)[-1]


def test_outside_the_changed_objects_the_true_result_has_the_same_pixels(drawn_edits):
    for _, edit in drawn_edits:
        if edit.kind != "background":
            same = np.ones((SIDE, SIDE), bool)
            for figure in set(edit.source.figures) ^ set(edit.target.figures):
                left, top, right, bottom = (
                    int(at)
                    for at in (
                        figure.x - figure.reach - 2,
                        figure.y - figure.reach - 2,
                        figure.x + figure.reach + 3,
                        figure.y + figure.reach + 3,
                    )
                )
                same[top:bottom, left:right] = False
            assert (np.array(paint(edit.source))[same] == np.array(paint(edit.target))[same]).all()


def test_edits_keep_to_their_split(drawn_edits):
    for split, edit in drawn_edits:
        assert held_out(edit.target) is (split == "test")
        assert split == "test" or not held_out(edit.source)


def test_an_edit_fails_without_the_change_or_when_something_else_changed():
    red, blue = Figure("circle", "red", 30, 30, 12), Figure("star", "blue", 95, 95, 12)
    green = replace(red, colour="green")
    source = Scene((red, blue), "black")
    edit = Edit(
        "recolour",
        source,
        "make the circle green",
        Scene((blue, green), "black"),
        Group("circle", "green", "small"),
        green,
    )

    def judged(*figures, ground="black"):
        return check_edit(paint(Scene(figures, ground)), edit)

    assert judged(green, blue) and judged(replace(green, x=33, angle=10), replace(blue, y=92, angle=5))
    assert judged(red, blue).reasons == ("no object became green circle as asked",)
    assert judged(green, replace(blue, x=60)).reasons == ("the rest did not stay",)
    assert judged(green, replace(blue, colour="pink")).reasons == ("the rest did not stay",)
    assert judged(green).reasons == ("1 objects, not 2",)
    assert judged(green, blue, ground="navy").reasons == ("background is navy, not black",)
    assert not judged(replace(green, x=60), blue) and not judged(replace(green, radius=20), blue)


def test_added_and_moved_objects_may_stand_anywhere_that_was_allowed():
    red, star = Figure("circle", "red", 30, 30, 12), Figure("star", "blue", 95, 95, 12)
    free = Edit("add", Scene((red,), "teal"), "add a blue star", Scene((red, star), "teal"), Group("star", "blue"))
    placed = replace(free, changed=replace(free.changed, place="bottom right"))
    elsewhere = paint(Scene((red, replace(star, x=64, y=64, radius=19)), "teal"))
    assert check_edit(elsewhere, free) and not check_edit(elsewhere, placed)


def test_answers_are_true(drawn_questions):
    grounds = set(BACKGROUNDS)
    for split, question in drawn_questions:
        assert held_out(question.scene) is (split == "test")
        scene, answer = question.scene, question.answer
        said = words(question.text)
        if question.kind == "count":
            fits = [f for f in scene.figures if all(w in words(" ".join(f.look)) for w in singular(said))]
            assert answer == ("zero", "one", "two", "three", "four")[len(fits)], question
        elif question.kind == "describe":
            assert answer == described(scene)
        elif "background" in said:
            assert answer == scene.background or (answer == "yes") is (scene.background in said)
        elif question.kind in ("colour", "shape", "where"):
            told = {"colour": 1, "shape": 0, "where": 3}[question.kind]
            assert answer in {figure.look[told] for figure in scene.figures} - grounds
    answers = Counter(question.answer for _, question in drawn_questions if question.kind == "yes or no")
    assert set(answers) == {"yes", "no"} and 0.35 < answers["yes"] / answers.total() < 0.65


def singular(said):
    """The attributes that a counting question names, as a figure's look has them."""
    synonyms = {"little": "small", "big": "large", "crosses": "cross"}
    skip = {"how", "many", "are", "there", "do", "you", "see", "count", "the", "?", "object", "objects"}
    return [synonyms.get(w, w.removesuffix("s") if w != "cross" else w) for w in said if w not in skip]


def test_relations_in_questions_are_true():
    rng = np.random.default_rng(3)
    a, b = Figure("circle", "red", 20, 64, 12), Figure("star", "blue", 100, 66, 12)
    scene = Scene((a, b), "black")
    for _ in range(60):
        for yes in (True, False):
            text = questions._stands(rng, scene, yes)
            if text is None:
                continue
            first_is_left = min(text.find(w) for w in ("circle", "red") if w in text) < min(
                text.find(w) for w in ("star", "blue") if w in text
            )
            assert (("left" in text) == first_is_left) is yes, text


def test_answers_are_compared_without_trifles():
    def equal(given, true):
        return check_answer(given, Question("count", Scene((), None), "", true))

    assert equal(" Two. ", "two") and equal("2", "two") and equal("grey", "gray") and equal("the top left", "top left")
    assert equal("A small red circle on black", "a small red circle on black")
    assert not equal("three", "two") and not equal("", "two") and not equal("left top", "top left")
    assert not equal("two rings", "two")


def test_the_vocabulary_is_closed_and_has_no_idle_word(drawn_edits, drawn_questions):
    rng = np.random.default_rng(9)
    texts = [sample(rng, category, "train").prompt for category in CATEGORIES for _ in range(300)]
    texts += [edit.instruction for _, edit in drawn_edits]
    texts += [text for _, question in drawn_questions for text in (question.text, question.answer)]
    used = {word for text in texts for word in words(text)}
    assert used <= set(vocabulary())
    assert len(set(vocabulary()) - used) <= 8, "words that nothing says"
    assert len(vocabulary()) < 150 and all(text == text.lower() for text in texts)


def test_unknown_words_are_named():
    assert unknown_words("Two blue stars above a red circle.") == []
    assert unknown_words("a cat on a red mat") == ["cat", "mat"]
