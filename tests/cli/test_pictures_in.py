"""Edits and answers: what is read, and what is told of it."""

import io
import json
import re
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from unipic_run import Engine
from unipic_run.engine.errors import UnipicWarning, UsageError
from unipic_run.engine.reading import Reader
from unipic_run.engine.request import as_largest
from unipic_run.engine.terminal import Terminal


def test_edit_a_mask_and_outpainting(run, model, photo, pixels, quick):
    code, out, _ = run("edit", photo, "make it night", "-m", model, *quick, "-q")
    assert code == 0 and pixels(out.strip()).shape[0] % 16 == 0
    mask = Image.new("L", (120, 96))
    mask.paste(255, (0, 0, 40, 96))
    mask.save("mask.png")
    repaint = ("-m", model, "--steps", "2", "--seed", "7", "-q")
    assert run("edit", photo, "a wall", "--mask", "mask.png", *repaint, "-o", "wall.png")[0] == 0
    with Image.open(photo) as source:
        before, after = np.asarray(source.convert("RGB")), pixels("wall.png")
    assert np.array_equal(after[:, 40:], before[:, 40:]) and not np.array_equal(after[:, :40], before[:, :40])
    assert run("edit", photo, "a wall", "--outpaint", "0,0,8,16", *repaint, "-o", "{task}.png")[0] == 0
    assert pixels("inpaint.png").shape == (112, 128, 3)
    nowhere = ("--mask", "mask.png", "-m", "someone/nowhere", "--offline")
    code, _, err = run("edit", photo, "a wall", *nowhere, "--res", "64")
    assert code == 2 and "res 64 has no effect" in err, "before a model is looked for"


def test_ask_streams_one_answer_and_lists_several(run, model, photo):
    options = ("-m", model, "--max-new-tokens", "8")
    code, out, err = run("ask", photo, "what is it?", *options)
    cut = "note: the answer to 'what is it?' was cut at 8 tokens: raise --max-new-tokens (max_new_tokens)\n"
    assert code == 0 and out.endswith("\n") and out.strip() and err == cut
    assert not run("ask", photo, "what is it?", *options, "-q")[2]
    code, several, _ = run("ask", "-", "what is it?", "and this?", *options, "--json", stdin=Path(photo).read_bytes())
    found = json.loads(several)
    assert code == 0 and [row["question"] for row in found["answers"]] == ["what is it?", "and this?"]
    assert found["answers"][0]["text"].startswith(out.rstrip("\n")) and found["attention"] == "sdpa"
    assert all(row["cut"] and len(row["ids"]) == 8 for row in found["answers"])


def test_a_note_waits_for_the_end_of_a_line_that_comes_in_pieces(monkeypatch):
    def pieces():
        warnings.warn("at once", UnipicWarning, stacklevel=1)
        yield "two"
        warnings.warn("cut", UnipicWarning, stacklevel=1)
        yield " stars"

    screen = io.StringIO()
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setattr(sys, "stderr", screen)
    with Terminal() as terminal:
        terminal.stream(pieces())
        terminal.note("after")
    assert screen.getvalue() == "note: at once\ntwo stars\nnote: cut\nnote: after\n"


def test_answers_are_told_when_they_are_there(run, model, photo, monkeypatch):
    whole = Reader.answer

    def answer(reader, request, cancel):
        if request.question == "and this?":
            raise KeyboardInterrupt
        return whole(reader, request, cancel)

    monkeypatch.setattr(Reader, "answer", answer)
    words = ("ask", photo, "what is it?", "and this?", "-m", model, "--max-new-tokens", "8")
    code, out, _ = run(*words)
    assert code == 130 and out.strip()
    found = json.loads(run(*words, "--json")[1])
    assert [row["text"] + "\n" for row in found["answers"]] == [out] and found["error"]["code"] == "cancelled"
    assert found["timings"]["answer"] > 0


