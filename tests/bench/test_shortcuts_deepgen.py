"""How far a shortcut goes is told of the same pictures, and its seconds lie between those of two plans."""

import json

import pytest
from unipic_run.bench import shortcuts_deepgen as bench

pytestmark = pytest.mark.filterwarnings("ignore::unipic_run.engine.errors.UnipicWarning")


@pytest.fixture(autouse=True)
def plans(monkeypatch):
    """Seconds of the big model are planned elsewhere: here 1 a step, of which blocks that are reused take none."""
    monkeypatch.setattr(
        bench,
        "planned",
        lambda steps, interval, threshold: steps * (1 - bench.most(steps, interval) * (threshold == 1.0)),
    )


def test_seconds_are_as_many_as_the_share_that_ran():
    assert bench.most(50, (0.0, 1.0)) == 1 - 13 / 50 and bench.guided(50, (0.0, 0.6)) == 30
    assert bench.predicted({}, 0.0) == bench.predicted({"block_cache": 0.3}, 0.0) == 50
    assert bench.predicted({"block_cache": 0.3}, 0.5) == 25
    assert bench.predicted({"block_cache": 1.0}, bench.most(50, (0.0, 1.0))) == pytest.approx(13)


def test_every_way_is_measured_against_exact_pictures(capsys, monkeypatch, tmp_path, tiny_deepgen):
    monkeypatch.setenv("UNIPIC_RUN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(bench, "STEPS", 5)
    ways = {name: bench.WAYS[name] for name in ("exact", "guidance 0:0.6", "block cache 1")} | {"4 steps": {"steps": 4}}
    monkeypatch.setattr(bench, "WAYS", ways)
    out = tmp_path / "prices.json"
    assert bench.main([str(tiny_deepgen), "--res", "64", "--device", "cpu", "--out", str(out)]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told == json.loads(out.read_text()) and told["pictures"] == 8 and told["model"] == "DeepGen-tiny"
    rows = told["ways"]
    assert rows["exact"] == {"latents": 0.0, "farthest": 0.0, "levels": 0.0, "reused": 0.0, "predicted": 5.0}
    assert rows["guidance 0:0.6"]["reused"] == 0.0 and rows["block cache 1"]["reused"] == pytest.approx(0.6)
    for row in [*rows.values()][1:]:
        assert 0.0 < row["latents"] <= row["farthest"] and row["levels"] > 0.0
    assert told["other pictures"]["latents"] > 0.5
