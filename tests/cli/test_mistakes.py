"""What is refused, in one line that names it, and with which exit code."""

import time
from pathlib import Path

import pytest
from PIL import Image
from unipic_run.engine.arguments import parse_outpaint, parse_size
from unipic_run.engine.errors import UsageError
from unipic_run.engine.png_metadata import save_png
from unipic_run.engine.terminal import printable


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--speed", "ludicrous"), "speed 'ludicrous' is unknown: choose from exact, balanced, fast"),
        (("--head-steps", "50"), "--head-steps '50' is not A:B: write for example 50:5"),
        (("--cfg-interval", "1:0"), "cfg_interval 1 to 0 is empty"),
        (("--solver", "heun"), "solver 'heun' is unknown: choose from ddpm, ddim, dpm2"),
        (("--order", "raster"), "order 'raster' is unknown: choose from random, gtr"),
        (("--block-cache", "2"), "block_cache 2.0 is not a number from 0 to 1"),
        (("--block-cache", "0.1"), "block_cache 0.1 has no meaning for this model"),
    ],
)
def test_shortcuts_that_are_none_are_refused(run, model, options, said, pngs):
    code, _, err = run("gen", "x", "-m", model, *options)
    assert code == 2 and said in err and not pngs()


@pytest.mark.parametrize(
    ("words", "value"),
    [
        (("--res", "abc"), "abc"),
        (("--res=abc",), "abc"),
        (("--res=", "--json"), ""),
        (("-n", "1.5"), "1.5"),
        (("-n1.5",), "1.5"),
        (("--steps", "4", "--steps", "x"), "x"),
        (("--steps", "n"), "n"),
        (("--iters", "-"), "-"),
    ],
)
def test_what_the_parser_refuses_is_told_once(run, words, value):
    code, _, err = run("gen", "x", *words)
    assert code == 2 and err.count(repr(value)) == 1 and err.count("\n") == 1


@pytest.mark.parametrize("words", [("list",), ("gen", "x", "-m", "foo"), ("info", "pocket"), ("plan", "gen")])
def test_a_cache_in_a_home_that_is_not_there_is_told(run, monkeypatch, words):
    monkeypatch.setenv("UNIPIC_RUN_CACHE", "~nobody-of-that-name/cache")
    code, _, err = run(*words)
    assert code in (0, 2) and "internal" not in err and "RuntimeError" not in err
    assert code == 0 or "name another folder in UNIPIC_RUN_CACHE" in err


def test_a_folder_that_may_not_be_read_is_told(run, monkeypatch):
    """As for a user whom permissions bind."""

    def forbidden(path: Path) -> bool:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "is_dir", forbidden)
    code, _, err = run("list")
    assert code == 2 and "cannot be used (Permission denied): check the path and its permissions" in err
    code, _, err = run("gen", "x", "-m", "org/name", "--offline")
    assert code in (2, 4) and "PermissionError" not in err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("gen", "x", "--block-cache", "0.1"), "block_cache 0.1 has no meaning for this model"),
        (("gen", "x", "--cfg-cache", "2", "--model", "deepgen"), "cfg_cache 2.0 has no meaning"),
        (("edit", "photo.jpg", "x", "--outpaint", "0,0,16,0", "--model", "deepgen"), "does not repaint"),
        (("edit", "photo.jpg", "x", "--ref", "photo.jpg"), "2 pictures given, this model edits 1"),
        (("edit", "photo.jpg", "x", "--fit", "longest"), "fit longest is not known to this model"),
    ],
)
def test_what_a_known_model_cannot_do_is_refused_before_it_is_fetched(run, photo, words, said):
    code, _, err = run(*words, "--offline")
    assert code == 2 and said in err


