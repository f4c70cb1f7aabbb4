"""The command as a user meets it: mostly in this process, a few times as the installed program."""

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from unipic_run import Engine
from unipic_run.cli import main
from unipic_run.engine.arguments import parse_outpaint, parse_size
from unipic_run.engine.checkpoint.cache import PACKAGED
from unipic_run.engine.errors import OutputError, UnipicWarning, UsageError
from unipic_run.engine.outputs import Outputs
from unipic_run.engine.png_metadata import read_settings, save_png
from unipic_run.engine.reading import Reader
from unipic_run.engine.request import as_largest
from unipic_run.engine.sampling import Sampling
from unipic_run.engine.saving import Order
from unipic_run.engine.terminal import Terminal, printable

QUICK = ("--steps", "2", "--seed", "7", "--res", "128")


@pytest.fixture(scope="module")
def model(tiny_release, tmp_path_factory) -> str:
    """The tiny checkpoint, converted by the command itself."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    assert main(["convert", str(tiny_release), str(folder), "-q"]) == 0
    return str(folder)


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch) -> None:
    """Relative outputs and the cache stay inside the test's folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("UNIPIC_RUN_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def run(capsys, monkeypatch):
    def call(*arguments: str, stdin: bytes = b"") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8"))
        capsys.readouterr()
        code = main(list(arguments))
        return code, *capsys.readouterr()

    return call


@pytest.fixture
def photo(tmp_path) -> str:
    levels = np.random.default_rng(0).integers(0, 256, (96, 120, 3), dtype=np.uint8)
    Image.fromarray(levels).save(tmp_path / "photo.jpg")
    return str(tmp_path / "photo.jpg")


def pixels(path: str | Path) -> np.ndarray:
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB"))


def command() -> str:
    found = shutil.which("unipic-run", path=str(Path(sys.executable).parent))
    assert found, "the unipic-run command is not installed beside this Python: pip install -e ."
    return found


def pngs() -> list[str]:
    return sorted(path.name for path in Path.cwd().glob("*.png"))


def test_gen_names_pictures_after_prompt_and_seed_and_never_replaces_one(run, model):
    code, out, err = run("gen", "a red fox", "-m", model, *QUICK)
    assert (code, out, err) == (0, "a_red_fox-7.png\n", "")
    assert pixels("a_red_fox-7.png").shape == (128, 128, 3)
    assert run("gen", "a red fox", "-m", model, *QUICK)[1] == "a_red_fox-7-2.png\n"


def test_from_repeats_a_picture_and_options_on_the_line_win(run, model):
    options = ("--size", "144x112", "--steps", "3", "--seed", "5", "--cfg", "2", "--cfg-schedule", "linear")
    options += (
        "--head-steps",
        "3:2",
        "--order",
        "gtr",
        "--cfg-interval",
        "0:0.5",
        "--solver",
        "dpm2",
        "--cfg-cache",
        "2",
    )
    assert run("gen", "x", "-m", model, *options, "--negative", "blur", "-o", "a.png", "--dtype", "fp32")[0] == 0
    assert run("gen", "--from", "a.png", "-m", model, "-o", "b.png")[0] == 0
    assert np.array_equal(pixels("a.png"), pixels("b.png"))
    assert read_settings("a.png") == read_settings("b.png")
    assert run("gen", "y", "--from", "a.png", "-m", model, "--seed", "6", "--res", "128", "-o", "c.png")[0] == 0
    changed = {"prompt": "y", "seed": 6, "size": "128x128"}
    assert read_settings("c.png") == {**read_settings("a.png"), **changed}


def test_from_repeats_attention_where_it_changes_the_picture(run, model):
    made = ("gen", "x", "-m", model, *QUICK, "--quant", "int8", "--attn", "int8-qk", "-o", "a.png")
    assert run(*made)[0] == 0
    assert run("gen", "--from", "a.png", "-m", model, "-o", "b.png")[0] == 0
    assert np.array_equal(pixels("a.png"), pixels("b.png")) and read_settings("a.png") == read_settings("b.png")
    assert run("gen", "--from", "a.png", "-m", model, "--attn", "auto", "-o", "c.png")[0] == 0
    assert read_settings("c.png") == read_settings("a.png") | {"attention": "sdpa"}
    other = read_settings("a.png") | {"attention": "xformers"}  # which is not here, and need not be
    save_png(Image.new("RGB", (16, 16)), "other.png", other)
    assert run("gen", "--from", "other.png", "-m", model, "-o", "d.png")[0] == 0
    assert read_settings("d.png") == read_settings("c.png")


