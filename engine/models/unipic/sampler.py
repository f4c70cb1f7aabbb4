"""The rounds of one batch of UniPic 1.0: what stays the same over them is made once, what repeats is replayed.

Letters as in model.py: B images, R guidance rows, n grid tokens, N tokens predicted in a round, D MAR width.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ....kernels._op import launches
from ....kernels.ddpm_step import GUIDANCE, DDPMStep, Drawn, step_table
from ....kernels.mar_tokens import select_tokens
from ....kernels.philox import token_noise
from ...kv_cache import KVCache, Prompts
from ...noise import Noise, Stream
from ...schedules import Round, annealed_steps, begins_within, ddpm_table, guidance_at, ode_table
from ...task import Task

# With few steps the one from timestep 999 to the next multiplies the error of the predicted noise by hundreds.
LATEST = 950
ODE_ORDERS = {"ddim": 1, "dpm2": 2}  # of the solvers that draw no noise


@dataclass(frozen=True)
class Table:
    """A round's denoising steps, their embeddings (T, W), and (T, 9) of `step_table` where kernels take them."""

    steps: list[DDPMStep]
    embedded: Tensor
    coefficients: Tensor | None


@dataclass(frozen=True)
class Kept:
    """What guidance was about when so many tokens were known: z without the prompt less z with it, (B, n, D)."""

    difference: Tensor  # of the positions that were masked then
    known: int


