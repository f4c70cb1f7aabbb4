"""The masked autoregressive encoder and decoder of UniPic 1.0 (MAR, arXiv 2406.11838).

Letters: B images, R guidance rows, n = rows x columns grid tokens, V visible tokens, N predicted tokens, D width.
Every sequence starts with `buffer` extra rows.
"""

import torch
from torch import Tensor, nn

from ....kernels.embed_visible import embed_visible
from ....kernels.mar_tokens import add_positions, grid_positions, place_tokens
from ...layers.attention import Attention
from ...layers.linear import Linear
from ...layers.vit_block import NORM_EPS, ViTBlock
from .config import MarConfig


class MarEncoder(nn.Module):
    """Latent tokens that are known so far, to features."""

    def __init__(self, config: MarConfig, attend: Attention) -> None:
        super().__init__()
        width = config.width
        self.buffer = config.buffer
        self.fake_latent = nn.Parameter(torch.empty(1, width))
        self.z_proj = Linear(config.channels, width)
        self.z_proj_ln = nn.LayerNorm(width, eps=NORM_EPS)
        self.pos_embed = nn.Parameter(torch.empty(1, config.buffer + config.grid**2, width))
        self.blocks = nn.ModuleList(
            ViTBlock(width, config.heads, config.mlp, attend) for _ in range(config.encoder_depth)
        )
        self.norm = nn.LayerNorm(width, eps=NORM_EPS)

    def positions(self, rows: int, columns: int) -> Tensor:
        """(buffer + n, D)"""
        return grid_positions(self.pos_embed, self.buffer, rows, columns)

    def forward(self, tokens: Tensor, visible: Tensor, position: Tensor) -> Tensor:
        """tokens (B, n, 16), visible (B, V), position (buffer + n, D) -> (B, buffer + V, D)."""
        x = embed_visible(tokens, visible, self.z_proj, self.z_proj_ln, self.fake_latent, position)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class MarDecoder(nn.Module):
    """Features of the known tokens, to conditions z of the tokens to predict."""

    def __init__(self, config: MarConfig, attend: Attention) -> None:
        super().__init__()
        width = config.width
        self.buffer = config.buffer
        self.embed = Linear(width, width)
        self.mask_token = nn.Parameter(torch.empty(1, 1, width))
        self.pos_embed = nn.Parameter(torch.empty(1, config.buffer + config.grid**2, width))
        self.diffusion_pos_embed = nn.Parameter(torch.empty(1, config.grid**2, width))
        self.blocks = nn.ModuleList(
            ViTBlock(width, config.heads, config.mlp, attend) for _ in range(config.decoder_depth)
        )
        self.norm = nn.LayerNorm(width, eps=NORM_EPS)

    def positions(self, rows: int, columns: int) -> tuple[Tensor, Tensor]:
        """Decoder (buffer + n, D) and diffusion (n, D) positions."""
        return (
            grid_positions(self.pos_embed, self.buffer, rows, columns),
            grid_positions(self.diffusion_pos_embed, 0, rows, columns),
        )

    def base(self, x_con: Tensor | None) -> Tensor:
        """What stands at masked positions: the mask token, or an edit's embedded source; (1, 1 or buffer + n, D)."""
        return self.mask_token if x_con is None else self.embed(x_con)

    def forward(
        self,
        x: Tensor,
        visible: Tensor,
        predicted: Tensor,
        base: Tensor,
        position: Tensor,
        diffusion_position: Tensor,
        source: Tensor | None = None,
    ) -> Tensor:
        """x (R, buffer + V, D), visible (B, V), predicted (B, N) -> z (R, N, D).

        With guidance R is 2B, and both halves have the same plan; source (B, n) is its `inverse_index`, where the
        caller has it already. The last block computes only the predicted rows.
        """
        x = place_tokens(self.embed(x), visible, base, position, source)  # (R, buffer + n, D)
        last = len(self.blocks) - 1
        for index, block in enumerate(self.blocks):  # in order and once, as streamed layers come
            x = block(x, only=predicted + self.buffer if index == last else None)
        return add_positions(self.norm(x), predicted, diffusion_position)


def all_visible(tokens: Tensor) -> Tensor:
    """The index plan of a fully known image, (B, n)."""
    return torch.arange(tokens.shape[1], device=tokens.device).expand(tokens.shape[:2])


def buffers_last(x: Tensor, buffer: int) -> Tensor:
    """Rotate a sequence so that the LLM reads the image tokens first and the buffers behind them."""
    return torch.cat([x[:, buffer:], x[:, :buffer]], dim=1)


def buffers_first(x: Tensor, buffer: int) -> Tensor:
    return torch.cat([x[:, -buffer:], x[:, :-buffer]], dim=1)
