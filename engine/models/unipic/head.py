"""Diffusion head of UniPic 1.0: an adaLN-modulated MLP that denoises each latent token by itself (arXiv 2406.11838).

Letters: N tokens, C latent channels, W head width. With guidance the conditions come as [cond N | uncond N].
"""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ....kernels.condition import condition
from ....kernels.ddpm_step import DDPMStep, Drawn, ddpm_step
from ....kernels.head_step import head_step
from ....kernels.linear import linear
from ...graphs import Graphs
from ...layers.linear import FUSED_ROWS, Linear, linear_each, norm_mlp
from ...layers.timesteps import timestep_features
from .config import HeadConfig

Product = tuple[Tensor, Tensor]  # weight and bias

NORM_EPS = 1e-6
# Timesteps whose modulations are made at once, at most, where steps are launched or replayed. A round's first chunk is
# launched and then captured, while the card waits for the host: the shorter, the sooner all others are replays. Far
# fewer would be more than 30 launches a step, so a batch takes room for these up to the FUSED_ROWS of five pictures:
# less than what the language model needs for a round of as many, whatever the type.
CHUNK = 5
CHUNK_BYTES = 2**28  # that modulations of several steps may take, where these are not CHUNK of up to FUSED_ROWS
OFTEN = 3  # chunks that are alike in a round pay for the capture of one of them at once


class HeadBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=NORM_EPS)
        self.fc1 = Linear(width, width)
        self.fc2 = Linear(width, width)
        self.modulation = Linear(width, 3 * width)

    def forward(self, h: Tensor, modulation: Tensor) -> Tensor:
        """h (N, W) state, modulation (N, 3W) = self.modulation(SiLU of the condition)."""
        shift, scale, gate = modulation.chunk(3, dim=-1)
        return norm_mlp(h, self.norm, self.fc1, self.fc2, act="silu", modulation=(shift, scale), gate=gate)


class FinalLayer(nn.Module):
    def __init__(self, width: int, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=NORM_EPS, elementwise_affine=False)
        self.linear = Linear(width, 2 * channels)
        self.modulation = Linear(width, 2 * width)

    def folded(self) -> Product:
        """Makes [scale | offset] (N, W + 2C) of a condition: behind the linear layer a shift is 2C columns, not W.

        linear(n (1 + scale) + shift) = (n (1 + scale)) W^T + offset, offset = linear(shift); shift is linear as well.
        """
        (shift, scale), (shift_bias, scale_bias) = self.modulation.weight.chunk(2), self.modulation.bias.chunk(2)
        behind = linear(self.linear.weight, shift.T), self.linear(shift_bias)
        return tuple(torch.cat(both) for both in zip((scale, scale_bias), behind, strict=True))

    def forward(self, h: Tensor, modulation: Tensor) -> Tensor:
        """h (N, W), modulation (N, W + 2C) = [scale | offset] -> (N, 2C)."""
        scale, offset = self.parts(modulation)
        return linear(self.norm(h) * (1 + scale), self.linear.weight) + offset

    def parts(self, modulation: Tensor) -> list[Tensor]:
        return modulation.split([modulation.shape[-1] - self.linear.out_features, self.linear.out_features], dim=-1)


@dataclass(frozen=True)
class Denoising:
    """N tokens on their way, all in device memory and changed in place: a captured chunk of steps can be replayed."""

    x: Tensor  # (N, C) float32, the state
    before: Tensor | None  # the same, what a solver of the ODE keeps; None where noise is drawn
    h: Tensor  # (M, W) = input_proj of it; M = N, or 2N with guidance
    clock: Tensor  # (3) int64, as kernels/head_step.py has it
    c: Tensor  # (M, W) = cond_embed(z)
    final: Product  # `FinalLayer.folded`
    drawn: Drawn | None
    table: Tensor  # (T, 9), of `step_table`; what is behind the steps to be taken is never read
    embedded: Tensor  # (T, W), of `embed_steps`


