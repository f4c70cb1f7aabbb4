"""The adaLN modulations of the diffusion transformer (arXiv 2212.09748), of all steps at once.

They depend on nothing but the timestep and the pooled prompt, and their weights are a third of the transformer's. So
they are a part of their own, which is done before the first step: afterwards only the table is needed. A layer is used
once for all steps and rows, so under a small budget they come block by block.

A row of a table has chunks of D columns, block after block and then for the output, as the layers that make them:

    image    shift, scale, gate of the attention; shift, scale, gate of the MLP; with a second attention its three, too
    text     the first six; in the last block scale, shift of the attention
    output   scale, shift

    here                 diffusers
    time_embed.{0,2}     time_text_embed.timestep_embedder.linear_{1,2}
    text_embed.{0,2}     time_text_embed.text_embedder.linear_{1,2}
    blocks.N.image       transformer_blocks.N.norm1.linear
    blocks.N.text        transformer_blocks.N.norm1_context.linear
    final                norm_out.linear

Letters: S steps, R guidance rows, P pooled width, D width.
"""

from collections.abc import Iterator

import torch.nn.functional as F
from torch import Tensor, nn

from ...layers.linear import Linear, linear_each
from ...layers.timesteps import timestep_features
from .config import DiTConfig


class BlockModulation(nn.Module):
    def __init__(self, width: int, image: int, text: int) -> None:
        super().__init__()
        self.image = Linear(width, image * width)
        self.text = Linear(width, text * width)


class Modulation(nn.Module):
    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config = config
        width = config.heads * config.head_dim
        *blocks, final = chunks(config)
        self.time_embed = nn.Sequential(Linear(config.frequencies, width), nn.SiLU(), Linear(width, width))
        self.text_embed = nn.Sequential(Linear(config.pooled, width), nn.SiLU(), Linear(width, width))
        self.blocks = nn.ModuleList(
            BlockModulation(width, *pair) for pair in zip(blocks[::2], blocks[1::2], strict=True)
        )
        self.final = Linear(width, final * width)

    def forward(self, timesteps: Tensor, pooled: Tensor) -> Tensor:
        """timesteps (S), which are 1000 sigma, and pooled (R, P), to the tables of all steps (S, R, all chunks D)."""
        y = F.silu(self.embed(timesteps, pooled))
        sizes = [count * y.shape[-1] for count in chunks(self.config)]
        tables = y.new_empty(*y.shape[:-1], sum(sizes))
        for made, place in zip(linear_each(y, self.layers()), tables.split(sizes, dim=-1), strict=True):
            place.copy_(made)
        return tables

    def embed(self, timesteps: Tensor, pooled: Tensor) -> Tensor:
        """(S, R, D)"""
        features = timestep_features(timesteps, self.config.frequencies).to(pooled.dtype)
        return self.time_embed(features)[:, None] + self.text_embed(pooled)

    def layers(self) -> Iterator[nn.Module]:
        for block in self.blocks:
            yield block.image
            yield block.text
        yield self.final


def chunks(config: DiTConfig) -> list[int]:
    """How many there are of image and text, block by block, and of the output."""
    last = config.depth - 1
    counts = ((9 if block < config.dual else 6, 2 if block == last else 6) for block in range(config.depth))
    return [count for pair in counts for count in pair] + [2]


def of_layers(table: Tensor, config: DiTConfig) -> list[tuple[Tensor, ...]]:
    """The chunks (R, D) of image and text, block by block, and of the output, from a step's table (R, all chunks D).

    The shift always comes before the scale.
    """
    width = config.heads * config.head_dim
    parts = table.split([count * width for count in chunks(config)], dim=-1)
    return [part.split(width, dim=-1)[:: -1 if part.shape[-1] == 2 * width else 1] for part in parts]
