"""The price of a shortcut is of pairs, and the bench tells it of every way."""

import hashlib
import json
from itertools import pairwise

import numpy as np
import pytest
from PIL import Image
from unipic_run.bench import frontier, paired, shortcuts
from unipic_run.engine.checkpoint.cache import PACKAGED
from unipic_run.engine.errors import UsageError


def test_a_price_counts_pairs_and_its_interval_shrinks_where_they_agree():
    exact = np.array([True] * 60 + [False] * 40)
    same = paired.price(exact, exact)
    assert (same["lost"], same["low"], same["high"]) == (0.0, 0.0, 0.0) and same["right"] == 0.6
    worse = exact.copy()
    worse[:10] = False
    one_way = paired.price(exact, worse)
    assert one_way["lost"] == pytest.approx(0.1) and 0.0 < one_way["low"] < 0.1 < one_way["high"] < 0.2
    swapped = exact.copy()
    swapped[20:60], swapped[60:90] = False, True  # the same loss, of prompts that come and go
    both_ways = paired.price(exact, swapped)
    assert both_ways["lost"] == pytest.approx(0.1)
    assert both_ways["high"] - both_ways["low"] > 2 * (one_way["high"] - one_way["low"])


def test_dots_of_like_seconds_are_moved_apart_and_no_further():
    moved = frontier.spread([100.0, 200.0, 200.0, 202.0, 400.0])
    assert (moved[0], moved[-1]) == (100.0, 400.0) and moved == sorted(moved)
    assert all(b - a >= frontier.APART for a, b in pairwise(moved))
    assert max(abs(a - b) for a, b in zip(moved, [100.0, 200.0, 200.0, 202.0, 400.0], strict=True)) <= frontier.APART


def test_rounds_and_head_steps_are_shares_of_the_models():
    assert shortcuts.scaled({"steps": 0.5, "head_steps": (1, 0.1)}, 16, 50) == {"steps": 8, "head_steps": (50, 5)}
    assert shortcuts.scaled({"order": "gtr"}, 16, 50) == {"order": "gtr"}


def test_every_way_is_made_of_the_same_prompts_and_another_sitting_goes_on(capsys, monkeypatch, tmp_path):
    """Seconds of the big model are planned elsewhere."""
    for bench in (shortcuts, frontier):
        monkeypatch.setattr(bench, "predicted", lambda how: 1.0)
    monkeypatch.setattr(paired, "TURN", 4)
    out, png = tmp_path / "prices.json", tmp_path / "prices.png"
    asked = ["--each", "1", "--device", "cpu", "--only", "half the rounds", "--out", str(out)]
    assert shortcuts.main([*asked, "--minutes", "0.0001"]) == 0 and json.loads(out.read_text())["pictures"] == 4
    first = json.loads(out.read_text())["right"]
    capsys.readouterr()
    assert shortcuts.main(asked) == 0
    told = json.loads(capsys.readouterr().out)
    assert told == json.loads(out.read_text()) and told["pictures"] == 6
    assert all(told["right"][name].startswith(right) for name, right in first.items())
    assert told["weights"] == hashlib.sha256((PACKAGED["pocket"] / "model.safetensors").read_bytes()).hexdigest()[:12]
    assert list(told["ways"]) == ["exact", "half the rounds"] and told["ways"]["exact"]["lost"] == 0.0
    assert 0.2 < told["ways"]["half the rounds"]["ratio"] < 0.95
    with pytest.raises(UsageError, match="holds other ways"):
        shortcuts.main([*asked, "--seed", "1"])
    assert frontier.main([str(out), str(png)]) == 0 and Image.open(png).size == (frontier.WIDTH, frontier.HEIGHT)


@pytest.mark.parametrize(("wrong", "status", "excluded"), [(60, 1, False), (12, 0, False), (3, 0, True)])
def test_a_preset_that_certainly_loses_more_than_it_may_fails(capsys, monkeypatch, tmp_path, wrong, status, excluded):
    def turn(self, ways, samples):
        self.right = {"exact": "1" * 600, "balanced": "0" * wrong + "1" * (600 - wrong)}
        self.seconds = {"exact": 1.0, "balanced": 1.0}

    monkeypatch.setattr(paired.Series, "turn", turn)
    monkeypatch.setattr(paired, "generations", lambda *given: [])
    monkeypatch.setattr(shortcuts, "predicted", lambda how: 1.0)
    asked = ["--each", "1", "--device", "cpu", "--only", "balanced", "--out", str(tmp_path / "prices.json")]
    assert shortcuts.main(asked) == status
    told = json.loads(capsys.readouterr().out)
    assert told["lost more"] == ["balanced"] * status and told["ways"]["balanced"]["excluded"] is excluded


def test_what_was_measured_of_the_presets_keeps_to_their_bounds(root):
    newest = max((root / "bench" / "results").glob("shortcuts-presets-*.json"))
    ways = json.loads(newest.read_text("utf-8"))["ways"]
    for name, most in shortcuts.MOST.items():
        assert ways[name]["high"] < most, f"{newest.name}: {name} may lose more"
