"""A random value depends on seed, stream, position and step, and on nothing else."""

import pytest
import torch
from unipic_run.engine.noise import PhiloxNoise, Tape


def test_order_is_a_permutation_of_the_seed() -> None:
    order = PhiloxNoise(7).order(4096)
    assert torch.equal(order.sort().values, torch.arange(4096))
    assert torch.equal(order, PhiloxNoise(7).order(4096))
    assert not torch.equal(order, PhiloxNoise(8).order(4096))
    assert not torch.equal(order, PhiloxNoise(7 + 2**32).order(4096)), "the upper half of the seed counts"


def test_values_follow_the_position_not_the_batch() -> None:
    noise = PhiloxNoise(7)
    whole = noise.head_steps(0, torch.arange(20), 16, 9)
    part = noise.head_steps(3, torch.tensor([4, 17]), 16, 5)
    assert whole.shape == (9, 20, 16) and torch.equal(part, whole[:5, [4, 17]])
    start = noise.head_start(0, torch.arange(20), 16)
    assert not torch.isclose(start, whole[0]).any(), "streams differ"


def test_uneven_channel_counts() -> None:
    assert PhiloxNoise(1).head_start(0, torch.arange(3), 6).shape == (3, 6)


def test_tape_replays_and_checks_its_length() -> None:
    tape = Tape(torch.tensor([2, 0, 1]), {0: torch.ones(1, 4)}, {0: torch.zeros(5, 1, 4)})
    assert tape.order(3).tolist() == [2, 0, 1]
    assert tape.head_start(0, torch.tensor([2]), 4).sum() == 4
    with pytest.raises(ValueError, match="3 tokens, the request 4"):
        tape.order(4)
    with pytest.raises(ValueError, match=r"holds \(5, 1, 4\) for round 0, the request needs \(6, 1, 4\)"):
        tape.head_steps(0, torch.tensor([2]), 4, 6)
    with pytest.raises(ValueError, match="holds nothing for round 1"):
        tape.head_start(1, torch.tensor([2]), 4)
    with pytest.raises(ValueError, match="permutation"):
        Tape(torch.tensor([2, 2, 1]), {}, {})
