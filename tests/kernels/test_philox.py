"""Philox against the published known answers, and the normals' moments."""

import pytest
import torch
from unipic_run.kernels.philox import normals, philox, uniform

# Known-answer vectors of Philox 4x32-10: counter, key, result.
KNOWN = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_known_answers(counter: str, key: str, expected: str) -> None:
    got = philox(tuple(words(key)), tuple(torch.tensor([word]) for word in words(counter)))
    assert [word.item() for word in got] == words(expected)


def test_normals_have_the_moments_of_a_normal() -> None:
    count = torch.arange(50_000)
    x = normals(philox((1, 2), (count, *torch.zeros(3, 1, dtype=torch.int64).expand(3, len(count))))).flatten().double()
    assert abs(x.mean()) < 0.01 and abs(x.var() - 1) < 0.01
    assert abs((x**3).mean()) < 0.03 and abs((x**4).mean() - 3) < 0.1


def test_uniform_never_reaches_zero() -> None:
    ends = uniform(torch.tensor([0, 0xFFFFFFFF]))
    assert 0 < ends[0] < 1e-9 and ends[1] == 1.0