class Sampler:
    """The rounds of one batch. The head's noise is drawn inside kernels, or comes from memory.

    On a CPU it is made for all steps in one pass, which is faster there; recorded noise is in memory anyway.
    """

    def __init__(
        self,
        model: nn.Module,
        rows: Sequence[tuple[KVCache, int]],
        edited: Tensor | None,
        task: Task,
        noises: Sequence[Noise],
    ) -> None:
        """`model`: a UniPic; `rows`: the prompts' caches in row order;
        `edited`: MAR features (1, buffer + n, D) of an edit's source.
        """
        self.model, self.task, self.noises = model, task, noises
        self.tables: dict[int | None, Table] = {}
        self.kept: Kept | None = None
        self.keys: Tensor | None = None  # (B, 2) int64 of the images' seeds, where kernels draw the noise
        like = model.head.input_proj.weight
        if launches(like) and all(noise.key for noise in noises):
            self.keys = torch.tensor([noise.key for noise in noises], device=like.device)
            self.final = model.graphs.hold("final layer", (), model.head.final.folded())
        self.base = model.mar_decoder.base(edited)
        self.prompts = Prompts.of(rows)
        fixed = (
            model.mar_encoder.positions(task.rows, task.columns),
            self.base,
            *model.mar_decoder.positions(task.rows, task.columns),
            *self.prompts.tensors,
        )
        self.shape = (task.rows, task.columns, len(noises), *(x.shape for x in fixed[1:]))
        self.fixed = model.graphs.hold("batch", self.shape, fixed, at_sight=False) if model.llm.attend.ours else fixed

    def reveal(self, tokens: Tensor, plan: Round) -> Tensor:
        """tokens (B, n, 16) with one more round's tokens filled in."""
        z = self.understand(tokens, plan)
        sampled = self.denoise(z, plan).to(tokens.dtype)
        return tokens.scatter(1, plan.predicted[..., None].expand_as(sampled), sampled)

    def understand(self, tokens: Tensor, plan: Round) -> Tensor:
        """Conditions z (R, N, D) of the tokens to predict: without guidance, of the conditional rows alone."""
        guided, growth = self.guided(plan), self.task.cfg_cache
        if not guided or growth == 1.0:
            return self.conditions(tokens, plan, plan.predicted, guided)
        known = plan.visible.shape[1]
        if self.kept is not None and known < growth * self.kept.known:
            z = self.conditions(tokens, plan, plan.predicted, guided=False)
            return torch.cat([z, z + select_tokens(self.kept.difference, plan.predicted)])
        masked = plan.masked
        z = self.conditions(tokens, plan, masked, guided=True)
        index = masked.repeat(2, 1)[..., None].expand_as(z)
        z = z.new_zeros(len(z), plan.source.shape[1], z.shape[2]).scatter(1, index, z)  # (2B, n, D)
        self.kept = Kept(z[len(tokens) :] - z[: len(tokens)], known)
        return select_tokens(z, plan.predicted)

    def conditions(self, tokens: Tensor, plan: Round, of: Tensor, guided: bool) -> Tensor:
        """Of masked positions `of` (B, N), in both guidance halves or in the conditional one."""
        fixed, prompts = self.fixed, self.prompts
        if not guided:
            prompts = prompts.first(len(tokens))
            fixed = (*fixed[:-2], fixed[-2][: len(tokens)], fixed[-1])
        given = (tokens, plan.visible, of, plan.source, *fixed)
        if not (self.model.llm.attend.ours and launches(tokens)):  # else lengths are taken from the host, or waited for
            return self.model.understand(*given[:-4], prompts)
        key = (*self.shape, guided, plan.visible.shape[1], of.shape[1])
        return self.model.graphs.run("round", key, self.model.understand_tensors, given)

    def guided(self, plan: Round) -> bool:
        """Whether guidance is on in a round."""
        return self.task.guidance != 1.0 and begins_within(self.task.cfg_interval, plan.index, plan.of)

    def table(self, plan: Round) -> "Table":
        """Of the head's steps in a round; made when it is first asked for, which waits for the device."""
        steps = self.task.head_steps and annealed_steps(*self.task.head_steps, plan.index, plan.of)
        if steps not in self.tables:
            self.tables[steps] = self._table(steps)
        return self.tables[steps]

    def _table(self, steps: int | None) -> "Table":
        """None is the model's own number, over all its timesteps."""
        model, head = self.model, self.model.config.head
        respacing = head.train_steps, steps or head.steps, head.max_beta, None if steps is None else LATEST
        made = ode_table(*respacing, ODE_ORDERS[self.task.solver]) if self.ode else ddpm_table(*respacing)
        embedded = model.head.embed_steps(made)
        coefficients = None
        if self.keys is not None:
            coefficients = step_table(made, self.task.guidance, self.task.temperature).to(self.keys.device)
        return Table(made, embedded, coefficients)

    def denoise(self, z: Tensor, plan: Round) -> Tensor:
        """Latents (B, N, 16) float32 of the predicted tokens, from conditions z (R, N, D)."""
        guidance = guidance_at(self.task.cfg_schedule, self.task.guidance, plan.left)
        how = self.recorded if self.keys is None else self.drawn
        return how(z.flatten(0, 1), plan, guidance).view(*plan.predicted.shape, -1)

    @property
    def ode(self) -> bool:
        """Whether the head's steps draw no noise."""
        return self.task.solver in ODE_ORDERS

    def begun(self, start: Tensor) -> Tensor:
        """From the start noise (N, 16): without noise of steps, it is what the temperature scales."""
        return start * self.task.temperature if self.ode and self.task.temperature != 1.0 else start

    def recorded(self, z: Tensor, plan: Round, guidance: float) -> Tensor:
        """With all noise in memory beforehand; z (R N, D), returns (B N, 16)."""
        channels, table = self.model.config.head.channels, self.table(plan)
        steps = len(table.steps)
        pairs = list(zip(self.noises, plan.predicted, strict=True))
        start = self.begun(torch.cat([noise.head_start(plan.index, at, channels) for noise, at in pairs]))
        noise = None
        if not self.ode:
            noise = torch.cat([noise.head_steps(plan.index, at, channels, steps) for noise, at in pairs], dim=1)
        return self.model.head.sample(z, start, noise, table.steps, table.embedded, guidance, self.task.temperature)

    def drawn(self, z: Tensor, plan: Round, guidance: float) -> Tensor:
        """The same with noise that kernels draw where they use it."""
        key, position = self.keys.repeat_interleave(plan.predicted.shape[1], dim=0), plan.predicted.flatten()
        start = self.begun(token_noise(key, position, Stream.HEAD_START, 1, self.model.config.head.channels)[0])
        table = self.table(plan)
        table.coefficients[:, GUIDANCE].fill_(guidance)
        drawn = None if self.ode else Drawn(key, position, Stream.HEAD_STEP)
        once = table.coefficients, table.embedded, self.final
        return self.model.head.sample_drawn(z, start, drawn, *once, self.model.graphs)
