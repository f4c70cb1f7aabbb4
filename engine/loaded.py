"""A model in memory: the family's verbs, the filled parts, the tokenizer, and where the parts lie while it runs."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .tokens import Tokens
from .verbs import Verbs


def stay(stage: str) -> None:
    """All parts are where they are needed, in every stage."""


@dataclass(frozen=True)
class Placed:
    """`enter(stage)` brings what a stage needs.

    `bands`: pictures are decoded in bands of rows. `apart`: guidance rows are computed one after the other.
    """

    enter: Callable[[str], None] = stay
    bands: bool = False
    apart: bool = False


@dataclass(frozen=True)
class Loaded:
    """`device` is where the model computes; parts that wait for their stage may be elsewhere."""

    family: Verbs
    model: nn.Module
    tokens: Tokens
    device: torch.device
    placed: Placed = Placed()

    @property
    def config(self) -> Any:
        return self.model.config

    @property
    def dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype
