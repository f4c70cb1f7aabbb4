"""The diffusion transformer of DeepGen 1.0 and UniPic 2: Stable Diffusion 3.5 Medium's MMDiT-X (arXiv 2403.03206) with
reference pictures (arXiv 2506.15742).

Image and text are two streams with weights of their own that meet in every block's attention; in the first blocks the
image also attends to itself alone. Tokens of references follow those of the noisy picture, with the same positions:
every picture has the centre of the position table. The output is the velocity of the noisy picture alone.

    here (qkv: fused along the outputs)    diffusers
    pos_table (side, side, D)              pos_embed.pos_embed (1, side^2, D); may be cut, by as much on all four sides
    patch_embed                            pos_embed.proj, its weight (D, C, 2, 2) flattened to (D, 4 C)
    context_embed                          context_embedder
    out                                    proj_out
    blocks.N.image.qkv                     transformer_blocks.N.attn.to_q, to_k, to_v
                   q_norm, k_norm          attn.norm_q, norm_k
                   proj, fc1, fc2          attn.to_out.0, ff.net.0.proj, ff.net.2
    blocks.N.text.qkv                      attn.add_q_proj, add_k_proj, add_v_proj
                  q_norm, k_norm           attn.norm_added_q, norm_added_k
                  proj, fc1, fc2           attn.to_add_out, ff_context.net.0.proj, ff_context.net.2; not in the last
    blocks.N.alone.qkv                     attn2.to_q, to_k, to_v; the first `dual` blocks have it
                   q_norm, k_norm, proj    attn2.norm_q, norm_k, to_out.0

The rest of diffusers' weights is in modulation.py. Letters: B pictures, R guidance rows, C latent channels, h w the
latents' height and width, n image tokens, N those with the references', M text tokens, H heads, d their width, D width.
"""

from collections.abc import Sequence
from itertools import islice

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...layers.attention import Attention
from ...layers.joint_attention import Attended, joint_attention
from ...layers.linear import Linear, Modulation, linear_add, norm_linear, norm_mlp
from .config import DiTConfig
from .modulation import of_layers

NORM_EPS = 1e-6


def bare_norm(width: int) -> nn.LayerNorm:
    return nn.LayerNorm(width, eps=NORM_EPS, elementwise_affine=False)


class QKV(nn.Module):
    """Queries, keys and values of a stream; queries and keys have a norm for every head."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        width = config.heads * config.head_dim
        self.norm = bare_norm(width)
        self.qkv = Linear(width, 3 * width)
        self.q_norm = nn.RMSNorm(config.head_dim, eps=NORM_EPS)
        self.k_norm = nn.RMSNorm(config.head_dim, eps=NORM_EPS)

    def forward(self, x: Tensor, modulation: Modulation) -> Attended:
        """x (R, L, D) to what `joint_attention` takes."""
        return Attended(x, modulation, self.norm, self.qkv, (self.q_norm.weight, self.k_norm.weight))


class SelfAttention(QKV):
    def __init__(self, config: DiTConfig) -> None:
        super().__init__(config)
        width = config.heads * config.head_dim
        self.proj = Linear(width, width)


class Stream(SelfAttention):
    """What one of the two streams has of a block."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__(config)
        width = config.heads * config.head_dim
        self.fc1 = Linear(width, config.mlp)
        self.fc2 = Linear(config.mlp, width)

    def mlp(self, x: Tensor, modulation: Modulation, gate: Tensor) -> Tensor:
        return norm_mlp(x, self.norm, self.fc1, self.fc2, "gelu_tanh", modulation, gate)


class Block(nn.Module):
    def __init__(self, config: DiTConfig, attend: Attention, dual: bool, last: bool) -> None:
        super().__init__()
        self.heads, self.attend, self.last = config.heads, attend, last
        self.image = Stream(config)
        self.text = QKV(config) if last else Stream(config)
        self.alone = SelfAttention(config) if dual else None

    def forward(
        self, image: Tensor, text: Tensor, of_image: Sequence[Tensor], of_text: Sequence[Tensor], noisy: int
    ) -> tuple[Tensor, Tensor]:
        """image (R, N, D), text (R, M, D) and their chunks of modulation, to the next image and text.

        The last block returns the first `noisy` image tokens, (R, noisy, D), and the text as it was.
        """
        image, text = self.attended(image, text, of_image, of_text, noisy if self.last else image.shape[1])
        image = self.image.mlp(image, of_image[3:5], of_image[5])
        return image, text if self.last else self.text.mlp(text, of_text[3:5], of_text[5])

    def attended(
        self, image: Tensor, text: Tensor, of_image: Sequence[Tensor], of_text: Sequence[Tensor], wanted: int
    ) -> tuple[Tensor, Tensor]:
        """The first half of the block, for the first `wanted` image tokens."""
        shift, scale, gate, *_ = of_image
        # The last block's other queries are made in vain, 0.04 to 0.14 % of a step.
        mixed = self.mixed(
            self.image(image, (shift, scale)), self.text(text, of_text[:2]), wanted=wanted if self.last else None
        )
        out = linear_add(mixed[:, :wanted], self.image.proj, residual=image[:, :wanted], gate=gate)
        if not self.last:
            text = linear_add(mixed[:, wanted:], self.text.proj, residual=text, gate=of_text[2])
        if self.alone:
            shift, scale, gate = of_image[6:]
            mixed = self.mixed(self.alone(image, (shift, scale)), wanted=wanted)
            out = linear_add(mixed, self.alone.proj, residual=out, gate=gate)
        return out, text

    def mixed(self, *streams: Attended, wanted: int | None) -> Tensor:
        """The first `wanted` tokens, or all, of these one after another, (R, L, D)."""
        return joint_attention(self.attend, streams, self.heads, NORM_EPS, wanted)


