"""Where prompts come from."""

import sys
from pathlib import Path

import numpy as np
from unipic_run.cli import main
from unipic_run.engine.png_metadata import read_settings


def test_prompts_end_at_line_ends_alone(run, model, quick):
    text = "a red circle\u2028on white\r\na blue\x0c ring\n"
    code, out, _ = run("gen", "-m", model, *quick, "-o", "a.png", "--prompt-file", "-", stdin=text.encode())
    assert code == 0 and len(out.split()) == 2
    code, _, err = run("gen", "-m", model, *quick, "--prompt-file", "-", stdin="a red circle".encode("utf-16-le"))
    assert code == 2 and "holds a null character: retype it, or save its file as UTF-8" in err


def test_stdin_is_read_for_one_thing(run, photo):
    source = Path(photo).read_bytes()
    for words in (
        ("edit", "-", "-"),
        ("edit", "-", "--prompt-file", "-"),
        ("edit", "-", "x", "--ref", "-"),
        ("ask", "-", "-"),
    ):
        code, _, err = run(*words, stdin=source)
        assert code == 2 and "- given twice" in err


def test_a_closed_stdin_is_refused(monkeypatch, photo, capsys):
    monkeypatch.setattr(sys, "stdin", None)
    for words in (["gen", "-"], ["edit", "-", "x"], ["ask", photo, "-"]):
        assert main(words) == 2 and "stdin is closed" in capsys.readouterr().err


def test_prompts_come_from_one_place_stdin_file_or_line(run, model, pixels, quick):
    code, out, _ = run("gen", "-", "-m", model, *quick, "-o", "{index}.png", stdin="one\n\n zwei ü\r\n".encode())
    assert (code, out) == (0, "1.png\n2.png\n") and read_settings("2.png")["prompt"] == "zwei ü"
    Path("prompts.txt").write_bytes(b"\xef\xbb\xbfone\n")
    assert run("gen", "--prompt-file", "prompts.txt", "-m", model, *quick, "-o", "file.png")[0] == 0
    assert np.array_equal(pixels("1.png"), pixels("file.png"))
    for arguments, stdin in (
        (["gen", "x", "--prompt-file", "prompts.txt"], b""),
        (["gen"], b""),
        (["gen", "-"], b"\n\n"),
        (["gen", "-"], b"\xff\xfe"),
        (["gen", "--prompt-file", "missing.txt"], b""),
    ):
        code, _, err = run(*arguments, stdin=stdin)
        assert code == 2 and err.startswith("error: ") and err.count("\n") == 1
