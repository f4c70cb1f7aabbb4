"""Convolutional KL autoencoder (arXiv 2112.10752): stride 2 per level but the last, mean latents.

Letters: B images, C channels, h w the map's height and width. Attention sits at the encoder's last level and in both
middles.
"""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels.attention import attention
from .linear import Conv2d

NORM_EPS = 1e-6
BLOCKS = 2  # residual blocks a level in the encoder; the decoder has one more


@dataclass(frozen=True)
class VAEConfig:
    base: int
    multipliers: tuple[int, ...]  # channels of level l are base * multipliers[l]
    latent: int
    groups: int  # of every GroupNorm

    @property
    def widths(self) -> tuple[int, ...]:
        return tuple(self.base * m for m in self.multipliers)


def group_norm(groups: int, channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(groups, channels, eps=NORM_EPS)


class ResBlock(nn.Module):
    def __init__(self, width_in: int, width: int, groups: int) -> None:
        super().__init__()
        self.norm1 = group_norm(groups, width_in)
        self.conv1 = Conv2d(width_in, width, 3, padding=1)
        self.norm2 = group_norm(groups, width)
        self.conv2 = Conv2d(width, width, 3, padding=1)
        self.nin_shortcut = Conv2d(width_in, width, 1) if width_in != width else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return self.nin_shortcut(x) + h


class SpatialAttention(nn.Module):
    """Single-head attention over all positions of a map."""

    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.norm = group_norm(groups, width)
        self.q = Conv2d(width, width, 1)
        self.k = Conv2d(width, width, 1)
        self.v = Conv2d(width, width, 1)
        self.proj_out = Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        q, k, v = (
            conv(normed).flatten(2).transpose(1, 2)[:, None] for conv in (self.q, self.k, self.v)
        )  # (B, 1, hw, C)
        mixed = attention(q, k, v)[:, 0].transpose(1, 2).reshape(x.shape)
        return x + self.proj_out(mixed)


class Downsample(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = Conv2d(width, width, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))  # right and bottom only


class Upsample(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """Residual blocks, each followed by attention where the level has it, then a change of size."""

    def __init__(
        self, width_in: int, width: int, groups: int, blocks: int, attended: bool, resize: tuple[str, nn.Module] | None
    ) -> None:
        super().__init__()
        self.block = nn.ModuleList(ResBlock(width if i else width_in, width, groups) for i in range(blocks))
        self.attn = nn.ModuleList(SpatialAttention(width, groups) for _ in range(blocks if attended else 0))
        self.resize = resize[0] if resize else None
        if resize:
            self.add_module(*resize)

    def forward(self, x: Tensor) -> Tensor:
        for index, block in enumerate(self.block):
            x = block(x)
            if self.attn:
                x = self.attn[index](x)
        return getattr(self, self.resize)(x) if self.resize else x


class Middle(nn.Module):
    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.block_1 = ResBlock(width, width, groups)
        self.attn_1 = SpatialAttention(width, groups)
        self.block_2 = ResBlock(width, width, groups)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class VAEEncoder(nn.Module):
    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        widths, last = config.widths, len(config.widths) - 1
        self.conv_in = Conv2d(3, config.base, 3, padding=1)
        self.down = nn.ModuleList(
            Level(
                widths[level - 1] if level else config.base,
                width,
                config.groups,
                BLOCKS,
                attended=level == last,
                resize=("downsample", Downsample(width)) if level < last else None,
            )
            for level, width in enumerate(widths)
        )
        self.mid = Middle(widths[-1], config.groups)
        self.norm_out = group_norm(config.groups, widths[-1])
        self.conv_out = Conv2d(widths[-1], 2 * config.latent, 3, padding=1)
        self.quant_conv = Conv2d(2 * config.latent, 2 * config.latent, 1)

    def forward(self, pixels: Tensor) -> Tensor:
        """pixels (B, 3, 16 m, 16 w) in [-1, 1] to the posterior [mean | log variance], (B, 2 latent, m, w)."""
        x = self.conv_in(pixels)
        for level in self.down:
            x = level(x)
        return self.quant_conv(self.conv_out(F.silu(self.norm_out(self.mid(x)))))


class VAEDecoder(nn.Module):
    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        widths, last = config.widths, len(config.widths) - 1
        self.post_quant_conv = Conv2d(config.latent, config.latent, 1)
        self.conv_in = Conv2d(config.latent, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1], config.groups)
        self.up = nn.ModuleList(
            Level(
                widths[min(level + 1, last)],
                width,
                config.groups,
                BLOCKS + 1,
                attended=False,
                resize=("upsample", Upsample(width)) if level else None,
            )
            for level, width in enumerate(widths)
        )
        self.norm_out = group_norm(config.groups, widths[0])
        self.conv_out = Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, latents: Tensor) -> Tensor:
        """latents (B, latent, m, w) to pixels (B, 3, 16 m, 16 w), about [-1, 1]."""
        x = self.mid(self.conv_in(self.post_quant_conv(latents)))
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))
