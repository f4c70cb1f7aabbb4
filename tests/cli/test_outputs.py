"""Where pictures and previews go, and that nothing is lost on the way."""

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from unipic_run.engine.errors import OutputError
from unipic_run.engine.outputs import Outputs
from unipic_run.engine.png_metadata import read_settings


def test_gen_names_pictures_after_prompt_and_seed_and_never_replaces_one(run, model, pixels, quick):
    code, out, err = run("gen", "a red fox", "-m", model, *quick)
    assert (code, out, err) == (0, "a_red_fox-7.png\n", "")
    assert pixels("a_red_fox-7.png").shape == (128, 128, 3)
    assert run("gen", "a red fox", "-m", model, *quick)[1] == "a_red_fox-7-2.png\n"


def test_previews_are_saved_and_reported(run, model, pixels):
    options = ("--steps", "4", "--res", "128", "--preview-every", "2", "-o", "a.png", "--json")
    code, out, _ = run("gen", "x", "-m", model, *options)
    (preview,) = json.loads(out)["previews"]
    assert code == 0 and preview == {"path": "a-preview-2.png", "image": 0, "round": 2}
    assert pixels("a-preview-2.png").shape == (128, 128, 3)
    assert read_settings("a-preview-2.png") == read_settings("a.png") | {"preview_of_round": 2}


def test_a_name_too_long_for_previews_is_refused_before_the_work(run, model, pngs):
    code, out, err = run("gen", "x", "-m", model, "--preview-every", "1", "-o", "y" * 245 + ".png")
    assert code == 2 and "too long" in err and not out and not pngs()
    code, _, err = run("gen", "x", "-m", model, "-o", "y" * 300 + ".png")
    assert code == 2 and "too long" in err and not pngs()


def test_json_is_one_object_also_for_failures(run, model, quick):
    code, out, _ = run("gen", "x", "-m", model, *quick, "-n", "2", "--json")
    found = json.loads(out)
    assert code == 0 and [Path(row["path"]).exists() for row in found["images"]] == [True, True]
    assert [row["seed"] for row in found["images"]] == [7, 8] and found["images"][0]["settings"]["steps"] == 2
    assert {"timings", "peak_bytes", "attention"} <= found.keys() and found["timings"]["sample"] > 0
    code, out, err = run("gen", "x", "--json", "--unknown")
    assert code == 2 and json.loads(out)["error"]["code"] == "usage" and err.count("\n") == 1
    code, out, _ = run("gen", "x", "--json", "-m", "nothing-of-that-name")
    assert code == 4 and json.loads(out)["error"].keys() == {"code", "message", "remedy"}


def test_an_existing_output_is_refused_before_the_work(run):
    Path("a.png").write_bytes(b"precious")
    Path("b-2.png").write_bytes(b"precious")
    for arguments in (["-o", "a.png"], ["-o", "b.png", "-n", "3"]):
        code, _, err = run("gen", "x", "-m", "not-even-looked-for", *arguments)
        assert code == 2 and "exists already" in err
    assert Path("a.png").read_bytes() == b"precious"


def test_several_pictures_number_a_plain_path_and_overwrite_replaces(run, model, pixels, pngs, quick):
    Path("a-2.png").write_bytes(b"old")
    code, out, _ = run("gen", "x", "-m", model, *quick, "-n", "2", "-o", "a.png", "--overwrite", "--preview-every", "1")
    assert (code, out.split()) == (0, ["a-1.png", "a-2.png"])
    assert pngs() == ["a-1-preview-1.png", "a-1.png", "a-2-preview-1.png", "a-2.png"]
    assert all(pixels(name).shape == (128, 128, 3) for name in pngs())
    assert run("gen", "x", "-m", model, *quick, "-o", "plain.png", "--no-metadata")[0] == 0
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


def test_a_folder_that_only_the_finished_picture_names_loses_none(run, model, photo, pixels, quick):
    edit = ("edit", photo, "x", "-m", model, *quick, "-o", "{size}/{seed}.png")
    code, out, err = run(*edit)
    size = re.search(r"the folder '(\d+x\d+)' does not exist", err)[1]
    assert (code, out) == (0, "7.png\n") and "x".join(map(str, pixels("7.png").shape[1::-1])) == size
    assert run(*edit, "--overwrite")[1] == "7-2.png\n", "nobody said to overwrite that one"
    Path(size).mkdir()
    assert run(*edit)[1] == f"{size}/7.png\n"


def test_what_no_picture_will_have_is_refused_before_a_model_is_looked_for(run):
    code, _, err = run("gen", "x", "-m", "someone/nowhere", "--offline", "-o", "{cfg_interval}-{seed}.png")
    assert code == 2 and "cfg_interval" in err


def test_an_unwritable_folder_is_refused_first(run):
    if os.name == "nt" or os.geteuid() == 0:
        pytest.skip("permissions do not bind this user")
    Path("closed").mkdir(mode=0o500)
    code, _, err = run("gen", "x", "-o", "closed/a.png")
    assert code == 2 and "not writable" in err
