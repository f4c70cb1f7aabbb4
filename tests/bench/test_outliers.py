"""What large channels cost in 8 bits is what the results say."""

import json

import pytest
from unipic_run.bench.checkout import require_this_checkout
from unipic_run.bench.outliers import KEPT, __file__, measured


def test_the_kept_errors_are_those_of_this_code():
    kept = json.loads((require_this_checkout(__file__) / KEPT).read_text("utf-8"))["rows"]
    found = measured()
    assert [row["what"] for row in found] == [row["what"] for row in kept]
    for name in ("error", "without"):
        assert [row[name] for row in found] == pytest.approx([row[name] for row in kept], rel=0.1)