def test_a_speed_decides_what_is_not_said_and_is_repeated(run, model):
    def made(*options: str) -> dict[str, Any]:
        code, out, err = run("gen", "x", "-m", model, "--res", "128", "--seed", "7", *options)
        assert code == 0, err
        return read_settings(out.strip())

    exact, fast, said = made(), made("--speed", "fast"), made("--speed", "fast", "--order", "random")
    assert fast["steps"] < exact["steps"] and fast["order"] == "gtr" and "head_steps" in fast
    assert said == fast | {"order": "random"}
    Path("fast.png").write_bytes(Path("x-7-2.png").read_bytes())
    assert made("--from", "fast.png") == fast
    assert made("--from", "fast.png", "--speed", "exact") == exact
    kept = {"solver": "ddim", "temperature": 0.8, "order": "random"}
    options = ("--speed", "fast", "--solver", "ddim", "--temperature", "0.8", "--order", "random")
    other = made(*options, "-o", "other.png")
    assert kept.items() <= other.items()
    assert made("--from", "other.png", "--speed", "fast") == other, "it has that speed already"
    balanced = made("--from", "other.png", "--speed", "balanced")
    assert (balanced["solver"], balanced["temperature"]) == ("ddim", 0.8), "no speed decides about these"
    assert balanced["head_steps"] != other["head_steps"]


def test_a_speed_is_decided_anew_for_another_model(run, model, tiny_deepgen):
    assert run("gen", "x", "-m", model, "--res", "64", "--seed", "7", "--speed", "fast", "-o", "a.png")[0] == 0
    code, _, err = run("gen", "--from", "a.png", "-m", str(tiny_deepgen), "--dtype", "fp32", "-o", "b.png")
    assert code == 0, err
    settings = read_settings("b.png")
    assert settings["speed"] == "fast" and settings["steps"] == 18 and "head_steps" not in settings


def test_an_interval_without_a_round_is_told(run, model):
    code, _, err = run("gen", "x", "-m", model, "--res", "64", "--steps", "4", "--cfg-interval", "0.51:0.56")
    assert code == 0 and "no round of 4 begins in the cfg_interval 0.51 to 0.56: nothing is guided" in err


def test_from_repeats_a_picture_of_the_other_family_with_its_shortcuts(run, tiny_deepgen):
    options = ("--res", "64", "--steps", "4", "--seed", "5", "--block-cache", "0.7", "--cfg-interval", "0:0.5")
    assert run("gen", "x", "-m", str(tiny_deepgen), *options, "-o", "a.png")[0] == 0
    assert {"block_cache": 0.7, "cfg_interval": [0.0, 0.5]}.items() <= read_settings("a.png").items()
    assert run("gen", "--from", "a.png", "-o", "b.png")[0] == 0
    assert np.array_equal(pixels("a.png"), pixels("b.png")) and read_settings("a.png") == read_settings("b.png")
    assert run("gen", "--from", "a.png", "--block-cache", "0", "-o", "c.png")[0] == 0
    assert not np.array_equal(pixels("a.png"), pixels("c.png"))


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
def test_shortcuts_that_are_none_are_refused(run, model, options, said):
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


def test_auto_says_what_it_chose_and_pictures_do_not_say_auto(run, model):
    code, _, err = run(
        "gen", "x", "-m", model, *QUICK, "--quant", "auto", "--vram", "auto", "--drop-idle", "-o", "a.png"
    )
    found = read_settings("a.png")
    assert code == 0 and "auto" not in found.values() and "quant" not in found
    assert err == "quant auto: none, on the cpu\n"


