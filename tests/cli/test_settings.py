"""What pictures carry, and what repeats or changes it: --from, --speed, auto."""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from unipic_run.engine.png_metadata import read_settings, save_png
from unipic_run.engine.sampling import Sampling
from unipic_run.engine.saving import Order


def test_from_repeats_a_picture_and_options_on_the_line_win(run, model, pixels):
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


def test_from_repeats_attention_where_it_changes_the_picture(run, model, pixels, quick):
    made = ("gen", "x", "-m", model, *quick, "--quant", "int8", "--attn", "int8-qk", "-o", "a.png")
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


def test_from_repeats_a_picture_of_the_other_family_with_its_shortcuts(run, tiny_deepgen, pixels):
    options = ("--res", "64", "--steps", "4", "--seed", "5", "--block-cache", "0.7", "--cfg-interval", "0:0.5")
    assert run("gen", "x", "-m", str(tiny_deepgen), *options, "-o", "a.png")[0] == 0
    assert {"block_cache": 0.7, "cfg_interval": [0.0, 0.5]}.items() <= read_settings("a.png").items()
    assert run("gen", "--from", "a.png", "-o", "b.png")[0] == 0
    assert np.array_equal(pixels("a.png"), pixels("b.png")) and read_settings("a.png") == read_settings("b.png")
    assert run("gen", "--from", "a.png", "--block-cache", "0", "-o", "c.png")[0] == 0
    assert not np.array_equal(pixels("a.png"), pixels("c.png"))


def test_auto_says_what_it_chose_and_pictures_do_not_say_auto(run, model, quick):
    code, _, err = run(
        "gen", "x", "-m", model, *quick, "--quant", "auto", "--vram", "auto", "--drop-idle", "-o", "a.png"
    )
    found = read_settings("a.png")
    assert code == 0 and "auto" not in found.values() and "quant" not in found
    assert err == "quant auto: none, on the cpu\n"


def test_names_that_list_shows_are_names(run, tiny_release, pixels, quick):
    assert run("gen", "x", "-m", str(tiny_release), *quick, "-o", "a.png")[0] == 0
    name = read_settings("a.png")["model"]
    assert name in run("list")[1] and name.startswith("local-unipic-tiny-")
    assert run("gen", "--from", "a.png", "-o", "b.png")[0] == 0
    assert np.array_equal(pixels("a.png"), pixels("b.png"))
    assert "unipic" in run("info", name)[1] and run("verify", name)[0] == 0


def test_an_empty_thing_to_avoid_is_one(run, model, quick):
    assert run("gen", "x", "-m", model, *quick, "--negative", "", "-o", "a.png")[0] == 0
    assert read_settings("a.png")["negative"] == ""


def test_wrong_settings_of_a_picture_are_told_with_its_name(run, model):
    for wrong in ({"size": "axb"}, {"seed": 3.5}, {"steps": "2"}, {"exact_rope": "yes"}):
        save_png(Image.new("RGB", (16, 16)), "odd.png", {"task": "generate", "prompt": "x", **wrong}, overwrite=True)
        code, _, err = run("gen", "--from", "odd.png", "-m", model)
        assert code == 2 and "odd.png carries" in err and "give the options by hand" in err


def test_exact_is_exact_whatever_a_picture_was_made_with(run, model, quick):
    assert run("gen", "x", "-m", model, *quick, "--head-steps", "2:2", "-o", "a.png")[0] == 0
    assert run("gen", "--from", "a.png", "-m", model, "--speed", "exact", "-o", "b.png")[0] == 0
    assert "head_steps" not in read_settings("b.png") and read_settings("b.png")["steps"] > 2


def test_from_refuses_edits_and_models_that_would_be_downloaded(run):
    image = Image.new("RGB", (16, 16))
    save_png(image, "edit.png", {"task": "edit", "prompt": "x"})
    save_png(image, "far.png", {"task": "generate", "prompt": "x", "model": "some/model"})
    image.save("plain.png")
    for name, what in (("edit", "made by 'edit'"), ("far", "give --model"), ("plain", "no unipic-run settings")):
        code, _, err = run("gen", "--from", f"{name}.png")
        assert code == 2 and what in err


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
