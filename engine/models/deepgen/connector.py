"""The connector of DeepGen 1.0 (SCB): hidden states of the language model to what the diffusion transformer reads.

Also the conditioner of UniPic-2 MetaQuery, which reads one hidden state of the queries alone.
Letters: R guidance rows, T positions, pads and queries included.
"""

import torch
from torch import Tensor, nn

from ...layers.attention import Attention
from ...layers.linear import Linear
from ...layers.vit_block import ViTBlock
from .config import ConnectorConfig


class Connector(nn.Module):
    """`queries` (queries, llm_width) stand behind every prompt. No position is encoded, none is masked."""

    def __init__(self, config: ConnectorConfig, llm_width: int, attend: Attention) -> None:
        super().__init__()
        c = config
        self.queries = nn.Parameter(torch.empty(c.queries, llm_width))
        self.projector_1 = Linear(max(1, c.taps) * llm_width, c.width)
        self.encoder = nn.ModuleList(
            ViTBlock(c.width, c.heads, c.mlp, attend, act="gelu_tanh", eps=c.norm_eps) for _ in range(c.depth)
        )
        self.projector_2 = Linear(c.width, c.pooled)
        self.projector_3 = Linear(c.width, c.text)

    def forward(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """States (R, T, taps * llm_width) to the text stream (R, T, text) and the pooled vector (R, pooled)."""
        x = self.encode(states)
        return self.projector_3(x), self.projector_2(x.mean(1))

    def encode(self, states: Tensor) -> Tensor:
        """(R, T, width)"""
        x = self.projector_1(states)
        for block in self.encoder:
            x = block(x)
        return x
