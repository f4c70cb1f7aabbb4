"""`--quant` as a user meets it: a smaller folder, pictures that say how they were made, and make themselves again."""

import json

import pytest
from unipic_run.cli import main
from unipic_run.engine.png_metadata import read_settings

QUICK = ("--steps", "2", "--seed", "7", "--res", "64", "-q")


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("UNIPIC_RUN_CACHE", str(tmp_path / "cache"))


def test_a_picture_repeats_with_the_weights_it_was_made_with(tiny_release, tmp_path, capsys):
    assert main(["gen", "a red fox", "-m", str(tiny_release), "--quant", "int8", "-o", "a.png", *QUICK]) == 0
    assert read_settings("a.png")["quant"] == "int8"
    assert main(["convert", str(tiny_release), "small", "--quant", "int8", "-q"]) == 0
    # The folder is int8 by itself, and what the picture asks for fits it.
    assert main(["gen", "--from", "a.png", "-m", "small", "-o", "b.png", "-q"]) == 0
    assert main(["gen", "a red fox", "-m", "small", "-o", "c.png", *QUICK]) == 0
    assert len({(tmp_path / f"{name}.png").read_bytes() for name in "bc"}) == 1
    assert read_settings("b.png") == {**read_settings("a.png"), "model": "small"}
    assert main(["gen", "a red fox", "-m", str(tiny_release), "-o", "d.png", *QUICK]) == 0
    assert "quant" not in read_settings("d.png")

    capsys.readouterr()
    assert main(["info", "small", "--json"]) == 0
    kinds = json.loads(capsys.readouterr().out)["tensors"]
    assert kinds["I8"] == 34 and kinds["F32"] > 34


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("gen", "x", "-m", "none", "--quant", "int5"), "choose from auto, none, int8, bnb8, nf4"),
        (("convert", "none", "small", "--quant", "bnb8"), "convert for none or int8"),
    ],
)
def test_unknown_schemes_are_refused_before_anything_is_read(arguments, said, capsys):
    assert main([*arguments]) == 2
    assert said in capsys.readouterr().err
