"""One sitting of a training run: learning rate, averaged weights, resumable state, progress lines, a time budget.

A run may take several sittings. Everything random in step s depends on (seed, s) alone and the state is written whole,
so a resumed run is the run that was never interrupted. States are safetensors files: nothing is unpickled.
"""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .muon import Optimiser

Losses = dict[str, Tensor]  # by name; "loss" is the one to go down
CLIP = 1.0  # norm of all gradients together
SHOW_EVERY = 20.0  # seconds between progress lines
SAVE_EVERY = 120.0


@dataclass(frozen=True)
class Plan:
    """How long, and how fast: a trapezoid, so that a run can go on at full rate until its last part."""

    steps: int
    rate: float  # AdamW's
    matrix_rate: float  # Muon's
    warmup: int  # steps
    decay: float  # share of the steps, at the end, over which the rate falls to zero
    average: float  # decay of the averaged weights, per step
    weight_decay: float

    def share_at(self, step: int) -> float:
        """Of the full rates."""
        rising = (step + 1) / self.warmup
        falling = (self.steps - step) / max(self.decay * self.steps, 1.0)
        return min(1.0, rising, falling)


def generator(seed: int, step: int) -> torch.Generator:
    """The random numbers of one step."""
    return torch.Generator().manual_seed((seed << 40) + step)


class Run:
    """The weights in training, their averages, and the optimiser; `parameters` by name."""

    def __init__(self, parameters: dict[str, nn.Parameter], plan: Plan, path: Path | None) -> None:
        self.parameters, self.plan, self.path, self.step = parameters, plan, path, 0
        self.average = {name: p.detach().clone() for name, p in parameters.items()}
        self.optimiser = Optimiser(parameters, plan.rate, plan.matrix_rate, plan.weight_decay)
        if path is not None and path.exists():
            self.load(path)

    @property
    def share(self) -> float:
        """Of the full rate, for the next step."""
        return self.plan.share_at(self.step)

    def advance(self, losses: Losses) -> None:
        """One optimiser step down the gradient of `losses["loss"]`."""
        self.optimiser.zero_grad()
        losses["loss"].backward()
        nn.utils.clip_grad_norm_(self.parameters.values(), CLIP)
        self.optimiser.step(self.share)
        self.step += 1
        keep = min(self.plan.average, (1 + self.step) / (10 + self.step))
        values = [p.detach() for p in self.parameters.values()]
        torch._foreach_lerp_(list(self.average.values()), values, 1 - keep)

    def save(self) -> None:
        """Write the whole state, or leave the former one."""
        if self.path is None:
            return
        tensors = dict(self.optimiser.tensors())
        for name, parameter in self.parameters.items():
            tensors[f"value/{name}"], tensors[f"average/{name}"] = parameter.detach(), self.average[name]
        write_state(self.path, tensors, {"step": str(self.step)})

    def load(self, path: Path) -> None:
        """Go on from a saved state."""
        with safe_open(path, framework="pt") as file:
            told, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        self.step = int(told["step"])
        for name, parameter in self.parameters.items():
            parameter.data.copy_(tensors[f"value/{name}"])
            self.average[name].copy_(tensors[f"average/{name}"])
        self.optimiser.load(tensors, self.step)


def write_state(path: Path, tensors: dict[str, Tensor], told: dict[str, str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial-{os.getpid()}")
    save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, partial, told)
    with partial.open("rb+") as file:
        os.fsync(file.fileno())
    partial.replace(path)


def sit(
    run: Run,
    losses_of: Callable[[int], Losses],
    minutes: float,
    look: Callable[[int], None] | None = None,
    look_every: int = 500,
) -> bool:
    """Train until the plan or the minutes are over, saving now and then; whether the plan is done."""
    start = shown = saved = time.monotonic()
    first, sums = run.step, {}
    while run.step < run.plan.steps and time.monotonic() - start < 60 * minutes:
        losses = losses_of(run.step)
        run.advance(losses)
        for name, value in losses.items():
            total, count = sums.get(name, (0.0, 0))
            sums[name] = total + float(value.detach()), count + 1
        now = time.monotonic()
        if now - shown > SHOW_EVERY or run.step == run.plan.steps:
            print(_line(run, sums, (now - start) / (run.step - first)), flush=True)
            shown, sums = now, {}
        if now - saved > SAVE_EVERY:
            run.save()
            saved = now
        if look is not None and run.step % look_every == 0:
            look(run.step)
    run.save()
    return run.step >= run.plan.steps


def _line(run: Run, sums: dict[str, tuple[float, int]], pace: float) -> str:
    means = "  ".join(f"{name} {total / count:.4f}" for name, (total, count) in sums.items())
    left = (run.plan.steps - run.step) * pace / 60
    return f"step {run.step}/{run.plan.steps}  {means}  rate x{run.share:.2f}  {pace:.2f} s/step  {left:.0f} min left"
