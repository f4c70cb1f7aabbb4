"""The price of a shortcut is of pairs, and the bench tells it of every way."""

import json

import numpy as np
import pytest
from unipic_run.bench import shortcuts


def test_a_price_counts_pairs_and_its_interval_shrinks_where_they_agree():
    exact = np.array([True] * 60 + [False] * 40)
    same = shortcuts.price(exact, exact)
    assert (same["lost"], same["low"], same["high"]) == (0.0, 0.0, 0.0) and same["right"] == 0.6
    worse = exact.copy()
    worse[:10] = False
    one_way = shortcuts.price(exact, worse)
    assert one_way["lost"] == pytest.approx(0.1) and 0.0 < one_way["low"] < 0.1 < one_way["high"] < 0.2
    swapped = exact.copy()
    swapped[20:60], swapped[60:90] = False, True  # the same loss, of prompts that come and go
    both_ways = shortcuts.price(exact, swapped)
    assert both_ways["lost"] == pytest.approx(0.1)
    assert both_ways["high"] - both_ways["low"] > 2 * (one_way["high"] - one_way["low"])


def test_rounds_are_a_share_of_the_models():
    assert shortcuts.at({"steps": 0.5}, 16) == {"steps": 8}
    assert shortcuts.at({"order": "gtr"}, 16) == {"order": "gtr"}


def test_every_way_is_made_of_the_same_prompts_and_told(capsys, monkeypatch, tmp_path):
    """Seconds of the big model are planned elsewhere."""
    monkeypatch.setattr(shortcuts, "predicted", lambda how: {"predicted": 1.0})
    out = tmp_path / "prices.json"
    assert shortcuts.main(["--each", "1", "--device", "cpu", "--only", "half the rounds", "--out", str(out)]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told == json.loads(out.read_text()) and told["pictures"] == 6
    assert list(told["ways"]) == ["exact", "half the rounds"] and told["ways"]["exact"]["lost"] == 0.0
    assert 0.2 < told["ways"]["half the rounds"]["ratio"] < 0.95