def test_the_seconds_of_several_answers_are_added_up(run, model, photo, monkeypatch):
    times = {"look": 1.0, "answer": 2.0, "compile": 1.5, "capture": 0.5}, {"look": 1.0, "answer": 4.0}
    seconds = iter(times)
    monkeypatch.setattr("unipic_run.engine.run.Clock.seconds", property(lambda clock: next(seconds)))
    code, out, _ = run("ask", photo, "what?", "and this?", "-m", model, "--max-new-tokens", "1", "--json")
    assert code == 0 and json.loads(out)["timings"] == {"look": 1.0, "answer": 6.0}
    answers = json.loads(out)["answers"]
    assert [row["timings"] for row in answers] == [*times] and all(len(row["ids"]) == 1 for row in answers)


def test_a_drawn_seed_is_said_where_nothing_else_tells_it(run, model, photo, pixels):
    question = ("ask", photo, "what is it?", "-m", model, "--max-new-tokens", "8", "--temperature", "1")
    cut = "note: the answer to 'what is it?' was cut at 8 tokens: raise --max-new-tokens (max_new_tokens)\n"
    code, out, err = run(*question)
    seed = re.fullmatch(r"seed (\d+)\n" + re.escape(cut), err)
    assert code == 0 and run(*question, "--seed", seed[1]) == (0, out, cut)
    assert run(*question[:-2])[2] == cut and run(*question, "--json")[2] == cut, "no seed counts; JSON has it"
    quick = ("gen", "x", "-m", model, "--steps", "2", "--res", "128", "--no-metadata")
    code, _, err = run(*quick, "-o", "a.png")
    seed = re.fullmatch(r"seed (\d+)\n", err)
    assert code == 0 and run(*quick, "-o", "b.png", "--seed", seed[1])[2] == ""
    assert np.array_equal(pixels("a.png"), pixels("b.png"))
    edited = ("edit", photo, "x", "-m", model, "--steps", "2", "--no-metadata", "-o", "e.png")
    assert re.search(r"^seed \d+$", run(*edited)[2], re.MULTILINE)


def test_edit_refuses_before_a_model_is_loaded(run, photo):
    for options in (
        ["--mask", photo, "--outpaint", "1,1,1,1"],
        ["--outpaint", "1,1"],
        ["--fit", "stretch"],
        ["--posterior", "median"],
        ["--res", "100"],
    ):
        code, _, err = run("edit", photo, "x", *options, "-m", "no-such-model")
        assert code == 2 and err.startswith("error: ")


def test_a_question_to_a_model_that_answers_none_fetches_nothing(run, photo):
    code, _, err = run("ask", photo, "what is it?", "--model", "unipic2-kontext", "--offline")
    assert code == 2 and "does not answer questions" in err


@pytest.mark.parametrize(
    ("words", "declared"),
    [
        (["gen", "x"], {"task": "gen", "n": 1}),
        (
            ["gen", "x", "-n", "9", "--size", "64x32", "--steps", "3"],
            {"task": "gen", "size": (64, 32), "n": 4, "steps": 3},
        ),
        (
            ["gen", "x", "-n", "9", "--batch-size", "6", "--preview-every", "2"],
            {"task": "gen", "n": 6, "previews": True},
        ),
        (["edit", "photo.jpg", "x"], {"task": "edit", "n": 1}),
        (["edit", "photo.jpg", "x", "--res", "64"], {"task": "edit", "n": 1, "size": (64, 64)}),
        (["edit", "photo.jpg", "x", "--outpaint", "0,0,9,16"], {"task": "edit", "n": 1, "size": (144, 112)}),
        (
            ["edit", "photo.jpg", "x", "--ref", "photo.jpg", "--size", "96x64", "--model", "deepgen"],
            {"task": "edit", "n": 1, "size": (96, 64), "sources": 2},
        ),
        (["ask", "photo.jpg", "x", "--res", "64"], {"task": "ask", "size": (64, 64)}),
    ],
)
def test_a_command_declares_its_own_request_as_the_largest(run, photo, monkeypatch, words, declared):
    heard = []

    def load(**how):
        heard.append(how["largest"])
        raise UsageError("enough")

    monkeypatch.setattr(Engine, "from_pretrained", load)
    assert run(*words, "--quant", "auto")[0] == 2
    assert as_largest(heard[0]) == as_largest(declared)
