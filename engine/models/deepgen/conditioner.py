"""How Qwen2.5-VL reads a prompt with pictures: for the connector, or to answer a question.

A row is [prompt | queries], with the features of each picture where its placeholders stand. Rows run without pads. The
original masks its pads here but not behind, where they count: they all have the states of one more row, the pad by
itself, which attends to nothing.

Letters: R rows, L tokens of a row, D width, C = taps * D.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor, nn

from ...kv_cache import KVCache
from ...layers.linear import as_row
from ...layers.qwen2 import Qwen2

Grid = tuple[int, int]  # rows, columns of a picture in tokens


@dataclass(frozen=True)
class Row:
    """A prompt: ids with a run of placeholders for each picture, whose features (rows * columns, D) replace them."""

    ids: Sequence[int]
    features: Sequence[Tensor] = ()
    grids: Sequence[Grid] = ()


class PictureCache(KVCache):
    """Of a text with pictures. `shift`: position of a token behind them, less its index."""

    shift: int = 0

    @property
    def position(self) -> int:
        """Of the next token."""
        return self.length + self.shift


def runs(row: Row, image_token: int) -> Iterator[int | Grid]:
    """Lengths of the texts around the pictures, and the pictures, in turn. Raises ValueError if they do not fit."""
    at = 0
    for rows, columns in row.grids:
        first = row.ids.index(image_token, at)
        if any(token != image_token for token in row.ids[first : first + rows * columns]):
            raise ValueError(f"fewer placeholders than a picture of {rows}x{columns} tokens needs")
        yield first - at
        yield rows, columns
        at = first + rows * columns
    if image_token in row.ids[at:]:
        raise ValueError(f"{row.ids[at:].count(image_token)} placeholders more than pictures need")
    yield len(row.ids) - at


def positions(row: Row, image_token: int, more: int = 0, start: int = 0) -> Tensor:
    """Of a row and `more` tokens behind it, (3, 1, L + more): frame, row and column (M-RoPE, arXiv 2409.12191).

    Text advances all three by one, a picture by its longer side. Without pictures they are the same: (1, L + more).
    """
    parts, at = [], start
    for run in (*runs(row, image_token), more):
        if isinstance(run, int):
            parts.append(torch.arange(at, at + run).expand(3, -1))
            at += run
        else:
            grid = torch.meshgrid(torch.zeros(1, dtype=torch.long), *map(torch.arange, run), indexing="ij")
            parts.append(at + torch.stack(grid).flatten(1))
            at += max(run)
    every = torch.cat(parts, dim=1)[:, None]
    return every if row.grids else every[0]


def embedded(embed: nn.Embedding, row: Row, image_token: int) -> Tensor:
    """(1, L, D), features in place of placeholders."""
    text = embed(as_row([token for token in row.ids if token != image_token], embed))[0]
    parts, features, at = [], iter(row.features), 0
    for run in runs(row, image_token):
        if isinstance(run, int):
            parts.append(text[at : at + run])
            at += run
        else:
            parts.append(next(features))
    return torch.cat(parts)[None]


def tapped(layers: int, taps: int) -> list[int]:
    """Numbers of the layers whose outputs are kept, deep to shallow and from 1: 35, 29 ... 5 of 36 with 6 taps."""
    return [*range(layers - 1, 0, -(layers // taps))][:taps]


def side_by_side(outputs: Iterator[list[Tensor]], numbers: Sequence[int]) -> list[Tensor]:
    """Of each row the outputs (..., D) of these layers, (..., C); no layer behind the last of them runs."""
    kept = {number: rows for number, rows in enumerate(islice(outputs, max(numbers)), 1) if number in numbers}
    return [torch.cat(row, dim=-1) for row in zip(*(kept[number] for number in numbers), strict=True)]


def with_queries(embed: nn.Embedding, queries: Tensor, rows: Sequence[Row], image_token: int) -> list[Tensor]:
    """What the language model reads of each row, (1, L + queries, D)."""
    return [torch.cat([embedded(embed, row, image_token), queries[None]], dim=1) for row in rows]


def in_a_row(x: Tensor) -> Tensor:
    """Positions (1, L) of x (1, L, D) that count every token alike."""
    return torch.arange(x.shape[1], device=x.device)[None]


def last_states(llm: Qwen2, inputs: Sequence[Tensor], at: Sequence[Tensor], count: int) -> Tensor:
    """The final hidden states (R, count, D) of the last tokens of inputs (1, L, D) at these positions."""
    found = deque(llm.outputs(inputs, at), maxlen=1).pop()
    return llm.norm(torch.cat([x[:, -count:] for x in found]))


def prefill(llm: Qwen2, embed: nn.Embedding, row: Row, image_token: int, cache: PictureCache) -> Tensor:
    """Append a row to the cached text; final hidden states (1, L, D)."""
    x = embedded(embed, row, image_token)
    hidden = llm.extend(x, cache, positions(row, image_token, start=cache.position).to(x.device))
    cache.shift += sum(max(grid) - grid[0] * grid[1] for grid in row.grids)
    return hidden
