"""The vision tower of Qwen2.5-VL (arXiv 2502.13923): a picture to tokens that the language model reads.

Squares of 2x2 patches become one token, a *cell*; patches are ordered by their cells throughout. Most blocks attend
inside windows of 4x4 cells, so cells are taken window by window: windows of one size then lie side by side and are one
batch, and those cut off at the right and lower edge are three more at most, without pads or masks.

Letters: n patches, c cells, D width, H heads, d head dim, W windows, m patches of a window.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ....kernels.quantise import activated
from ....kernels.rope import rope, split_heads
from ...layers.attention import Attention
from ...layers.linear import Linear, linear_add, norm_linear, norm_mlp
from ...layers.qwen2 import RMSNorm, axes_tables
from .config import VisionConfig

PATCH, TEMPORAL, MERGE = 14, 2, 2  # of all Qwen2.5-VL: side in pixels, frames, side of a cell in patches
PIXELS = 32  # side of a cell before a picture is made smaller: that of a token of the diffusion transformer
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # of pixels in [0, 1]
ROPE_THETA = 1e4

Windows = tuple[tuple[int, int], ...]  # (W, m) of windows of equal size that follow each other


def patches(pixels: Tensor) -> tuple[Tensor, int, int]:
    """pixels (1, 3, H, W) in [-1, 1], sides multiples of 32, as DeepGen shows them: 28 pixels for 32.

    Returns what `as_patches` does.
    """
    scale = PATCH * MERGE / PIXELS
    return as_patches(F.interpolate(pixels, scale_factor=scale, mode="bilinear", align_corners=False))


def as_patches(pixels: Tensor) -> tuple[Tensor, int, int]:
    """pixels (1, 3, 14 rows, 14 columns) in [-1, 1], rows and columns even, to patches (n, 1176), rows, columns."""
    mean, std = (pixels.new_tensor(each)[:, None, None] for each in (MEAN, STD))
    x = ((pixels[0] + 1) / 2 - mean) / std
    rows, columns = x.shape[1] // PATCH, x.shape[2] // PATCH
    x = x.view(3, rows // MERGE, MERGE, PATCH, columns // MERGE, MERGE, PATCH).permute(1, 4, 2, 5, 0, 3, 6)
    x = x[..., None, :, :].expand(*[-1] * 5, TEMPORAL, -1, -1)  # (rows/2, columns/2, 2, 2, 3, 2, 14, 14)
    return x.reshape(rows * columns, -1), rows, columns


def by_windows(rows: int, columns: int, side: int, device: torch.device) -> tuple[Tensor, Windows]:
    """Cells (c) of a grid of rows x columns cells in the order of windows of side x side, and the windows' sizes.

    Sizes count cells.
    """
    cells = torch.arange(rows * columns, device=device).view(rows, columns)
    order, sizes = [], []
    for band in cells.split([rows // side * side, rows % side]):
        for block in band.split([columns // side * side, columns % side], dim=1):
            if block.numel():
                high, wide = min(side, block.shape[0]), min(side, block.shape[1])
                tiles = block.unflatten(1, (-1, wide)).unflatten(0, (-1, high)).transpose(1, 2)
                order.append(tiles.flatten())
                sizes.append((block.numel() // (high * wide), high * wide))
    return torch.cat(order), tuple(sizes)


def patch_positions(rows: int, columns: int, device: torch.device) -> Tensor:
    """Row and column (2, n) of the patches of a grid of rows x columns patches."""
    at = (torch.arange(count, device=device) for count in (rows, columns))
    grid = torch.stack(torch.meshgrid(*at, indexing="ij"))  # (2, rows, columns)
    return grid.unflatten(2, (-1, MERGE)).unflatten(1, (-1, MERGE)).transpose(2, 3).flatten(1)


def attend_in(windows: Windows, attend: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention inside windows of q, k, v (1, H, n, d), patches in the windows' order: (1, n, D)."""
    out, lengths = [], [count * size for count, size in windows]
    for (count, size), *qkv in zip(windows, *(x[0].split(lengths, dim=1) for x in (q, k, v)), strict=True):
        mixed = attend(*(x.unflatten(1, (count, size)).transpose(0, 1) for x in qkv))  # (W, H, m, d)
        out.append(mixed.transpose(1, 2).flatten(2).flatten(0, 1))
    return torch.cat(out)[None]


class VisionBlock(nn.Module):
    def __init__(self, config: VisionConfig, attend: Attention) -> None:
        super().__init__()
        width, self.heads, self.attend = config.width, config.heads, attend
        self.norm1 = RMSNorm(width, config.eps)
        self.qkv = Linear(width, 3 * width)
        self.proj = Linear(width, width)
        self.norm2 = RMSNorm(width, config.eps)
        self.gate_up = Linear(width, 2 * config.mlp)
        self.down = Linear(config.mlp, width)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, windows: Windows) -> Tensor:
        """x (1, n, D) in the windows' order; cos, sin (1, 1, n, d) float32, in which heads are rotated."""
        q, k, v = split_heads(norm_linear(x, self.norm1, self.qkv), self.heads, self.heads)
        q, k = rope(q, cos, sin).to(x.dtype), rope(k, cos, sin).to(x.dtype)
        x = linear_add(attend_in(windows, self.attend, q, k, v), self.proj, residual=x)
        return norm_mlp(x, self.norm2, self.gate_up, self.down, act="swiglu")


class Merger(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.inner = config.width * config.merge**2
        self.norm = RMSNorm(config.width, config.eps)
        self.fc1 = Linear(self.inner, self.inner)
        self.fc2 = Linear(self.inner, config.out)

    def forward(self, x: Tensor) -> Tensor:
        """Patches (n, D) to cells (c, out)."""
        return self.fc2(activated(self.fc1(self.norm(x).view(-1, self.inner)), "gelu"))


class VisionTower(nn.Module):
    def __init__(self, config: VisionConfig, attend: Attention) -> None:
        super().__init__()
        self.config = config
        self.patch_embed = Linear(3 * config.temporal * config.patch**2, config.width, bias=False)
        self.blocks = nn.ModuleList(VisionBlock(config, attend) for _ in range(config.depth))
        self.merger = Merger(config)

    def forward(self, x: Tensor, rows: int, columns: int) -> Tensor:
        """Patches (n, 1176) of a grid of rows x columns patches, both even, to cells (n/4, out), row by row."""
        c, cell = self.config, self.config.merge**2
        side = c.window // (c.patch * c.merge)
        order, sizes = by_windows(rows // c.merge, columns // c.merge, side, x.device)
        windows, whole = tuple((count, size * cell) for count, size in sizes), ((1, len(x)),)
        cos, sin = self.rotary(rows, columns, order)
        x = self.patch_embed(x.unflatten(0, (-1, cell))[order].flatten(0, 1))[None]  # (1, n, D)
        for index, block in enumerate(self.blocks):
            x = block(x, cos, sin, whole if index in c.full else windows)
        return self.merger(x[0])[order.argsort()]

    def rotary(self, rows: int, columns: int, order: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin (1, 1, n, d) float32, half the frequencies for rows and half for columns, cells in `order`."""
        half = self.config.width // self.config.heads // 2
        inv_freq = ROPE_THETA ** -(torch.arange(0, half, 2, device=order.device).float() / half)  # (d/4)
        at = patch_positions(rows, columns, order.device).unflatten(1, (-1, self.config.merge**2))
        return axes_tables(at[:, order].flatten(1)[:, None], torch.block_diag(inv_freq, inv_freq), torch.float32)