@pytest.mark.parametrize("words", [("--model", ""), ("-o", ""), ("--prompt-file", ""), ("--model=",)])
def test_an_empty_value_is_named(run, words):
    code, _, err = run("gen", "x", *words)
    assert code == 2 and f"the value '' of {words[0].rstrip('=')} is empty" in err


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--no-such-option"], 2),
        (["paint", "x"], 2),
        (["gen", "x", "--size", "0x7"], 2),
        (["gen", "x", "--size", "7x16"], 2),
        (["gen", "x", "--size", "16"], 2),
        (["gen", "x", "--res", "1e6"], 2),
        (["gen", "x", "--res", "1000000"], 2),
        (["gen", "x", "--res", "64", "--size", "64x64"], 2),
        (["gen", ""], 2),
        (["gen", "x", "-n", "0"], 2),
        (["gen", "x", "--seed", "-1"], 2),
        (["gen", "x", "--guidance", "nan"], 2),
        (["gen", "x", "--steps", "0"], 2),
        (["gen", "x", "--cfg-schedule", "wavy"], 2),
        (["gen", "x", "-o", "no/such/folder.png"], 2),
        (["gen", "x", "-o", "a.jpg"], 2),
        (["gen", "x", "-o", "{sead}.png"], 2),
        (["gen", "x", "-o", "-", "-n", "2"], 2),
        (["gen", "x", "-o", "-", "--json"], 2),
        (["gen", "x", "--device", "tpu"], 6),
        (["gen", "x", "--dtype", "int3"], 2),
        (["gen", "x", "--attn", "none"], 2),
        (["gen", "x", "--offline"], 4),
        (["edit", "missing.png", "x"], 2),
        (["ask", "missing.png", "x"], 2),
        (["info", "missing.png"], 2),
        (["convert", "missing", "dst"], 4),
        (["verify", "unipic"], 4),
        (["pull", "unipic"], 4),
    ],
)
def test_mistakes_end_in_one_line_and_their_exit_code(run, arguments, code):
    found, out, err = run(*arguments)
    assert found == code and (out == "" or "--json" in arguments)
    assert err.splitlines()[-1].startswith("error: ") and "Traceback" not in err


def test_a_prompt_of_100_kb_is_refused_in_seconds(run, model, pngs, quick):
    start = time.monotonic()
    code, _, err = run("gen", "-", "-m", model, *quick, stdin=b"word " * 20_000)
    assert code == 2 and "shorten the prompt" in err and len(err) < 3000
    assert time.monotonic() - start < 20 and not pngs()


def test_an_unexpected_failure_is_one_line_and_debug_shows_the_rest(run, monkeypatch):
    monkeypatch.setattr("unipic_run.engine.hub.list_models", lambda: 1 / 0)
    code, _, err = run("list")
    assert code == 1 and err == "error: ZeroDivisionError: division by zero: run with --debug for the traceback\n"
    assert "Traceback" in run("list", "--debug")[2]


@pytest.mark.parametrize("name", ["~nobody-of-this-name/m", "m" * 300])
def test_a_name_that_can_be_no_path_is_no_model(run, name):
    save_png(Image.new("RGB", (16, 16)), "hostile.png", {"task": "generate", "prompt": "x", "model": name})
    for words, code in ((("gen", "x", "-m", name), 4), (("gen", "--from", "hostile.png"), 2), (("verify", name), 4)):
        assert run(*words)[0] == code
    assert run("info", name)[0] == 2


def test_words_become_values():
    assert parse_size("1024x768") == (1024, 768) and parse_outpaint("0,16,32,0") == (0, 16, 32, 0)
    for text in ("1024", "x", "-1x16", "1e3x16", "16x16x16", "٣x16"):
        with pytest.raises(UsageError):
            parse_size(text)
    assert printable("a\x1b[31mb\nc\x9b") == "a\\x1b[31mb\nc\\x9b"


def test_a_folder_of_no_model_is_told_what_one_would_hold(run):
    code, _, err = run("convert", "missing", "dst")
    assert code == 4 and "missing is no folder" in err
    Path("half/connector").mkdir(parents=True)
    Path("half/connector/model.safetensors").write_bytes(b"")
    for words in (("convert", "half", "dst"), ("gen", "x", "-m", "half"), ("info", "half")):
        code, _, err = run(*words)
        assert code == 4 and "the folders transformer and connector" in err and "pytorch_model.bin (unipic)" in err


def test_no_name_is_not_the_folder_one_is_in(run, model, monkeypatch):
    monkeypatch.chdir(model)
    assert run("verify", ".")[0] == 0
    assert [run(*words)[0] for words in (("verify", ""), ("pull", ""), ("info", ""))] == [4, 4, 2]
