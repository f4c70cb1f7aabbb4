"""What follows a text, for models that answer; its tokens one by one are replayed from a CUDA graph.

A model has `embed`, `llm`, `graphs`, and `logits` of final hidden states.
"""

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from .kv_cache import ROUNDED, KVCache

Cache = TypeVar("Cache", bound=KVCache)


def cache_to_answer(model: Any, kind: type[Cache], capacity: int, like: Tensor) -> Cache:
    """A cache for at least so many positions, where a graph may write; the one before it must not be used any more."""
    c = model.config.llm
    shape = c.layers, c.kv_heads, -(-capacity // ROUNDED) * ROUNDED, c.head_dim
    return kind(*model.graphs.own("token", shape, lambda: (like.new_empty(shape), like.new_empty(shape))))


def next_logits(model: Any, cache: KVCache, ids: Sequence[int]) -> Tensor:
    """Append ids to the cached text; logits (vocab) float32 of the token after them, until the next call."""
    row = torch.tensor([ids], device=model.embed.weight.device)
    if len(ids) > 1 or not model.llm.attend.ours:
        return model.logits(model.llm.extend(model.embed(row), cache)[0, -1]).float()
    given = model, row, *cache.next()
    if model.graphs.owns(cache.keys):
        found = model.graphs.run("token", cache.keys.shape, token_logits, given)
    else:
        found = token_logits(*given)
    cache.advance(1)
    return found


def token_logits(model: Any, row: Tensor, positions: Tensor, keys: Tensor, values: Tensor, lengths: Tensor) -> Tensor:
    """The same of one token, row (1, 1), and tensors as `Qwen2.step` takes them."""
    hidden = model.llm.step(model.embed(row), positions, keys, values, lengths)
    return model.logits(hidden[0, -1]).float()
