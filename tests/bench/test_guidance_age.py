"""Errors of kept guidance are told by growth and by half of the run."""

import pytest
from unipic_run.bench import guidance_age


def test_rows_take_together_what_grew_alike() -> None:
    aged = [(1.5, True, 0.2), (1.3, True, 0.4), (1.5, False, 0.9), (3.0, True, 0.7), (99.0, True, 5.0)]
    found = {(row["from"], row["late"]): (row["median"], row["of"]) for row in guidance_age.rows(aged)}
    assert found == {(1.25, True): (pytest.approx(0.3), 2), (1.25, False): (0.9, 1), (2.5, True): (0.7, 1)}


def test_every_round_is_compared_with_all_before_it(monkeypatch, capsys) -> None:
    assert guidance_age.main(["--pictures", "1"]) == 0
    rounds = 16  # of the pocket model; the first knows nothing that could have grown
    assert len(guidance_age.Watched.aged) == (rounds - 1) * (rounds - 2) // 2
    assert all(growth > 1 and error > 0 for growth, _, error in guidance_age.Watched.aged)
