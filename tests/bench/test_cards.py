"""The README's table is the one that was predicted, and a prediction that changes is noticed."""

import json

import pytest
from unipic_run.bench import cards


@pytest.fixture
def rows(root):
    return json.loads((root / cards.KEPT).read_text("utf-8"))["rows"]


def test_the_readme_shows_what_is_kept(root, rows):
    assert cards.block((root / "README.md").read_text("utf-8")) == cards.table(rows)
    assert len(rows) == len(cards.CARDS) * len(cards.PRECISIONS) * len(cards.SIZES)
    assert cards.table(rows).count("\n") == 3 + len(cards.CARDS) * len(cards.PRECISIONS)


def test_changes_are_noticed(rows):
    assert cards.differences(rows, rows) == []
    first, *rest = rows
    slower = first | {"seconds": 1.03 * first["seconds"]}
    larger = first | {"peak_bytes": int(0.97 * first["peak_bytes"])}
    other = first | {"plan": "all on the moon"}
    for changed, word in ((slower, "seconds"), (larger, "peak_bytes"), (other, "moon")):
        (said,) = cards.differences([changed, *rest], rows)
        assert word in said
    assert "no longer" in cards.differences(rest, rows)[0] and len(cards.differences(rows, rest)) == 1
    assert cards.differences([first | {"seconds": 1.01 * first["seconds"]}, *rest], rows) == []


def test_what_is_beside_products_only_adds(rows):
    bare = [row for row in rows if "without_beside" in row]
    assert {row["plan"] for row in bare} == {"all resident"} and len(bare) == 20
    for row in bare:
        assert row["without_beside"] <= row["seconds"]
        assert (row["without_beside"] < row["seconds"]) == (row["precision"] == "int8")


def test_what_does_not_fit_has_no_numbers(tmp_path, monkeypatch):
    monkeypatch.setenv("UNIPIC_RUN_CACHE", str(tmp_path))
    found = cards.row(1, "rtx3060", "bf16", 64)
    assert found["seconds"] is None and "are the least" in found["plan"]
    assert cards.cells_of(found) == (found["plan"], "", "")
