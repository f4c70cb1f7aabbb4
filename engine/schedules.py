"""Schedules as pure functions: what is revealed when (`Rounds`), the diffusion head's respaced noise table, and the
noise levels of a flow-matching model with its step from one to the next.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

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
    left: float  # share of the tokens to sample still masked after it, never less than one token's, also in the last
    of: int  # rounds in all

    @property
    def masked(self) -> Tensor:
        """(B, n - V) not known when the round starts, ascending; no host synchronisation."""
        return self.source.argsort(dim=1, stable=True)[:, : self.source.shape[1] - self.visible.shape[1]]


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

        moved = (
            replace(r, visible=move(r.visible), predicted=move(r.predicted), source=move(r.source)) for r in self.rounds
        )
        return Rounds(self.rows, self.columns, tuple(moved))


# Generation then reconstruction (GtR, arXiv 2510.17171): to which set of tokens (row + column) mod 4 belongs, the sets
# in the order of their reveal, and the share of the rounds of each. The paper's, for 32 rounds of 256 tokens: 64 tokens
# in 24, 64 in 6, and the other colour of the checkerboard in 2.
GTR_SETS = (0, 2, 1, 2)
GTR_ROUNDS = (24 / 32, 6 / 32, 2 / 32)


def gtr_sets(places: Tensor, columns: int) -> Tensor:
    """The set of each raster position."""
    return torch.tensor(GTR_SETS)[(places // columns + places % columns) % len(GTR_SETS)]


def gtr_orders(orders: Tensor, columns: int) -> Tensor:
    """Random reveal orders (B, M) with the sets one after the other; the first revealed stand last, as ever."""
    return orders.gather(1, gtr_sets(orders, columns).argsort(dim=1, descending=True, stable=True))


def gtr_counts(order: Tensor, columns: int, steps: int) -> list[tuple[int, int]]:
    """As `reveal_counts` of an order (M) of `gtr_orders`: an even pace within a set, rounds by GTR_ROUNDS.

    A set has no more rounds than tokens, and at least one if it has any. With fewer rounds than sets, the first sets
    are one.
    """
    sizes = gtr_sets(order, columns).bincount(minlength=len(GTR_ROUNDS)).tolist()
    merged = max(1, len(sizes) - steps + 1)
    sizes = [sum(sizes[:merged]), *sizes[merged:]]
    counts, now = [], len(order)
    for size, rounds in zip(sizes, _shared_out(sizes, steps), strict=True):
        for step in range(rounds):
            after = now - (size * (step + 1) // rounds - size * step // rounds)
            counts.append((now, after))
            now = after
    return counts


def _shared_out(sizes: Sequence[int], steps: int) -> list[int]:
    """Rounds of each set of so many tokens, `steps` in all, at least one each; the first takes the rest."""
    shares = GTR_ROUNDS[len(GTR_ROUNDS) - len(sizes) + 1 :]
    later = [min(size, max(1, round(share * steps))) for size, share in zip(sizes[1:], shares, strict=True)]
    return [min(sizes[0], max(1, steps - sum(later))), *later]


def reveal_rounds(
    orders: Tensor, rows: int, columns: int, steps: int, counts: Sequence[tuple[int, int]] | None = None
) -> Rounds:
    """Rounds from reveal orders (B, M): tokens are revealed from the end of the order, by default in cosine `counts`.

    M = rows * columns samples the whole grid; with M smaller, positions outside the order are known from the start.
    """
    batch, masked = orders.shape
    known = torch.ones(batch, rows * columns, dtype=torch.bool).scatter(1, orders, False)
    start = known.nonzero()[:, 1].view(batch, -1)  # (B, n - M), ascending
    plan = []
    counts = reveal_counts(masked, steps) if counts is None else counts
    for index, (before, after) in enumerate(counts):
        visible = torch.cat([start, orders[:, before:]], dim=1).sort(dim=1).values
        predicted = orders[:, after:before].sort(dim=1).values
        source = inverse_index(visible, rows * columns)
        plan.append(Round(index, visible, predicted, source, max(after, 1) / masked, len(counts)))
    return Rounds(rows, columns, tuple(plan))


def guidance_at(schedule: str, guidance: float, left: float) -> float:
    """Guidance scale of a round after which the share `left` of the tokens stays masked."""
    return guidance if schedule == "constant" else 1.0 + (guidance - 1.0) * (1.0 - left)


def begins_within(interval: tuple[float, float], index: int, of: int) -> bool:
    """Whether round `index` of so many begins between these shares of the run."""
    first, end = interval
    return first <= index / of < end


def annealed_steps(first: int, last: int, index: int, of: int) -> int:
    """The head's steps in a round: linear from the first round's to the last's (DiSA, arXiv 2505.20297)."""
    return last + int((of - 1 - index) / max(of - 1, 1) * (first - last))


