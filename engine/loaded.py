"""A model in memory: the family's verbs, the filled parts, the tokenizer."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .tokens import Tokens
from .verbs import Verbs


@dataclass(frozen=True)
class Loaded:
    family: Verbs
    model: nn.Module
    tokens: Tokens

    @property
    def config(self) -> Any:
        return self.model.config

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype
