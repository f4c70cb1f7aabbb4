"""Pre-norm block of a vision transformer (arXiv 2010.11929): LayerNorm, bidirectional attention, GELU MLP."""

from torch import Tensor, nn

from ...kernels.mar_tokens import select_tokens
from .attention import Attention
from .int8_attention import attends_in_int8, norm_attention_int8
from .linear import Linear, linear_add, norm_linear, norm_mlp

NORM_EPS = 1e-6


class ViTBlock(nn.Module):
    """`act`: gelu, or gelu_tanh for its approximation."""

    def __init__(
        self, width: int, heads: int, mlp: int, attend: Attention, act: str = "gelu", eps: float = NORM_EPS
    ) -> None:
        super().__init__()
        self.heads, self.attend, self.act = heads, attend, act
        self.norm1 = nn.LayerNorm(width, eps=eps)
        self.qkv = Linear(width, 3 * width)
        self.proj = Linear(width, width)
        self.norm2 = nn.LayerNorm(width, eps=eps)
        self.fc1 = Linear(width, mlp)
        self.fc2 = Linear(mlp, width)

    def forward(self, x: Tensor, only: Tensor | None = None) -> Tensor:
        """x (B, L, D). With `only` (B, N), just those rows are computed and returned, (B, N, D).

        They still attend to every row: it is what a last block needs when a few of its outputs are read.
        """
        picked = x if only is None else select_tokens(x, only)
        if attends_in_int8(self.attend, self.qkv, self.proj, x, self.heads):
            x = norm_attention_int8(x, picked, self.norm1, self.qkv, self.proj, self.heads)
        else:
            x = linear_add(self.mixed(x, picked), self.proj, residual=picked)
        return norm_mlp(x, self.norm2, self.fc1, self.fc2, act=self.act)

    def mixed(self, x: Tensor, picked: Tensor) -> Tensor:
        """Attention of the rows `picked` (B, L or N, D) to all rows of x (B, L, D)."""
        if picked is x:
            q, k, v = self.heads_of(norm_linear(x, self.norm1, self.qkv))
        else:
            width = x.shape[-1]
            k, v = self.heads_of(norm_linear(x, self.norm1, self.qkv, rows=slice(width, None)))
            (q,) = self.heads_of(norm_linear(picked, self.norm1, self.qkv, rows=slice(width)))
        return self.attend(q, k, v).transpose(1, 2).flatten(2)  # from (B, H, L or N, d)

    def heads_of(self, x: Tensor) -> tuple[Tensor, ...]:
        """(B, L, k*D) to k tensors (B, H, L, d)."""
        width = self.proj.in_features
        return tuple(part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in x.split(width, dim=-1))
