"""Moving tokens between the visible set and the full grid, the data movement of masked autoregressive decoding.

Index plans are int64 raster positions (0 .. n-1), one row a sequence, all rows equally long, made before the loop
by `engine/schedules.py`. The first `buffer` rows of every sequence are the MAR buffer. D is the MAR width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def select_tokens(x: Tensor, index: Tensor) -> Tensor:
    """Rows of x (R, n, D) at index (R, N): (R, N, D)."""
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))


def embed_visible(
    tokens: Tensor, visible: Tensor, project: torch.nn.Linear, norm: torch.nn.LayerNorm, first: Tensor, position: Tensor
) -> Tensor:
    """Encoder input LN([first | project(visible tokens)] + position).

    tokens (B, n, C), visible (B, V), first (1, D) repeated over the buffer, position (buffer + n, D).
    Returns (B, buffer + V, D), visible tokens in raster order.
    """
    batch, n, _ = tokens.shape
    buffer = position.shape[0] - n
    x = project(select_tokens(tokens, visible)) + position[buffer:][visible]  # (B, V, D)
    head = (first + position[:buffer]).expand(batch, -1, -1)  # (B, buffer, D)
    return norm(torch.cat([head, x], dim=1))


def place_tokens(x: Tensor, visible: Tensor, base: Tensor, position: Tensor) -> Tensor:
    """Decoder input: base everywhere, x over the buffer and the visible positions, plus position.

    x (R, buffer + V, D), visible (R, V), base (1, buffer + n, D) or broadcastable, position (buffer + n, D).
    Returns (R, buffer + n, D).
    """
    rows, _, width = x.shape
    buffer = x.shape[1] - visible.shape[1]
    full = base.expand(rows, position.shape[0], width).clone()
    full[:, :buffer] = x[:, :buffer]
    full = full.scatter(1, (visible + buffer)[..., None].expand(-1, -1, width), x[:, buffer:])
    return full + position


def grid_positions(table: Tensor, buffer: int, rows: int, columns: int) -> Tensor:
    """A learned position table (1, buffer + g*g, D) resized to a rows x columns grid: (buffer + rows*columns, D).

    Bilinear, half-pixel centres, no antialias, in the table's dtype; buffer rows and the native grid stay as they are.
    """
    front, grid = table[0, :buffer], table[0, buffer:]
    side = round(grid.shape[0] ** 0.5)
    if (rows, columns) != (side, side):
        image = grid.view(1, side, side, -1).permute(0, 3, 1, 2)  # (1, D, g, g)
        image = F.interpolate(image, size=(rows, columns), mode="bilinear", align_corners=False)
        grid = image.permute(0, 2, 3, 1).reshape(rows * columns, -1)
    return torch.cat([front, grid])
