"""The timeline adds up to the plan, and the picture shows what it should."""

from itertools import pairwise

import pytest
from PIL import Image
from unipic_run.bench.random_model import architecture
from unipic_run.cli import main
from unipic_run.engine import families, plot
from unipic_run.engine.estimate import ask_for, told
from unipic_run.engine.timeline import Moment, timeline

GIB = 2**30


@pytest.fixture(autouse=True)
def small(tiny_release, tmp_path, monkeypatch):
    monkeypatch.setenv("UNIPIC_RUN_CACHE", str(tmp_path))
    config = architecture(str(tiny_release))
    monkeypatch.setattr(families, "architecture", lambda model: (families.FAMILIES["unipic"], config))


@pytest.mark.parametrize("task", ["edit", "ask"])
def test_the_timeline_is_that_of_the_plan(task):
    asked = ask_for("unipic", task, res=64, steps=2)
    moments, stages = [*timeline(asked, asked.placement())], told(asked)["stages"]
    assert list(dict.fromkeys(moment.stage for moment in moments)) == list(stages)
    for name, stage in stages.items():
        group = [moment for moment in moments if moment.stage == name]
        assert max(moment.weights + moment.activations for moment in group) == stage["peak_bytes"]
        assert sum(moment.seconds for moment in group) == pytest.approx(stage["seconds"])


def test_short_stages_can_be_seen_and_all_fit():
    found = plot.panels([0.001, 6.5, 0.04])
    assert found[0][0] == plot.LEFT and found[-1][1] == plot.WIDTH - plot.RIGHT
    assert all(end - start > 0.1 * plot.WIDTH for start, end in found)
    assert all(right - left == plot.GAP for (_, left), (right, _) in pairwise(found))
    assert plot.panels([2.0]) == [(plot.LEFT, plot.WIDTH - plot.RIGHT)]


def test_the_picture_shows_weights_activations_and_the_budget():
    moments = [Moment("sample", 1.0, 2 * GIB, GIB), Moment("sample", 1.0, 2 * GIB, 0), Moment("decode", 1.0, GIB, GIB)]
    image = plot.draw(moments, "title", "subtitle", 4 * GIB)
    (left, right), (_, end) = plot.panels([2.0, 1.0])
    bottom = plot.HEIGHT - plot.BOTTOM

    def seen(x, gib):
        y = bottom - (bottom - plot.TOP) * gib / (1.06 * 4)
        return "#{:02x}{:02x}{:02x}".format(*image.getpixel((int(x), int(y))))

    quarter = (right - left) / 4
    assert seen(left + quarter, 1.5) == seen(left + 3 * quarter, 1.5) == seen(end - 9, 0.5) == plot.WEIGHTS
    assert seen(left + quarter, 2.5) == seen(end - 9, 1.5) == plot.ACTIVATIONS
    assert seen(left + 3 * quarter, 2.5) == seen(end - 9, 2.5) == plot.PANEL
    level = int(bottom - (bottom - plot.TOP) / 1.06)
    dashes = [x for x in range(left, end) if image.getpixel((x, level))[1] < 120]
    assert 0.4 < len(dashes) / (end - left) < 0.8


def test_the_command_draws_and_does_not_overwrite(tmp_path, capsys):
    target, arguments = tmp_path / "plan.png", ["plan", "gen", "--res", "64", "--steps", "2", "--plot"]
    assert main([*arguments, str(target)]) == 0
    with Image.open(target) as image:
        assert image.size == (plot.WIDTH, plot.HEIGHT)
    before = target.read_bytes()
    assert main([*arguments, str(target)]) == 2 and "exists" in capsys.readouterr().err
    assert main([*arguments, str(tmp_path / "plan.jpg")]) == 2
    assert target.read_bytes() == before and main([*arguments, str(target), "--overwrite"]) == 0
