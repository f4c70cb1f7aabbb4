"""What doctor says of made-up cards; the plans are those of a tiny model, at sizes that take no time."""

import json

import pytest
from unipic_run.bench.random_model import architecture
from unipic_run.cli import main
from unipic_run.engine import families, fits
from unipic_run.engine.budget import CONTEXT
from unipic_run.engine.errors import UnsupportedDeviceError
from unipic_run.engine.facts import Gpu
from unipic_run.engine.fits import fits_on, told

GIB = 2**30
CARD = Gpu("NVIDIA GeForce RTX 3060", (8, 6), 11 * GIB, 12 * GIB)


@pytest.fixture(autouse=True)
def small(tiny_release, tmp_path, monkeypatch):
    monkeypatch.setenv("UNIPIC_RUN_CACHE", str(tmp_path))
    config = architecture(str(tiny_release))
    unipic = families.FAMILIES["unipic"]
    monkeypatch.setattr(families, "FAMILIES", {"unipic": unipic})
    monkeypatch.setattr(families, "architecture", lambda model: (unipic, config))
    wanted = [(res, quant, task) for res in (64, 32) for quant, task in (("none", "gen"), ("int8", "ask"))]
    monkeypatch.setattr(fits, "WANTED", wanted)


def test_rows_of_a_known_card():
    found = fits_on([CARD, CARD], patience=60)
    assert [(fit.res, fit.quant, fit.task) for fit in found] == fits.WANTED, "two cards of a kind are told of once"
    assert {fit.state for fit in found} == {"fits"} and all(fit.peak_bytes > 0 and fit.seconds > 0 for fit in found)
    text = "\n".join(told(found))
    assert "unipic on NVIDIA GeForce RTX 3060" in text and "predicted" in text
    assert "gen    64 bf16  all resident" in text and "about" in text


def test_without_patience_only_what_is_kept_is_told():
    rows = fits_on([CARD], patience=0)
    assert {fit.state for fit in rows} == {"not planned"}
    assert rows[0].line == "unipic-run plan gen --model unipic --res 64 --quant none --gpu rtx3060 --vram 12.0"
    fits_on([CARD], patience=60)
    assert {fit.state for fit in fits_on([CARD], patience=0)} == {"fits"}


def test_models_whose_packages_are_missing_are_named_with_the_remedy(monkeypatch):
    def fails(*given, **how):
        raise UnsupportedDeviceError("transformers is not installed", "install unipic-run[unipic2]")

    monkeypatch.setattr(fits, "ask_for", fails)
    assert {(fit.state, fit.line) for fit in fits_on([CARD])} == {("not planned", "install unipic-run[unipic2]")}


def test_cards_that_are_too_small_or_unknown():
    tiny = Gpu("NVIDIA GeForce RTX 3060", (8, 6), 0, CONTEXT + 10_000)
    first = fits_on([tiny], patience=60)[0]
    assert first.state == "too large" and "are the least" in first.line and first.peak_bytes is None
    other = fits_on([Gpu("NVIDIA TITAN V", (7, 0), GIB, 12 * GIB)], patience=60)[0]
    assert other.state == "fits" and other.seconds is None and "about" not in other.line and other.peak_bytes > 0


def test_without_a_card_it_points_to_plan(capsys):
    (line,) = told(fits_on([]))
    assert "no GPU" in line and "unipic-run plan" in line
    main(["doctor", "--json"])
    assert isinstance(json.loads(capsys.readouterr().out)["fits"], list)
