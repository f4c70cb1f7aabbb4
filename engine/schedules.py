"""Schedules as pure functions: what is revealed when (`Rounds`), the diffusion head's respaced noise table, and the
noise levels of a flow-matching model with its step from one to the next.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels.ddpm_step import DDPMStep
from ..kernels.mar_tokens import inverse_index

FLOW_STEPS = 1000  # a flow-matching model was trained on that many noise levels, and sees t = 1000 sigma


def reveal_counts(masked: int, steps: int) -> list[tuple[int, int]]:
    """(tokens still masked before, after) for each round of the cosine schedule (MaskGIT, arXiv 2202.04200).

    Every round reveals at least one token while more than one is left; rounds with nothing to reveal (more steps
    than tokens) are left out, and the last one reveals the rest.
    """
    counts, now = [], masked
    for step in range(steps):
        after = 0
        if step < steps - 1:
            after = math.floor(masked * math.cos(math.pi / 2 * (step + 1) / steps))
            after = max(1, min(now - 1, after))
        if after < now:
            counts.append((now, after))
        now = after
    return counts


@dataclass(frozen=True)
class Round:
    """One reveal step of B images. Index tensors are int64 raster positions, ascending in every row."""

    index: int
    visible: Tensor  # (B, V) already known when the round starts
    predicted: Tensor  # (B, N) revealed by it
    source: Tensor  # (B, n) where in `visible` each position stands, -1 where it does not
    left: float  # share of the tokens to sample that the schedule leaves masked; at least one, also in the last round


@dataclass(frozen=True)
class Rounds:
    """The whole reveal plan, every token set and count known before the loop."""

    rows: int
    columns: int
    rounds: tuple[Round, ...]

    def __len__(self) -> int:
        return len(self.rounds)

    @property
    def tokens(self) -> int:
        return self.rows * self.columns

    def to(self, device: torch.device) -> "Rounds":
        def move(x: Tensor) -> Tensor:
            return x.to(device, non_blocking=True)

        moved = (Round(r.index, move(r.visible), move(r.predicted), move(r.source), r.left) for r in self.rounds)
        return Rounds(self.rows, self.columns, tuple(moved))


def reveal_rounds(orders: Tensor, rows: int, columns: int, steps: int) -> Rounds:
    """Rounds from reveal orders (B, M): tokens are revealed from the end of the order.

    M = rows * columns samples the whole grid; with M smaller, positions outside the order are known from the start.
    """
    batch, masked = orders.shape
    known = torch.ones(batch, rows * columns, dtype=torch.bool).scatter(1, orders, False)
    start = known.nonzero()[:, 1].view(batch, -1)  # (B, n - M), ascending
    plan = []
    for index, (before, after) in enumerate(reveal_counts(masked, steps)):
        visible = torch.cat([start, orders[:, before:]], dim=1).sort(dim=1).values
        predicted = orders[:, after:before].sort(dim=1).values
        source = inverse_index(visible, rows * columns)
        plan.append(Round(index, visible, predicted, source, max(after, 1) / masked))
    return Rounds(rows, columns, tuple(plan))


def guidance_at(schedule: str, guidance: float, left: float) -> float:
    """Guidance scale of a round after which the share `left` of the tokens stays masked."""
    return guidance if schedule == "constant" else 1.0 + (guidance - 1.0) * (1.0 - left)


def cosine_betas(train_steps: int, max_beta: float) -> Tensor:
    """Betas of the squared-cosine schedule (Nichol & Dhariwal 2021), clipped at `max_beta`; (train_steps) float64."""

    def alpha_bar(u: float) -> float:
        return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2

    pairs = ((i / train_steps, (i + 1) / train_steps) for i in range(train_steps))
    return torch.tensor([min(1 - alpha_bar(b) / alpha_bar(a), max_beta) for a, b in pairs], dtype=torch.float64)


def ddpm_table(train_steps: int, steps: int, max_beta: float) -> list[DDPMStep]:
    """Ancestral sampling coefficients respaced to `steps`, index 0 the last step taken; float64 throughout."""
    alphas_bar = torch.cumprod(1 - cosine_betas(train_steps, max_beta), dim=0)
    kept = [round(i * (train_steps - 1) / max(steps - 1, 1)) for i in range(steps)]
    table = []
    for i, timestep in enumerate(kept):
        a = alphas_bar[timestep].item()
        a_prev = alphas_bar[kept[i - 1]].item() if i else 1.0
        beta = 1 - a / a_prev
        variance = beta * (1 - a_prev) / (1 - a)
        table.append(
            DDPMStep(
                sqrt_recip=math.sqrt(1 / a),
                sqrt_recip_m1=math.sqrt(1 / a - 1),
                c1=beta * math.sqrt(a_prev) / (1 - a),
                c2=(1 - a_prev) * math.sqrt(1 - beta) / (1 - a),
                log_beta=math.log(beta),
                log_beta_tilde=math.log(variance) if i else -math.inf,
                timestep=timestep,
            )
        )
    if steps > 1:  # the first entry has no variance of its own and takes the second's
        table[0] = table[0]._replace(log_beta_tilde=table[1].log_beta_tilde)
    return table


def flow_match_sigmas(steps: int, shift: float) -> Tensor:
    """Noise levels (steps + 1) float32 from 1 to 0 (rectified flow, arXiv 2403.03206).

    Levels evenly spaced between 1 and the lowest one of training, which is shifted, are shifted again; 0 comes last.
    """

    def shifted(sigma: Tensor | float) -> Tensor | float:
        return shift * sigma / (1 + (shift - 1) * sigma)

    even = torch.linspace(1, shifted(1 / FLOW_STEPS), steps, dtype=torch.float64)
    return torch.cat([shifted(even), even.new_zeros(1)]).float()


def euler_step(x: Tensor, velocity: Tensor, step: Tensor | float) -> Tensor:
    """x + step * velocity, computed in float32 and rounded to x's dtype; step = next sigma - sigma."""
    return (x.float() + step * velocity.float()).to(x.dtype)