def cosine_betas(train_steps: int, max_beta: float) -> Tensor:
    """Betas of the squared-cosine schedule (Nichol & Dhariwal 2021), clipped at `max_beta`; (train_steps) float64."""

    def alpha_bar(u: float) -> float:
        return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2

    pairs = ((i / train_steps, (i + 1) / train_steps) for i in range(train_steps))
    return torch.tensor([min(1 - alpha_bar(b) / alpha_bar(a), max_beta) for a, b in pairs], dtype=torch.float64)


def _respaced(train_steps: int, steps: int, max_beta: float, latest: int | None) -> list[tuple[int, float]]:
    """(timestep, cumulative alpha) of evenly spaced steps, both ends among them; as `ddpm_table` has `latest`."""
    alphas_bar = torch.cumprod(1 - cosine_betas(train_steps, max_beta), dim=0).tolist()
    kept = [round(i * (train_steps - 1) / max(steps - 1, 1)) for i in range(steps)]
    if latest is not None:
        kept = list(dict.fromkeys(min(timestep, latest) for timestep in kept))
    return [(timestep, alphas_bar[timestep]) for timestep in kept]


def ddpm_table(train_steps: int, steps: int, max_beta: float, latest: int | None = None) -> list[DDPMStep]:
    """Ancestral sampling coefficients respaced to `steps`, index 0 the last step taken; float64 throughout.

    No step is later than the timestep `latest`; those that would be are taken together, as that one.
    """
    levels = _respaced(train_steps, steps, max_beta, latest)
    table = []
    for i, (timestep, a) in enumerate(levels):
        a_prev = levels[i - 1][1] if i else 1.0
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
    if len(table) > 1:  # the first entry has no variance of its own and takes the second's
        table[0] = table[0]._replace(log_beta_tilde=table[1].log_beta_tilde)
    return table


def ode_table(
    train_steps: int, steps: int, max_beta: float, latest: int | None = None, order: int = 1
) -> list[DDPMStep]:
    """As `ddpm_table`, of a solver of the ODE: DDIM without noise, or with order 2 DPM-Solver++(2M) on x0.

    With s = sqrt(a), n = sqrt(1 - a), L = log(s / n) and those of the next level marked by ', a step is exact where x0
    stays as it is, x' = (n' / n) x + (s' - s n' / n) x0. The second order has x0 go on from the one of the step before,
    x0 + (L' - L) / (L - L_before) / 2 (x0 - x0_before). L grows so much in the two last steps, to timestep 0 and to no
    noise at all, that they are of first order: going on would be worse than not.
    """
    levels, table = _respaced(train_steps, steps, max_beta, latest), []
    for i, (timestep, a) in enumerate(levels):
        a_next, ahead = (levels[i - 1][1] if i else 1.0), 0.0
        signal, noise = math.sqrt(a), math.sqrt(1 - a)
        kept = math.sqrt(1 - a_next) / noise
        if order == 2 and 1 < i < len(levels) - 1:
            here = _log_snr(a)
            ahead = (_log_snr(a_next) - here) / (here - _log_snr(levels[i + 1][1])) / 2
        taken = math.sqrt(a_next) - signal * kept
        table.append(
            DDPMStep(
                sqrt_recip=1 / signal,
                sqrt_recip_m1=noise / signal,
                c1=taken * (1 + ahead),
                c2=kept,
                log_beta=-math.inf,
                log_beta_tilde=-math.inf,
                timestep=timestep,
                c3=-taken * ahead,
            )
        )
    return table


def _log_snr(a: float) -> float:
    """Half of the log of the signal-to-noise ratio at a cumulative alpha."""
    return math.log(a / (1 - a)) / 2


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