class DiffusionHead(nn.Module):
    def __init__(self, config: HeadConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.time_embed = nn.Sequential(Linear(config.frequencies, width), nn.SiLU(), Linear(width, width))
        self.cond_embed = Linear(config.condition, width)
        self.input_proj = Linear(config.channels, width)
        self.blocks = nn.ModuleList(HeadBlock(width) for _ in range(config.depth))
        self.final = FinalLayer(width, config.channels)

    def embed_steps(self, table: Sequence[DDPMStep]) -> Tensor:
        """Embeddings of all timesteps of a table, once per request: (T, W)."""
        parameter = self.time_embed[0].weight
        timesteps = torch.tensor([step.timestep for step in table], device=parameter.device)
        return self.time_embed(timestep_features(timesteps, self.config.frequencies).to(parameter.dtype))

    def forward(self, x: Tensor, t: Tensor, c: Tensor) -> Tensor:
        """x (N, C), t (W) or (N, W) embedded timestep, c (N, W) = cond_embed(z) -> (N, 2C) = [eps | v]."""
        return self.network(x, self.modulations(F.silu(t + c), self.final.folded()))

    def modulations(self, y: Tensor, final: Product) -> Iterator[Tensor]:
        """Of every block and the final layer, from y (..., W): (..., 3W) each, the last (..., W + 2C)."""
        yield from linear_each(y, [block.modulation for block in self.blocks])
        yield linear(y, *final)

    def of_steps(self, y: Tensor, final: Product) -> Iterator[Iterator[Tensor]]:
        """The modulations of each step, from y (steps, N, W): one product a layer for all steps.

        Those of a single step are made as they are asked for, so that only one of them takes up memory.
        """
        made = self.modulations(y, final)
        made = made if len(y) == 1 else list(made)
        return ((modulation[step] for modulation in made) for step in range(len(y)))

    def network(self, x: Tensor, modulations: Iterator[Tensor]) -> Tensor:
        """x (N, C) and every layer's modulations (N, ...) -> (N, 2C) = [eps | v]."""
        h = self.through_blocks(self.input_proj(x), modulations)
        return self.final(h, next(modulations))

    def through_blocks(self, h: Tensor, modulations: Iterator[Tensor]) -> Tensor:
        for block in self.blocks:
            h = block(h, next(modulations))
        return h

    def most_steps(self, rows: int) -> int:
        """The most timesteps, at least one, whose modulations of so many rows fit CHUNK_BYTES.

        CHUNK fit up to FUSED_ROWS, whatever they take.
        """
        width, itemsize = self.config.width, self.input_proj.weight.element_size()
        step = max(1, rows * ((3 * self.config.depth + 1) * width + 2 * self.config.channels) * itemsize)
        return max(1, CHUNK_BYTES // step, CHUNK if rows <= FUSED_ROWS else 0)

    def sample(
        self,
        z: Tensor,
        start: Tensor,
        noise: Tensor | None,
        table: Sequence[DDPMStep],
        embedded: Tensor,
        guidance: float,
        temperature: float,
        chunk: int | None = None,
    ) -> Tensor:
        """Denoise N tokens; returns (N, C) float32.

        z (N, D), or (2N, D) with guidance; start (N, C) and noise (steps, N, C) float32; embedded = embed_steps(table).
        Without noise the table is that of a solver of the ODE.
        Only the conditional state exists: the original's unconditional twin is never read. The modulations of `chunk`
        timesteps, by default of `most_steps`, are made at once: the same values, fewer larger products.
        """
        guided = z.shape[0] != start.shape[0]
        c, final = self.cond_embed(z), self.final.folded()
        x, chunk = start, chunk or self.most_steps(len(z))
        before = torch.zeros_like(start) if noise is None else None
        for end in range(len(table), 0, -chunk):
            taken = range(max(0, end - chunk), end)
            y = F.silu(embedded[taken.start : end].flip(0)[:, None] + c)  # (steps, N or 2N, W)
            for i, modulations in zip(reversed(taken), self.of_steps(y, final), strict=True):
                seen = x.to(c.dtype)
                out = self.network(seen.repeat(2, 1) if guided else seen, modulations)
                cond, uncond = out.chunk(2) if guided else (out, None)
                drawn = None if noise is None or not i else noise[len(table) - 1 - i]
                x = ddpm_step(x, cond, uncond, drawn, table[i], guidance, temperature, before)
        return x

    def sample_drawn(
        self,
        z: Tensor,
        start: Tensor,
        drawn: Drawn | None,
        table: Tensor,
        embedded: Tensor,
        final: Product,
        graphs: Graphs,
    ) -> Tensor:
        """As `sample`, but noise is drawn where it is used, and table (T, 9) of `step_table` has all numbers.

        `final` = self.final.folded(), made once a request.

        What it returns may be overwritten by the next call: chunks of steps are captured, at once where there are
        OFTEN alike, else when a later round has them too. Rounds of as many rows and other steps share them, since
        tables are as long as the model's own, or longer.
        """
        steps, longest = len(table), max(len(table), self.config.steps)
        taken = chunks(steps, self.most_steps(len(z)))
        alike, key = Counter(taken), (len(z), len(start), longest, drawn is None)
        tables = graphs.hold("timesteps", longest, tuple(padded(x, longest) for x in (table, embedded)))
        run = self.begin(z, start, drawn, steps, *tables, final)
        run = graphs.hold("head", key, run, at_sight=max(alike.values()) >= OFTEN)
        for chunk in taken:
            after = 1 if alike[chunk] >= OFTEN else alike[chunk] + 1
            graphs.run("head", (*key, chunk), self.advance, (run, chunk), after)
        return run.x

    def begin(
        self, z: Tensor, start: Tensor, drawn: Drawn | None, steps: int, table: Tensor, embedded: Tensor, final: Product
    ) -> Denoising:
        """Ready for the first of so many steps; other arguments as in `sample_drawn`, tables may be longer."""
        c = self.cond_embed(z)
        seen = start.to(c.dtype).repeat(len(z) // max(len(start), 1), 1)
        clock = torch.full((3,), steps - 1, device=start.device)
        before = torch.zeros_like(start) if drawn is None else None
        return Denoising(start.clone(), before, self.input_proj(seen), clock, c, final, drawn, table, embedded)

    def advance(self, run: Denoising, steps: int = 1) -> None:
        """Take the next steps, in place; their modulations are made at once."""
        made = self.of_steps(condition(run.embedded, run.c, run.clock, steps), run.final)
        final, first = self.final, self.input_proj
        for ahead, modulations in enumerate(made):
            h = self.through_blocks(run.h, modulations)
            out = h, *final.parts(next(modulations)), NORM_EPS, final.linear.weight
            close = steps if ahead == steps - 1 else 0
            changed = run.x, run.before, run.h, run.clock
            head_step(*out, first.weight, first.bias, *changed, run.table, run.drawn, ahead, close)


def chunks(steps: int, most: int) -> list[int]:
    """How many of the steps are taken at once, one after the other: at most so many, and alike but for the last."""
    size = min(most, CHUNK)
    size = math.ceil(steps / math.ceil(steps / size))
    return [min(size, left) for left in range(steps, 0, -size)]


def padded(table: Tensor, length: int) -> Tensor:
    """table (T, columns) with rows of zeros behind it, `length` in all."""
    return F.pad(table, (0, 0, 0, length - len(table)))