def test_plan_promises_what_it_can_plan(run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    code, told, _ = run("plan", "--help")
    assert code == 0 and "--quant" in told and "int8-qk" in told and "--quiet" in told
    assert not any(word in told for word in ("nf4", "bnb8", "flash-attn", "xformers", "as stored"))


def test_arguments_are_in_capitals_and_repeat_once(run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    told = {command: run(command, "--help")[1] for command in ("ask", "convert", "info", "gen")}
    assert "QUESTION" in told["ask"] and "......" not in told["ask"] and "QUESTION...}" not in told["ask"]
    assert "SRC" in told["convert"] and "DST" in told["convert"] and "PATH" in told["info"]
    assert "DeepGen:" not in told["gen"], "UniPic-2 reuses blocks, too"


def test_names_that_list_shows_are_names(run, tiny_release):
    assert run("gen", "x", "-m", str(tiny_release), *QUICK, "-o", "a.png")[0] == 0
    name = read_settings("a.png")["model"]
    assert name in run("list")[1] and name.startswith("local-unipic-tiny-")
    assert run("gen", "--from", "a.png", "-o", "b.png")[0] == 0
    assert np.array_equal(pixels("a.png"), pixels("b.png"))
    assert "unipic" in run("info", name)[1] and run("verify", name)[0] == 0


def test_previews_are_saved_and_reported(run, model):
    options = ("--steps", "4", "--res", "128", "--preview-every", "2", "-o", "a.png", "--json")
    code, out, _ = run("gen", "x", "-m", model, *options)
    (preview,) = json.loads(out)["previews"]
    assert code == 0 and preview == {"path": "a-preview-2.png", "image": 0, "round": 2}
    assert pixels("a-preview-2.png").shape == (128, 128, 3)
    assert read_settings("a-preview-2.png") == read_settings("a.png") | {"preview_of_round": 2}


def test_a_name_too_long_for_previews_is_refused_before_the_work(run, model):
    code, out, err = run("gen", "x", "-m", model, "--preview-every", "1", "-o", "y" * 245 + ".png")
    assert code == 2 and "too long" in err and not out and not pngs()
    code, _, err = run("gen", "x", "-m", model, "-o", "y" * 300 + ".png")
    assert code == 2 and "too long" in err and not pngs()


def test_a_closed_stdout_is_told_before_the_work(run, model, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdout", None)
    assert main(["gen", "x", "-m", model, *QUICK, "-o", "-"]) == 2
    assert "stdout is closed" in capsys.readouterr().err


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


def test_an_empty_thing_to_avoid_is_one(run, model):
    assert run("gen", "x", "-m", model, *QUICK, "--negative", "", "-o", "a.png")[0] == 0
    assert read_settings("a.png")["negative"] == ""


def test_prompts_end_at_line_ends_alone(run, model):
    text = "a red circle\u2028on white\r\na blue\x0c ring\n"
    code, out, _ = run("gen", "-m", model, *QUICK, "-o", "a.png", "--prompt-file", "-", stdin=text.encode())
    assert code == 0 and len(out.split()) == 2
    code, _, err = run("gen", "-m", model, *QUICK, "--prompt-file", "-", stdin="a red circle".encode("utf-16-le"))
    assert code == 2 and "holds a null character: retype it, or save its file as UTF-8" in err


def test_wrong_settings_of_a_picture_are_told_with_its_name(run, model):
    for wrong in ({"size": "axb"}, {"seed": 3.5}, {"steps": "2"}, {"exact_rope": "yes"}):
        save_png(Image.new("RGB", (16, 16)), "odd.png", {"task": "generate", "prompt": "x", **wrong}, overwrite=True)
        code, _, err = run("gen", "--from", "odd.png", "-m", model)
        assert code == 2 and "odd.png carries" in err and "give the options by hand" in err


def test_exact_is_exact_whatever_a_picture_was_made_with(run, model):
    assert run("gen", "x", "-m", model, *QUICK, "--head-steps", "2:2", "-o", "a.png")[0] == 0
    assert run("gen", "--from", "a.png", "-m", model, "--speed", "exact", "-o", "b.png")[0] == 0
    assert "head_steps" not in read_settings("b.png") and read_settings("b.png")["steps"] > 2


def test_convert_says_that_a_folder_is_converted(run):
    code, _, err = run("convert", str(PACKAGED["pocket"]), "out")
    assert code == 2 and "is converted already: give it to --model as it is" in err


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_a_terminal_sees_rounds_and_the_time_left(model):
    import pty

    main_end, terminal_end = pty.openpty()
    arguments = [command(), "gen", "x", "-m", model, "--steps", "24", "--seed", "7", "--res", "128"]
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "120"}
    done = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=terminal_end, env=environment)
    os.close(terminal_end)
    seen = b""
    with suppress(OSError):  # what Linux reports when the other end is closed
        while piece := os.read(main_end, 4096):
            seen += piece
    os.close(main_end)
    assert done.communicate()[0] == b"x-7.png\n" and done.returncode == 0
    # Which rounds are seen depends on how often the bar is drawn; the time left is a dash until it is known.
    assert re.search(rb"round \d+ of 24", seen) and re.search(rb"(\d|-):(\d\d|--):(\d\d|--)", seen)


def test_from_refuses_edits_and_models_that_would_be_downloaded(run):
    image = Image.new("RGB", (16, 16))
    save_png(image, "edit.png", {"task": "edit", "prompt": "x"})
    save_png(image, "far.png", {"task": "generate", "prompt": "x", "model": "some/model"})
    image.save("plain.png")
    for name, what in (("edit", "made by 'edit'"), ("far", "give --model"), ("plain", "no unipic-run settings")):
        code, _, err = run("gen", "--from", f"{name}.png")
        assert code == 2 and what in err


def test_edit_a_mask_and_outpainting(run, model, photo):
    code, out, _ = run("edit", photo, "make it night", "-m", model, *QUICK, "-q")
    assert code == 0 and pixels(out.strip()).shape[0] % 16 == 0
    mask = Image.new("L", (120, 96))
    mask.paste(255, (0, 0, 40, 96))
    mask.save("mask.png")
    quick = ("-m", model, "--steps", "2", "--seed", "7", "-q")
    assert run("edit", photo, "a wall", "--mask", "mask.png", *quick, "-o", "wall.png")[0] == 0
    with Image.open(photo) as source:
        before, after = np.asarray(source.convert("RGB")), pixels("wall.png")
    assert np.array_equal(after[:, 40:], before[:, 40:]) and not np.array_equal(after[:, :40], before[:, :40])
    assert run("edit", photo, "a wall", "--outpaint", "0,0,8,16", *quick, "-o", "{task}.png")[0] == 0
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


def test_a_drawn_seed_is_said_where_nothing_else_tells_it(run, model, photo):
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


def test_json_is_one_object_also_for_failures(run, model):
    code, out, _ = run("gen", "x", "-m", model, *QUICK, "-n", "2", "--json")
    found = json.loads(out)
    assert code == 0 and [Path(row["path"]).exists() for row in found["images"]] == [True, True]
    assert [row["seed"] for row in found["images"]] == [7, 8] and found["images"][0]["settings"]["steps"] == 2
    assert {"timings", "peak_bytes", "attention"} <= found.keys() and found["timings"]["sample"] > 0
    code, out, err = run("gen", "x", "--json", "--unknown")
    assert code == 2 and json.loads(out)["error"]["code"] == "usage" and err.count("\n") == 1
    code, out, _ = run("gen", "x", "--json", "-m", "nothing-of-that-name")
    assert code == 4 and json.loads(out)["error"].keys() == {"code", "message", "remedy"}


def test_prompts_come_from_one_place_stdin_file_or_line(run, model):
    code, out, _ = run("gen", "-", "-m", model, *QUICK, "-o", "{index}.png", stdin="one\n\n zwei ü\r\n".encode())
    assert (code, out) == (0, "1.png\n2.png\n") and read_settings("2.png")["prompt"] == "zwei ü"
    Path("prompts.txt").write_bytes(b"\xef\xbb\xbfone\n")
    assert run("gen", "--prompt-file", "prompts.txt", "-m", model, *QUICK, "-o", "file.png")[0] == 0
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


def test_a_prompt_of_100_kb_is_refused_in_seconds(run, model):
    start = time.monotonic()
    code, _, err = run("gen", "-", "-m", model, *QUICK, stdin=b"word " * 20_000)
    assert code == 2 and "shorten the prompt" in err and len(err) < 3000
    assert time.monotonic() - start < 20 and not pngs()


def test_an_existing_output_is_refused_before_the_work(run):
    Path("a.png").write_bytes(b"precious")
    Path("b-2.png").write_bytes(b"precious")
    for arguments in (["-o", "a.png"], ["-o", "b.png", "-n", "3"]):
        code, _, err = run("gen", "x", "-m", "not-even-looked-for", *arguments)
        assert code == 2 and "exists already" in err
    assert Path("a.png").read_bytes() == b"precious"


def test_several_pictures_number_a_plain_path_and_overwrite_replaces(run, model):
    Path("a-2.png").write_bytes(b"old")
    code, out, _ = run("gen", "x", "-m", model, *QUICK, "-n", "2", "-o", "a.png", "--overwrite", "--preview-every", "1")
    assert (code, out.split()) == (0, ["a-1.png", "a-2.png"])
    assert pngs() == ["a-1-preview-1.png", "a-1.png", "a-2-preview-1.png", "a-2.png"]
    assert all(pixels(name).shape == (128, 128, 3) for name in pngs())
    assert run("gen", "x", "-m", model, *QUICK, "-o", "plain.png", "--no-metadata")[0] == 0
    assert np.array_equal(pixels("plain.png"), pixels("a-1.png")) and run("info", "plain.png")[0] == 2


def test_outputs_keep_what_appeared_while_the_work_went_on(tmp_path):
    outputs = Outputs("late.png")
    outputs.check([{}])
    Path("late.png").write_bytes(b"somebody else's")
    assert outputs.save(0, Image.new("RGB", (16, 16)), {}) == Path("late-2.png")
    (tmp_path / "a{b").mkdir()
    inside = Outputs("a{b")
    inside.check([{"prompt": "x", "seed": 1}])
    assert inside.place(0, {"prompt": "x", "seed": 1}) == Path("a{b", "x-1.png")
    with pytest.raises(OutputError):
        Outputs("gone/").check([{"prompt": "x", "seed": 1}])


def test_expected_settings_are_those_of_the_pictures(tiny_engine):
    """Names are checked before the work with settings that have the same fields, seeds and order as the real ones."""
    order = Order("generate", ("a", "b"), Sampling(seed=2**64 - 1, n=2, steps=2), {"size": "128x128"})
    expected = order.expected_settings(order.settled(tiny_engine))
    assert [(e["prompt"], e["seed"]) for e in expected] == [("a", 2**64 - 1), ("a", 0), ("b", 2**64 - 1), ("b", 0)]
    real = tiny_engine.generate("a", seed=2**64 - 1, steps=2, res=128).settings[0]
    assert real == expected[0], "once the model is loaded"

    def usable(settings: dict[str, Any]) -> dict[str, bool]:
        return {
            name: isinstance(value, str) for name, value in settings.items() if isinstance(value, str | int | float)
        }

    before = usable(order.expected_settings()[0])
    assert usable(real).items() <= before.items() and before.keys() - real.keys() == {"quant", "exact_rope"}


def test_names_may_use_what_only_the_model_knows(run, model):
    quick = ("gen", "x", "-m", model, "--res", "128", "--seed", "7")
    Path("3").mkdir()
    assert run(*quick, "--speed", "fast", "--steps", "3", "-o", "{steps}/{cfg_cache:.1f}.png")[1] == "3/2.0.png\n"
    Path("sdpa").mkdir()
    assert run(*quick, "--steps", "2", "-o", "{attention}/{seed}.png")[1] == "sdpa/7.png\n"
    assert run(*quick, "--steps", "2", "--quant", "int8", "-o", "{quant}-{seed}.png")[1] == "int8-7.png\n"
    for name, what in (
        ("{quant}-{seed}.png", "unknown field 'quant'"),
        ("{dtype}/{seed}.png", "'fp32' does not exist"),
    ):
        code, out, err = run(*quick, "--steps", "9999", "-o", name)
        assert code == 2 and what in err and not out, "before the pictures are made"


def test_a_folder_that_only_the_finished_picture_names_loses_none(run, model, photo):
    quick = ("edit", photo, "x", "-m", model, *QUICK, "-o", "{size}/{seed}.png")
    code, out, err = run(*quick)
    size = re.search(r"the folder '(\d+x\d+)' does not exist", err)[1]
    assert (code, out) == (0, "7.png\n") and "x".join(map(str, pixels("7.png").shape[1::-1])) == size
    assert run(*quick, "--overwrite")[1] == "7-2.png\n", "nobody said to overwrite that one"
    Path(size).mkdir()
    assert run(*quick)[1] == f"{size}/7.png\n"


def test_pull_list_info_verify_on_what_is_here(run, model, tiny_release):
    assert run("verify", model)[1].startswith(f"ok {model}")
    assert run("convert", str(tiny_release), "int8", "--quant", "int8")[0] == 0
    counts = [json.loads(run("info", folder, "--json")[1])["parameters"] for folder in (model, "int8")]
    assert counts[0] == counts[1], "scales are no parameters"
    for folder, layout in ((model, "converted"), (str(tiny_release), "released")):
        found = json.loads(run("info", folder, "--json")[1])
        assert (found["layout"], found["family"]) == (layout, "unipic") and found["parameters"] > 10**6
        assert found["licence"] and "never run by us" in found["note"]
    assert json.loads(run("list", "--json")[1])["models"][1]["path"] is None
    code, out, err = run("pull", str(tiny_release))
    assert code == 0 and "licence" in err
    assert json.loads(run("list", "--json")[1])["models"][1]["path"] == out.strip()
    weights = next(Path(out.strip()).glob("*.safetensors"))
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    code, _, err = run("verify", Path(out.strip()).name)
    assert code == 5 and "has changed" in err
    assert "not on this machine" in run("info", "unipic")[1]
    code, _, err = run("info", "")
    assert code == 2 and "the name '' is empty" in err


def test_doctor_runs_here_and_speaks_json(run):
    code, out, _ = run("doctor", "--json")
    states = {check["name"]: check["state"] for check in json.loads(out)["checks"]}
    assert code == (1 if "fail" in states.values() else 0) and states["python"] == "ok" and states["models"] == "warn"


def test_an_unexpected_failure_is_one_line_and_debug_shows_the_rest(run, monkeypatch):
    monkeypatch.setattr("unipic_run.engine.hub.list_models", lambda: 1 / 0)
    code, _, err = run("list")
    assert code == 1 and err == "error: ZeroDivisionError: division by zero: run with --debug for the traceback\n"
    assert "Traceback" in run("list", "--debug")[2]


def test_a_size_far_from_the_trained_one_is_noted_once_and_q_is_silent(run, model):
    code, out, err = run("gen", "x", "-m", model, "--steps", "1", "--res", "32", "-n", "2", "-o", "a.png")
    assert code == 0 and len(out.split()) == 2 and err.startswith("note: 32x32") and err.count("\n") == 1
    assert run("gen", "x", "-m", model, "--steps", "1", "--res", "32", "-o", "b.png", "-q")[2] == ""


def test_help_needs_no_torch():
    code = "import sys; from unipic_run.cli import main; sys.exit(main(['gen', '--help']) or 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "--cfg-schedule" in done.stdout, done.stderr


def test_the_installed_command_writes_png_bytes_to_a_pipe(model):
    done = subprocess.run([command(), "gen", "x", "-m", model, *QUICK, "-o", "-"], capture_output=True, timeout=120)
    assert done.returncode == 0 and done.stderr == b""
    with Image.open(io.BytesIO(done.stdout)) as image:
        assert image.size == (128, 128)


def interruptible(arguments):
    """A process that hears of SIGINT, which shells let their background jobs ignore."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(arguments, **pipes, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGINT between processes")
def test_ctrl_c_stops_within_a_round_and_keeps_what_was_finished(model, tmp_path):
    arguments = [command(), "gen", "x", "-m", model, "--seed", "1", "-n", "500", "--steps", "4", "--json"]
    process = interruptible(arguments)
    deadline = time.monotonic() + 60
    while not pngs() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=20)
    assert process.returncode == 130 and err == "error: cancelled\n"
    found = json.loads(out)
    assert found["error"]["code"] == "cancelled" and {row["path"] for row in found["images"]} <= set(pngs())
    assert len(pngs()) - len(found["images"]) in (0, 1)  # the signal may fall between a picture and its entry
    assert all(pixels(name).any() for name in pngs())
    assert not list(tmp_path.glob(".*partial*"))


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGINT between processes")
def test_ctrl_c_in_the_first_picture_leaves_nothing(model):
    arguments = [command(), "gen", "x", "-m", model, "--steps", "10000", "--size", "512x512", "-o", "{seed}.png"]
    process = interruptible(arguments)
    assert process.stderr.readline().startswith("note: 512x512")  # the engine has begun
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=20)
    assert (process.returncode, out, err) == (130, "", "error: cancelled\n") and not pngs()


def test_what_no_picture_will_have_is_refused_before_a_model_is_looked_for(run):
    code, _, err = run("gen", "x", "-m", "someone/nowhere", "--offline", "-o", "{cfg_interval}-{seed}.png")
    assert code == 2 and "cfg_interval" in err


def test_a_question_to_a_model_that_answers_none_fetches_nothing(run, photo):
    code, _, err = run("ask", photo, "what is it?", "--model", "unipic2-kontext", "--offline")
    assert code == 2 and "does not answer questions" in err


@pytest.mark.parametrize("name", ["~nobody-of-this-name/m", "m" * 300])
def test_a_name_that_can_be_no_path_is_no_model(run, name):
    save_png(Image.new("RGB", (16, 16)), "hostile.png", {"task": "generate", "prompt": "x", "model": name})
    for words, code in ((("gen", "x", "-m", name), 4), (("gen", "--from", "hostile.png"), 2), (("verify", name), 4)):
        assert run(*words)[0] == code
    assert run("info", name)[0] == 2


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
@pytest.mark.parametrize(
    ("streams", "code", "told"),
    [
        ("2>&-", 0, ""),
        ("2>/dev/full", 0, ""),
        (">&-", 0, ""),
        (">/dev/full", 2, "error: stdout cannot be written (No space left on device): make room"),
    ],
)
def test_pictures_are_saved_whether_or_not_somebody_hears_of_them(model, streams, code, told):
    words = [command(), "gen", "x", "-m", model, "--steps", "1", "--res", "32", "-n", "2", "-o", "a.png"]
    done = subprocess.run(["sh", "-c", f'"$@" {streams}', "sh", *words], capture_output=True, text=True, timeout=300)
    assert done.returncode == code and pngs() == ["a-1.png", "a-2.png"]
    assert told in done.stderr and "Traceback" not in done.stderr and done.stderr.count("\n") <= 2, "a note, an error"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_what_stdout_cannot_take_is_one_line(tmp_path):
    for words in (["list", "--json"], ["list"]):
        done = subprocess.run(["sh", "-c", '"$@" >/dev/full', "sh", command(), *words], capture_output=True, text=True)
        assert done.returncode == 2 and done.stderr.startswith("error: stdout cannot be written")
        assert done.stderr.count("\n") == 1


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGPIPE")
def test_a_reader_that_goes_away_is_no_news():
    process = subprocess.Popen([command(), "list"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait(60) == 141


def test_an_unwritable_folder_is_refused_first(run):
    if os.name == "nt" or os.geteuid() == 0:
        pytest.skip("permissions do not bind this user")
    Path("closed").mkdir(mode=0o500)
    code, _, err = run("gen", "x", "-o", "closed/a.png")
    assert code == 2 and "not writable" in err


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


def test_words_become_values():
    assert parse_size("1024x768") == (1024, 768) and parse_outpaint("0,16,32,0") == (0, 16, 32, 0)
    for text in ("1024", "x", "-1x16", "1e3x16", "16x16x16", "٣x16"):
        with pytest.raises(UsageError):
            parse_size(text)
    assert printable("a\x1b[31mb\nc\x9b") == "a\\x1b[31mb\nc\\x9b"