class MMDiT(nn.Module):
    def __init__(self, config: DiTConfig, attend: Attention) -> None:
        super().__init__()
        self.config = config
        width, patch = config.heads * config.head_dim, config.channels * config.patch**2
        self.pos_table = nn.Parameter(torch.empty(config.table, config.table, width))
        self.patch_embed = Linear(patch, width)
        self.context_embed = Linear(config.text, width)
        self.blocks = nn.ModuleList(
            Block(config, attend, dual=index < config.dual, last=index == config.depth - 1)
            for index in range(config.depth)
        )
        self.norm = bare_norm(width)
        self.out = Linear(width, patch)

    def embed(self, latents: Tensor) -> Tensor:
        """Latents (B, C, h, w), h and w multiples of the patch, to tokens with positions (B, n, D).

        Of references this is the same in every step; a patch's features come in the order of channel, row, column.
        """
        patches = F.pixel_unshuffle(latents, self.config.patch)  # (B, 4 C, rows, columns)
        return self.patch_embed(patches.flatten(2).transpose(1, 2)) + self.positions(*patches.shape[2:])

    def positions(self, rows: int, columns: int) -> Tensor:
        """The centre of the table, (rows * columns, D)."""
        top, left = (len(self.pos_table) - rows) // 2, (len(self.pos_table) - columns) // 2
        return self.pos_table[top : top + rows, left : left + columns].flatten(0, 1)

    def forward(self, latents: Tensor, context: Tensor, modulation: Tensor, references: Tensor | None = None) -> Tensor:
        """The velocity (R, C, h, w) of latents (B, C, h, w) at one noise level.

        context (R, M, D) = context_embed(text), whose rows are k times those of the pictures, and modulation, a step's
        table, each row of which is for as many rows; references (B, N - n, D), the `embed` of each one after another.
        """
        noisy, rows = self.noisy(latents), len(context)
        # No name and no tuple holds these tokens here, so that they go with the first block: 24 MiB at 1024x1024.
        image, _ = self.through(self.tokens(latents, rows, references), context, modulation, noisy)
        return self.velocity(image, modulation, *latents.shape[2:])

    def first(
        self, latents: Tensor, context: Tensor, modulation: Tensor, references: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The first block's image (R, N, D) and text (R, M, D), and what it adds to the noisy tokens (R, n, D)."""
        before, noisy = self.tokens(latents, len(context), references), self.noisy(latents)
        image, text = self.through(before, context, modulation, noisy, 0, 1)
        return image, text, (image - before)[:, :noisy]

    def rest(self, image: Tensor, text: Tensor, modulation: Tensor, noisy: int) -> tuple[Tensor, Tensor]:
        """The noisy tokens (R, n, D) behind all other blocks, and what these add to them."""
        out, _ = self.through(image, text, modulation, noisy, 1)
        return out, out - image[:, :noisy]

    def tokens(self, latents: Tensor, rows: int, references: Tensor | None) -> Tensor:
        """Of latents (B, C, h, w) and references, (R, N, D)."""
        image = self.embed(latents)
        image = image if references is None else torch.cat([image, references], dim=1)
        return image.repeat(rows // len(image), 1, 1)

    def noisy(self, latents: Tensor) -> int:
        """n"""
        return latents[0, 0].numel() // self.config.patch**2

    def through(
        self, image: Tensor, text: Tensor, modulation: Tensor, noisy: int, first: int = 0, last: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """image (R, N, D) and text (R, M, D) through the blocks from `first` to before `last`."""
        *chunks, _ = of_layers(modulation, self.config)
        every = zip(self.blocks, chunks[::2], chunks[1::2], strict=True)  # in order, as streamed ones come
        for block, *both in islice(every, first, last):
            image, text = block(image, text, *both, noisy)
        return image, text

    def velocity(self, x: Tensor, modulation: Tensor, height: int, width: int) -> Tensor:
        """The noisy tokens (R, n, D) behind the last block to (R, C, height, width)."""
        final = of_layers(modulation, self.config)[-1]
        return self.picture(norm_linear(x, self.norm, self.out, final), height, width)

    def picture(self, x: Tensor, height: int, width: int) -> Tensor:
        """Tokens (R, n, 4 C), in the order of row, column, channel, to (R, C, height, width)."""
        patch = self.config.patch
        x = x.unflatten(2, (patch, patch, -1)).unflatten(1, (height // patch, width // patch))
        return x.permute(0, 5, 1, 3, 2, 4).reshape(len(x), -1, height, width)
