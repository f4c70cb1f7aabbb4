"""Decoding an answer token by token: repetition penalty, then greedy or nucleus sampling.

The only loop that reads a value back from the device in every step: the end of an answer cannot be known beforehand.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from .noise import PhiloxNoise, Stream


def decode_text(
    next_logits: Callable[[Sequence[int]], Tensor],
    prompt: Sequence[int],
    *,
    eos: int,
    limit: int,
    penalty: float,
    temperature: float,
    top_p: float,
    noise: PhiloxNoise,
    given: Sequence[int] = (),
) -> Iterator[int]:
    """Yield up to `limit` token ids, stopping before `eos`; the first ones are those `given`, chosen earlier.

    `next_logits(ids)` appends ids to the text so far and returns the logits (vocab) float32 of what follows.
    The penalty applies to generated tokens only: the prompt reaches the model as embeddings.
    """
    logits = next_logits(prompt)
    used = torch.zeros_like(logits, dtype=torch.bool)
    for step in range(limit):
        scores = penalise(logits, used, penalty)
        token = given[step] if step < len(given) else pick(scores, temperature, top_p, noise, step)
        if token == eos:
            return
        yield token
        if step + 1 < limit:
            used[token] = True
            logits = next_logits([token])


def penalise(logits: Tensor, used: Tensor, penalty: float) -> Tensor:
    """Repetition penalty (arXiv 1909.05858): scores of used tokens move towards less likely."""
    return torch.where(used, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def pick(scores: Tensor, temperature: float, top_p: float, noise: PhiloxNoise, step: int) -> int:
    """The best token at temperature 0, else a draw from the smallest set that holds `top_p` of the probability."""
    if temperature == 0:
        return int(scores.argmax())
    # The maximum is taken off first, or a tiny temperature would overflow.
    ordered = ((scores - scores.max()) / temperature).softmax(-1).sort(descending=True)
    total = ordered.values.cumsum(-1)
    kept = torch.where(total - ordered.values < top_p, ordered.values, 0.0).cumsum(-1)
    at = torch.searchsorted(kept, noise.uniform(Stream.TEXT, step) * kept[-1])
    return int(ordered.indices[at.clamp(max=len(scores) - 1)])
