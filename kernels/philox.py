"""Philox 4x32-10, the counter-based generator behind every random number (Salmon et al., SC 2011).

A value is a pure function of (key, counter), so it depends on neither batch, device nor order of evaluation.
32-bit words travel in int64 tensors, since torch has no unsigned 32-bit arithmetic. The kernels' version of it is
`philox` and `normal` in _device.py: the same words to the bit, and the same normals to float rounding.
"""

import math

import torch
from torch import Tensor

from ._device import normal
from ._op import Case, Cost, Operator, cdiv, launch, tl, triton

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10
WORD = 0xFFFFFFFF

Words = tuple[Tensor, Tensor, Tensor, Tensor]


def philox(key: tuple[int | Tensor, int | Tensor], counter: Words) -> Words:
    """Four random 32-bit words per counter. `key`: two words; `counter`: four int64 tensors that broadcast together."""
    k0, k1 = key
    c0, c1, c2, c3 = counter
    for _ in range(ROUNDS):
        high0, low0 = _multiply(MULTIPLIERS[0], c0)
        high1, low1 = _multiply(MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + WEYL[0]) & WORD, (k1 + WEYL[1]) & WORD
    return c0, c1, c2, c3


def normals(words: Words, dtype: torch.dtype = torch.float32) -> Tensor:
    """Box-Muller: four words to four standard normals, (..., 4); `dtype` is that of the logarithm and the circle."""
    w0, w1, w2, w3 = words
    return torch.stack([*_box_muller(w0, w1, dtype), *_box_muller(w2, w3, dtype)], dim=-1)


def uniform(word: Tensor) -> Tensor:
    """A word to float32 in (0, 1]: half a step is added so that the logarithm stays finite."""
    return word.float() * 2.0**-32 + 2.0**-33


def _box_muller(w0: Tensor, w1: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    radius = torch.sqrt(-2.0 * torch.log(uniform(w0).to(dtype)))
    angle = (2.0 * math.pi * uniform(w1)).to(dtype)
    return radius * torch.cos(angle), radius * torch.sin(angle)


def _multiply(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """High and low word of a 32x32-bit product; halves of `b` keep every intermediate below 2**49."""
    low_half, high_half = a * (b & 0xFFFF), a * (b >> 16)
    high = (high_half + (low_half >> 16)) >> 16
    return high, (low_half + ((high_half & 0xFFFF) << 16)) & WORD


def token_words(key: Tensor, position: Tensor, step: Tensor, stream: int, channels: int) -> Words:
    """Words (steps, N, groups) of N tokens, four channels a counter: (position * groups + group, step, stream, 0).

    key (N, 2), position (N), step (steps), all int64.
    """
    groups = -(-channels // 4)
    element = position[:, None] * groups + torch.arange(groups, device=position.device)  # (N, groups)
    element, step = torch.broadcast_tensors(element, step[:, None, None])
    counter = element, step, torch.full_like(element, stream), torch.zeros_like(element)
    return philox((key[:, :1], key[:, 1:]), counter)


def token_noise_ref(key: Tensor, position: Tensor, stream: int, steps: int, channels: int) -> Tensor:
    return _drawn(key, position, stream, steps, channels, torch.float64)


def _token_noise_torch(key: Tensor, position: Tensor, stream: int, steps: int, channels: int) -> Tensor:
    return _drawn(key, position, stream, steps, channels, torch.float32)


def _drawn(key: Tensor, position: Tensor, stream: int, steps: int, channels: int, dtype: torch.dtype) -> Tensor:
    words = token_words(key, position, torch.arange(steps, device=position.device), stream, channels)
    return normals(words, dtype).flatten(2)[..., :channels]


@triton.jit(do_not_specialize=["stream", "tokens"])
def _token_noise_kernel(
    key_ptr,  # (N, 2) int64
    position_ptr,  # (N) int64
    y_ptr,  # (steps, N, C) float32
    stream,
    tokens,  # N
    C: tl.constexpr,
    BLOCK: tl.constexpr,
):
    step = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < tokens * C
    token, channel = at // C, at % C
    k0 = tl.load(key_ptr + 2 * token, mask=inside, other=0)
    k1 = tl.load(key_ptr + 2 * token + 1, mask=inside, other=0)
    position = tl.load(position_ptr + token, mask=inside, other=0)
    tl.store(y_ptr + step * tokens * C + at, normal(k0, k1, position, channel, step, stream, C), mask=inside)


def _token_noise_triton(key: Tensor, position: Tensor, stream: int, steps: int, channels: int) -> Tensor:
    tokens = len(position)
    y = torch.empty(steps, tokens, channels, dtype=torch.float32, device=position.device)
    block = 256
    launch(
        _token_noise_kernel,
        (steps, cdiv(tokens * channels, block)),
        key.contiguous(),
        position.contiguous(),
        y,
        stream,
        tokens,
        C=channels,
        BLOCK=block,
        num_warps=4,
    )
    return y


def token_noise_cost(key: Tensor, position: Tensor, stream: int, steps: int, channels: int) -> Cost:
    drawn = steps * position.numel() * channels
    return Cost(100 * drawn, 4 * drawn + 24 * position.numel())  # about 100 instructions a value


_token_noise = Operator(
    "token_noise(Tensor key, Tensor position, int stream, int steps, int channels) -> Tensor",
    torch=_token_noise_torch,
    triton=_token_noise_triton,
    cost=token_noise_cost,
)


def token_noise(key: Tensor, position: Tensor, stream: int, steps: int, channels: int) -> Tensor:
    """(steps, N, channels) float32 for N tokens: key (N, 2), the seed's words, and raster position (N), int64."""
    return _token_noise(key, position, stream, steps, channels)


def token_noise_cases() -> list[Case]:
    def make(tokens: int, steps: int, channels: int):
        def arguments(device):
            noise = torch.Generator().manual_seed(0)
            key = torch.randint(2**32, (tokens, 2), generator=noise).to(device)
            return key, torch.randperm(4096, generator=noise)[:tokens].to(device), 2, steps, channels

        return arguments

    return [
        Case("a round's start, 400 tokens", make(400, 1, 16), "aot gpu"),
        Case("several seeds and steps, a block partly full", make(33, 2, 16)),
        Case("channels that are no multiple of 4", make(3, 2, 6)),
        Case("one value", make(1, 1, 1)),
        Case("no tokens", make(0, 2, 16)),
    ]
