"""The denoising steps of one batch of DeepGen 1.0: flow matching by Euler's method, guidance as more rows.

These are one batch of the transformer, or two: that halves what a step holds, and reads the weights twice. Outside the
interval of guidance there are the conditional rows alone.
Letters: B pictures, R guidance rows (B, or 2B with guidance: conditional rows first), C latent channels, S steps,
M text tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...sampling import WHOLE_RUN
from ...schedules import FLOW_STEPS, begins_within, euler_step, flow_match_sigmas
from .block_cache import BlockCache


@dataclass(frozen=True)
class Levels:
    """The noise levels of a batch, S + 1 of them from 1 down to 0."""

    sigmas: tuple[float, ...]

    def __len__(self) -> int:
        return len(self.sigmas) - 1

    @property
    def timesteps(self) -> Tensor:
        """(S) float32, as the transformer sees the levels before the last."""
        return torch.tensor(self.sigmas[:-1]) * FLOW_STEPS

    def to(self, device: torch.device) -> "Levels":
        return self

    @classmethod
    def of(cls, steps: int, shift: float) -> "Levels":
        return cls(tuple(flow_match_sigmas(steps, shift).tolist()))


@dataclass(frozen=True)
class Guided:
    """A prompt for the diffusion transformer, and behind it with guidance what is to be avoided; K is 1 or 2 rows."""

    text: Tensor  # (K, M, text)
    modulation: Tensor  # (S, K, all chunks)


@dataclass(frozen=True)
class Group:
    """Pictures whose texts have the same length, so that nothing has to be padded or masked."""

    images: tuple[int, ...]
    context: Tensor  # (R, M, D)
    tables: tuple[Tensor, ...]  # of each picture, or one that all share: (S, K, all chunks)
    references: Tensor | None  # (B, tokens, D)
    cache: BlockCache | None

    def modulation(self, step: int) -> Tensor:
        """(rows, all chunks), conditional rows first."""
        return torch.stack([table[step] for table in self.tables], dim=1).flatten(0, 1)


class Sampler:
    def __init__(
        self,
        model: nn.Module,
        prompts: Sequence[Guided],
        references: Sequence[Tensor],
        guidance: float,
        *,
        apart: bool = False,
        interval: tuple[float, float] = WHOLE_RUN,
        block_cache: float | None = None,
    ) -> None:
        """`model`: a DeepGen; `prompts`: one a picture; `references`: latents (B, C, h, w) of every source; `apart`:
        unconditional rows come after the conditional ones, not beside them; `interval` and `block_cache` as in
        sampling.Sampling.
        """
        self.model, self.guidance, self.apart, self.interval = model, guidance, apart, interval
        self.steps, self.threshold = len(prompts[0].modulation), block_cache
        tokens = [model.dit.embed(latents) for latents in references]
        seen = torch.cat(tokens, dim=1) if tokens else None
        self.groups = [self.grouped(images, prompts, seen) for images in by_length(prompts)]

    def grouped(self, images: tuple[int, ...], prompts: Sequence[Guided], seen: Tensor | None) -> Group:
        mine = [prompts[image] for image in images]
        text = torch.stack([prompt.text for prompt in mine], dim=1).flatten(0, 1)
        tables = tuple({id(prompt): prompt.modulation for prompt in mine}.values())
        tables = tables if len(tables) == 1 else tuple(prompt.modulation for prompt in mine)
        references = None if seen is None else seen[list(images)]
        cache = None
        if self.threshold is not None:
            cache = BlockCache(self.model.dit, self.model.graphs, self.threshold)
        return Group(images, self.model.dit.context_embed(text), tables, references, cache)

    def velocity(self, latents: Tensor, step: int) -> Tensor:
        """Of latents (B, C, h, w), guided."""
        found = {}
        for group in self.groups:
            mine = torch.stack([latents[image] for image in group.images])  # a list as index would wait for the device
            found |= zip(group.images, self.guided(self.rows(mine, group, step), len(mine)), strict=True)
        return torch.stack([found[image] for image in range(len(latents))])

    def rows(self, latents: Tensor, group: Group, step: int) -> Tensor:
        """The velocities of a group (R, C, h, w), unguided; in steps without guidance of the conditional rows alone."""
        passes, on = [(group.context, group.modulation(step))], self.is_guided(step)
        if self.guidance != 1.0 and (self.apart or not on):
            passes = [*zip(*(x.chunk(2) for x in passes[0]), strict=True)][: 1 + on]
        return torch.cat([self.transformed(latents, group, *one, index) for index, one in enumerate(passes)])

    def is_guided(self, step: int) -> bool:
        return self.guidance != 1.0 and begins_within(self.interval, step, self.steps)

    def transformed(self, latents: Tensor, group: Group, context: Tensor, modulation: Tensor, index: int) -> Tensor:
        """The transformer's velocities of as many rows as `context` has, the pass number `index` of the step."""
        given = latents, context, modulation, group.references
        if group.cache:
            return group.cache.velocity(index * len(latents), *given)
        key = tuple(x if x is None else tuple(x.shape) for x in given)
        return self.model.graphs.run("round", key, self.model.dit, given).clone()  # the next call may overwrite it

    def guided(self, velocity: Tensor, pictures: int) -> Tensor:
        """(R, C, h, w) to (B, C, h, w), in the model's precision; rows without guidance as they are."""
        if len(velocity) == pictures:
            return velocity
        cond, uncond = velocity.chunk(2)
        return uncond + self.guidance * (cond - uncond)

    def step(self, latents: Tensor, levels: Levels, step: int) -> tuple[Tensor, Tensor]:
        """(the next latents, the clean ones that this step predicts); after the last step they are the same."""
        velocity, now, then = self.velocity(latents, step), levels.sigmas[step], levels.sigmas[step + 1]
        clean = euler_step(latents, velocity, -now)
        return (euler_step(latents, velocity, then - now) if then else clean), clean


def by_length(prompts: Sequence[Guided]) -> list[tuple[int, ...]]:
    """Numbers of the pictures whose texts have the same length, in order."""
    groups: dict[int, list[int]] = {}
    for image, prompt in enumerate(prompts):
        groups.setdefault(prompt.text.shape[1], []).append(image)
    return [tuple(images) for images in groups.values()]
