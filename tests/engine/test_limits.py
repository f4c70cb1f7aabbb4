"""torch's limit, which all engines of a process share, on a card that is made up."""

import pytest
import torch
from unipic_run.engine import budget
from unipic_run.engine.budget import CONTEXT
from unipic_run.engine.gpus import GIB
from unipic_run.engine.limits import held_to

OWN = CONTEXT / GIB


def test_one_engine_is_held_to_its_bound_beside_what_others_of_the_process_have(card):
    with held_to(torch.device("cpu"), None) as release:
        release()
    with held_to(card.device, 6 * GIB) as release:
        assert card.limits == [pytest.approx(2 + 6 - OWN)]
    assert len(card.limits) == 1, "it lives on"
    release()
    release()
    assert card.limits[1:] == [pytest.approx(24)]


def test_engines_share_the_sum_of_their_bounds_and_one_context(card):
    with held_to(card.device, 6 * GIB) as first:
        card.reserved = 7 * GIB  # the first one's, mostly
    with held_to(card.device, 8 * GIB) as second:
        assert card.limits[1:] == [pytest.approx(2 + 6 + 8 - 2 * OWN)]
    first()
    assert card.limits[2:] == [pytest.approx(2 + 8 - OWN)], "the second keeps its own"
    with held_to(card.device, 24 * GIB) as third:
        assert card.limits[3:] == [pytest.approx(24)], "there is no more"
    second()
    third()
    assert card.limits[3:] == [pytest.approx(24)]


def test_a_load_that_fails_leaves_the_limit_of_the_others(card):
    with held_to(card.device, 6 * GIB) as release:
        pass
    for failure in (KeyboardInterrupt, torch.OutOfMemoryError):
        with pytest.raises(failure), held_to(card.device, 3 * GIB):
            raise failure
    assert card.limits[1:] == [pytest.approx(limit - 2 * OWN) for limit in (11, 8 + OWN, 11, 8 + OWN)]
    release()
    with pytest.raises(KeyboardInterrupt), held_to(card.device, 22 * GIB):
        raise KeyboardInterrupt
    assert card.limits[5:] == [pytest.approx(24), pytest.approx(23.5), pytest.approx(24)]


def test_while_an_engine_has_no_bound_nothing_holds_it_back(card):
    with held_to(card.device, 6 * GIB) as bounded:
        pass
    with held_to(card.device, None) as free:
        assert card.limits[1:] == [pytest.approx(24)]
    with held_to(card.device, 4 * GIB) as other:
        assert len(card.limits) == 2
    other()
    free()
    assert card.limits[2:] == [pytest.approx(2 + 6 - OWN)]
    bounded()
    with held_to(card.device, None) as alone:
        alone()
    assert card.limits[3:] == [pytest.approx(24)]


def test_a_limit_that_was_there_before_comes_back_and_is_never_passed(card):
    card.shares[card.device] = 0.5
    with held_to(card.device, 20 * GIB) as release:
        assert card.limits == []
    with held_to(card.device, None) as other:
        assert card.limits == []
    other()
    release()
    with held_to(card.device, 4 * GIB) as release:
        assert card.limits == [pytest.approx(2 + 4 - OWN)]
    release()
    assert card.limits[1:] == [pytest.approx(12)]


def test_devices_have_limits_of_their_own_and_a_context_that_was_measured_counts(card, monkeypatch):
    second = torch.device("cuda", 1)
    monkeypatch.setitem(budget._measured, second, GIB // 4)
    with held_to(card.device, 6 * GIB) as first, held_to(second, 6 * GIB) as other:
        assert card.limits == [pytest.approx(2 + 6 - OWN), pytest.approx(2 + 6 - 0.25)]
    first()
    other()
