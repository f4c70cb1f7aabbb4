"""Convolutional KL autoencoder (arXiv 2112.10752): stride 2 per level but the last.

The encoder returns the posterior [mean | log variance]; a family takes its mean or draws from it.

Two forms, by the type of the configuration. MAR's has attention at the encoder's last level and in both middles, and
1x1 convolutions on the latents' side; Stable Diffusion 3's (arXiv 2403.03206) has attention in the middles only.

Letters: B images, C channels, h w the map's height and width, s the stride, 2 for each level but the last.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels.attention import attention
from .linear import Conv2d

NORM_EPS = 1e-6


@dataclass(frozen=True)
class VAESizes:
    """What both forms have; each of them says how many residual `blocks` a level of the encoder has, and `plain`."""

    base: int
    multipliers: tuple[int, ...]  # channels of level l are base * multipliers[l]
    latent: int
    groups: int  # of every GroupNorm

    @property
    def widths(self) -> tuple[int, ...]:
        return tuple(self.base * m for m in self.multipliers)


@dataclass(frozen=True)
class VAEConfig(VAESizes):
    """MAR's form."""

    blocks: ClassVar[int] = 2
    plain: ClassVar[bool] = False


@dataclass(frozen=True)
class SD3VAEConfig(VAESizes):
    """Stable Diffusion 3's form."""

    blocks: int
    plain: ClassVar[bool] = True


def group_norm(groups: int, channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(groups, channels, eps=NORM_EPS)


def mixer(channels: int, config: VAESizes) -> nn.Module:
    """What stands between the latents and a network."""
    return nn.Identity() if config.plain else Conv2d(channels, channels, 1)


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
    def __init__(self, config: VAESizes) -> None:
        super().__init__()
        widths, last = config.widths, len(config.widths) - 1
        self.conv_in = Conv2d(3, config.base, 3, padding=1)
        self.down = nn.ModuleList(
            Level(
                widths[level - 1] if level else config.base,
                width,
                config.groups,
                config.blocks,
                attended=level == last and not config.plain,
                resize=("downsample", Downsample(width)) if level < last else None,
            )
            for level, width in enumerate(widths)
        )
        self.mid = Middle(widths[-1], config.groups)
        self.norm_out = group_norm(config.groups, widths[-1])
        self.conv_out = Conv2d(widths[-1], 2 * config.latent, 3, padding=1)
        self.quant_conv = mixer(2 * config.latent, config)

    def forward(self, pixels: Tensor) -> Tensor:
        """pixels (B, 3, s h, s w) in [-1, 1] to the posterior [mean | log variance], (B, 2 latent, h, w)."""
        x = self.conv_in(pixels)
        for level in self.down:
            x = level(x)
        return self.quant_conv(self.conv_out(F.silu(self.norm_out(self.mid(x)))))


class VAEDecoder(nn.Module):
    def __init__(self, config: VAESizes) -> None:
        super().__init__()
        widths, last = config.widths, len(config.widths) - 1
        self.post_quant_conv = mixer(config.latent, config)
        self.conv_in = Conv2d(config.latent, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1], config.groups)
        self.up = nn.ModuleList(
            Level(
                widths[min(level + 1, last)],
                width,
                config.groups,
                config.blocks + 1,
                attended=False,
                resize=("upsample", Upsample(width)) if level else None,
            )
            for level, width in enumerate(widths)
        )
        self.norm_out = group_norm(config.groups, widths[0])
        self.conv_out = Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, latents: Tensor) -> Tensor:
        """latents (B, latent, h, w) to pixels (B, 3, s h, s w), about [-1, 1]."""
        x = self.mid(self.conv_in(self.post_quant_conv(latents)))
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))
