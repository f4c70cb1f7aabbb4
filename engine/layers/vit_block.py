"""Pre-norm block of a vision transformer (arXiv 2010.11929): LayerNorm, bidirectional attention, GELU MLP."""

from torch import Tensor, nn

from ...kernels.mar_tokens import select_tokens
from .attention import Attention
from .linear import Linear, linear_add, norm_linear

NORM_EPS = 1e-6


class ViTBlock(nn.Module):
    def __init__(self, width: int, heads: int, mlp: int, attend: Attention) -> None:
        super().__init__()
        self.heads, self.attend = heads, attend
        self.norm1 = nn.LayerNorm(width, eps=NORM_EPS)
        self.qkv = Linear(width, 3 * width)
        self.proj = Linear(width, width)
        self.norm2 = nn.LayerNorm(width, eps=NORM_EPS)
        self.fc1 = Linear(width, mlp)
        self.fc2 = Linear(mlp, width)

    def forward(self, x: Tensor, only: Tensor | None = None) -> Tensor:
        """x (B, L, D). With `only` (B, N), just those rows are computed and returned, (B, N, D).

        They still attend to every row: it is what a last block needs when a few of its outputs are read.
        """
        if only is None:
            q, k, v = self.heads_of(norm_linear(x, self.norm1, self.qkv))
        else:
            width = x.shape[-1]
            k, v = self.heads_of(norm_linear(x, self.norm1, self.qkv, rows=slice(width, None)))
            x = select_tokens(x, only)
            (q,) = self.heads_of(norm_linear(x, self.norm1, self.qkv, rows=slice(width)))
        mixed = self.attend(q, k, v)  # (B, H, L or N, d)
        x = linear_add(mixed.transpose(1, 2).flatten(2), self.proj, residual=x)
        return linear_add(norm_linear(x, self.norm2, self.fc1, act="gelu"), self.fc2, residual=x)

    def heads_of(self, x: Tensor) -> tuple[Tensor, ...]:
        """(B, L, k*D) to k tensors (B, H, L, d)."""
        width = self.proj.in_features
        return tuple(part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in x.split(width, dim=-1))
