"""The decoder phases: the decoder again, on tokens that the model drew.

Part of a painted picture's tokens are drawn anew by the model in view of the others, which tell it where everything
stands; the decoder learns to make the painted picture of them. So it sees the errors that the diffusion head makes,
specks and traces beside an object most of all, and leaves them out. Encoder and latents stay as they are.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.random import Generator
from safetensors.torch import load_file
from torch import Tensor

from ..engine.models.unipic.model import UniPic
from ..engine.models.unipic.prompts import turn, unconditional_turn
from ..engine.schedules import ddpm_table
from ..engine.tokens import Tokens
from .batches import Words, step_rng, words_of
from .config import GRID
from .data import Shard
from .losses import conditions
from .phrases import phrase
from .plans import DecoderPlan
from .scenes import Scene
from .sitting import Losses, Plan, Run, generator, sit, write_state
from .train_vae import OBJECT_WEIGHT, Autoencoder, painted, to_input

ROUNDS = 4
STEPS = 20  # of the head: fewer than a request takes, as many pictures are to be drawn
SHARES = (0.25, 0.85)  # of the tokens drawn anew
AT_ONCE = 32
SMALL_WEIGHT = 3 * OBJECT_WEIGHT  # a small object has a third of the pixels of a large one


@dataclass(frozen=True)
class Wanted:
    """Pictures and the words that ask for them; latents (B, n, 16) of them and, for edits, of what these begin with."""

    kind: Literal["generate", "edit"]
    words: Sequence[str]
    latents: Tensor
    sources: Tensor | None = None

    def parts(self) -> Iterator["Wanted"]:
        """As many at once as memory is meant to hold."""
        for at in range(0, len(self.words), AT_ONCE):
            of = slice(at, at + AT_ONCE)
            sources = None if self.sources is None else self.sources[of]
            yield Wanted(self.kind, self.words[of], self.latents[of], sources)


@torch.inference_mode()
def redrawn(model: UniPic, tokens: Tokens, wanted: Wanted, rng: Generator, noise: torch.Generator) -> Tensor:
    """The latents (B, n, 16) with a share of each picture's tokens drawn by the model, as a request would; on the CPU.

    The share comes from `rng`; order and noise are the CPU's, so that they are the same on every device.
    """
    share, device = rng.uniform(*SHARES), next(model.parameters()).device
    rows, n, channels = wanted.latents.shape
    texts = [turn(wanted.kind, words) for words in wanted.words] + [unconditional_turn(wanted.kind, None)] * rows
    words = words_of(tokens, texts)
    words = Words(words.ids.to(device), words.lengths.to(device), words.answers)
    order, masked = torch.rand(rows, n, generator=noise).argsort(dim=1).to(device), round(share * n)
    x, sources = wanted.latents.to(device), None if wanted.sources is None else twice(wanted.sources.to(device))
    for begin, end in pairwise(masked * i // ROUNDS for i in range(ROUNDS + 1)):
        visible = torch.cat([order[:, :begin], order[:, masked:]], dim=1).sort(dim=1).values
        predicted = order[:, begin:end].sort(dim=1).values
        z, _ = conditions(model, tokens, words, sources, *map(twice, (x, visible, predicted)))
        new = _denoised(model, z.flatten(0, 1), noise)
        x = x.scatter(1, predicted[..., None].expand(-1, -1, channels), new.view(rows, -1, channels))
    return x.cpu()


def twice(x: Tensor) -> Tensor:
    """For the rows with a prompt and for those without."""
    return torch.cat([x, x])


def _denoised(model: UniPic, z: Tensor, noise: torch.Generator) -> Tensor:
    """Tokens (N, 16) of conditions z (2N, D), in STEPS steps with the model's own guidance."""
    head, config = model.head, model.config.head
    table = ddpm_table(config.train_steps, STEPS, config.max_beta)
    start, drawn = (
        torch.randn(*shape, len(z) // 2, config.channels, generator=noise).to(z.device) for shape in ((), (STEPS,))
    )
    return head.sample(z, start, drawn, table, head.embed_steps(table), model.config.guidance, temperature=1.0)


class Drawn:
    """A shard's pictures with their latents, true and redrawn, (S + E, n, 16) float32; kept in a file once drawn."""

    def __init__(
        self, model: UniPic, vae: Autoencoder, tokens: Tokens, plan: DecoderPlan, number: int, kept: Path | None
    ) -> None:
        shard = Shard(plan.seed, number, plan.shard)
        self.scenes = [*(sample.scene for sample in shard.samples), *(edit.target for edit in shard.edits)]
        file = kept and kept / f"drawn-{number:05}.safetensors"
        if file is None or not file.exists():
            rng, noise = np.random.default_rng((plan.seed, 3, number)), generator(plan.seed, number)
            made = _made(model, tokens, shard.encode(vae, model.config.vae_scale, None), rng, noise)
            if file is None:
                self.true, self.redrawn = made
                return
            write_state(file, dict(zip(("true", "redrawn"), made, strict=True)), {})
        found = load_file(file)
        self.true, self.redrawn = found["true"], found["redrawn"]


def _made(model: UniPic, tokens: Tokens, shard: Shard, rng: Generator, noise: torch.Generator) -> tuple[Tensor, Tensor]:
    generated = Wanted("generate", [phrase(sample.spec, rng, ordered=True) for sample in shard.samples], shard.latents)
    edited = Wanted("edit", [edit.instruction for edit in shard.edits], shard.targets, shard.sources)
    again = [redrawn(model, tokens, part, rng, noise) for wanted in (generated, edited) for part in wanted.parts()]
    return torch.cat([shard.latents, shard.targets]), torch.cat(again)


def weighed(scene: Scene) -> tuple[np.ndarray, np.ndarray]:
    """Levels (h, w, 3) uint8 and weights (h, w) float32: of objects as in phase 1, of small ones more."""
    levels, objects = painted(scene)
    small = painted(replace(scene, figures=tuple(figure for figure in scene.figures if figure.size == "small")))[1]
    return levels, np.select([small, objects], [SMALL_WEIGHT, OBJECT_WEIGHT], 1.0).astype(np.float32)


def decoder_losses(model: UniPic, plan: DecoderPlan, drawn: Sequence[Drawn], step: int) -> Losses:
    """Weighted squared error of whole pictures; most are of redrawn latents, the others of true ones."""
    rng = step_rng(plan.seed, step)
    source = drawn[int(rng.integers(len(drawn)))]
    chosen = rng.choice(len(source.true), plan.batch, replace=False)
    again = torch.from_numpy(rng.random(plan.batch) < plan.redrawn)[:, None, None]
    latents = torch.where(again, source.redrawn[chosen], source.true[chosen]) / model.config.vae_scale
    levels, weights = map(np.stack, zip(*(weighed(source.scenes[i]) for i in chosen), strict=True))
    device = next(model.parameters()).device
    maps = latents.transpose(1, 2).unflatten(2, (GRID, GRID)).to(device, memory_format=torch.channels_last)
    error = (model.vae_decoder(maps) - to_input(levels).to(device)).square()
    return {"loss": (error * torch.from_numpy(weights)[:, None].to(device)).mean()}


def train_decoder(
    model: UniPic,
    vae: Autoencoder,
    tokens: Tokens,
    plan: DecoderPlan,
    state: Path | None,
    kept: Path | None,
    minutes: float,
) -> tuple[dict[str, Tensor], Run, bool]:
    """The model's weights by name with the decoder's averaged ones, the run, and whether it is complete.

    `vae` encodes; the decoder that is trained is the model's own.
    """
    until = time.monotonic() + 60 * minutes
    drawn = [Drawn(model, vae, tokens, plan, number, kept) for number in range(plan.shards)]
    decoder = model.vae_decoder.to(memory_format=torch.channels_last).requires_grad_()
    parameters = dict(decoder.named_parameters(prefix="vae_decoder"))
    schedule = Plan(plan.steps, plan.rate, plan.matrix_rate, warmup=50, decay=0.6, average=0.99, weight_decay=0.0)
    run = Run(parameters, schedule, state)
    done = sit(run, lambda step: decoder_losses(model, plan, drawn, step), (until - time.monotonic()) / 60)
    return {**model.state_dict(), **run.average}, run, done
