"""What follows a text, for models that answer; its tokens one by one are replayed from a CUDA graph.

A model has `config.llm`, `embed`, `llm`, `graphs`, and `logits` of final hidden states.
"""

from collections.abc import Sequence
from typing import Any, TypeVar

from torch import Tensor

from ..kernels._op import launches
from .kv_cache import KVCache
from .layers.linear import as_row

ROUNDED = 256  # positions to which a cache's room is rounded, so that other questions fit the same graph
Cache = TypeVar("Cache", bound=KVCache)


def cache_to_answer(model: Any, kind: type[Cache], capacity: int, like: Tensor) -> Cache:
    """A cache for at least so many positions, where a graph may write; the one before it must not be used any more."""
    c = model.config.llm
    shape = c.layers, c.kv_heads, -(-capacity // ROUNDED) * ROUNDED, c.head_dim

    def make() -> tuple[Tensor, Tensor]:
        return like.new_empty(shape), like.new_empty(shape)

    # Other backends take lengths from the host, and torch in place of our kernels waits for them: neither is captured.
    captured = model.llm.attend.ours and launches(like)
    return kind(*(model.graphs.storage("token", shape, make) if captured else make()))


def next_logits(model: Any, cache: KVCache, ids: Sequence[int]) -> Tensor:
    """Append ids to the cached text; logits (vocab) float32 of the token after them, until the next call."""
    row = as_row(ids, model.embed)
    if len(ids) > 1 or not model.llm.attend.ours:
        return model.logits(model.llm.extend(model.embed(row), cache)[0, -1]).float()
    given = model, row, *cache.next()
    if model.graphs.may_write(cache.keys):
        found = model.graphs.run("token", cache.keys.shape, token_logits, given)
    else:
        found = token_logits(*given)
    cache.advance(1)
    return found


def token_logits(model: Any, row: Tensor, positions: Tensor, keys: Tensor, values: Tensor, lengths: Tensor) -> Tensor:
    """The same of one token, row (1, 1), and tensors as `Qwen2.step` takes them."""
    hidden = model.llm.step(model.embed(row), positions, keys, values, lengths)
    return model.logits(hidden[0, -1]).float()
