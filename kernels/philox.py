"""Philox 4x32-10, the counter-based generator behind every random number (Salmon et al., SC 2011).

A value is a pure function of (key, counter), so it depends on neither batch, device nor order of evaluation.
32-bit words travel in int64 tensors, since torch has no unsigned 32-bit arithmetic.
"""

import math

import torch
from torch import Tensor

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10
WORD = 0xFFFFFFFF

Words = tuple[Tensor, Tensor, Tensor, Tensor]


def philox(key: tuple[int, int], counter: Words) -> Words:
    """Four random 32-bit words per counter. `key`: two words; `counter`: four int64 tensors that broadcast together."""
    k0, k1 = key
    c0, c1, c2, c3 = counter
    for _ in range(ROUNDS):
        high0, low0 = _multiply(MULTIPLIERS[0], c0)
        high1, low1 = _multiply(MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + WEYL[0]) & WORD, (k1 + WEYL[1]) & WORD
    return c0, c1, c2, c3


def normals(words: Words) -> Tensor:
    """Box-Muller: four words to four standard normals, (..., 4) float32."""
    w0, w1, w2, w3 = words
    return torch.stack([*_box_muller(w0, w1), *_box_muller(w2, w3)], dim=-1)


def uniform(word: Tensor) -> Tensor:
    """A word to float32 in (0, 1]: half a step is added so that the logarithm stays finite."""
    return word.float() * 2.0**-32 + 2.0**-33


def _box_muller(w0: Tensor, w1: Tensor) -> tuple[Tensor, Tensor]:
    radius = torch.sqrt(-2.0 * torch.log(uniform(w0)))
    angle = 2.0 * math.pi * uniform(w1)
    return radius * torch.cos(angle), radius * torch.sin(angle)


def _multiply(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """High and low word of a 32x32-bit product; halves of `b` keep every intermediate below 2**49."""
    low_half, high_half = a * (b & 0xFFFF), a * (b >> 16)
    high = (high_half + (low_half >> 16)) >> 16
    return high, (low_half + ((high_half & 0xFFFF) << 16)) & WORD
