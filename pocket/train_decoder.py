"""The decoder phases: the decoder again, on tokens that the model drew.

Part of a painted picture's tokens are drawn anew by the model in view of the others, which tell it where everything
stands; the decoder learns to make the painted picture of them. So it sees the errors that the diffusion head makes,
specks and traces beside an object most of all, and leaves them out. Encoder and latents stay as they are.
"""

import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

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
from .samples import Sample
from .sitting import Losses, Plan, Run, generator, sit, write_state
from .train_vae import OBJECT_WEIGHT, Autoencoder, painted, to_input

ROUNDS = 4
STEPS = 20  # of the head: fewer than a request takes, as many pictures are to be drawn
SHARES = (0.25, 0.85)  # of the tokens drawn anew
AT_ONCE = 32


@torch.inference_mode()
def redrawn(
    model: UniPic, tokens: Tokens, samples: Sequence[Sample], latents: Tensor, rng: Generator, noise: torch.Generator
) -> Tensor:
    """The latents (B, n, 16) with a share of each picture's tokens drawn by the model, as a request would; on the CPU.

    Prompts and the share come from `rng`; order and noise are the CPU's, so that they are the same on every device.
    """
    share, device = rng.uniform(*SHARES), next(model.parameters()).device
    rows, n, channels = latents.shape
    texts = [turn("generate", phrase(s.spec, rng)) for s in samples] + [unconditional_turn("generate", None)] * rows
    words = words_of(tokens, texts)
    words = Words(words.ids.to(device), words.lengths.to(device), words.answers)
    order, masked = torch.rand(rows, n, generator=noise).argsort(dim=1).to(device), round(share * n)
    x = latents.to(device)
    for begin, end in pairwise(masked * i // ROUNDS for i in range(ROUNDS + 1)):
        visible = torch.cat([order[:, :begin], order[:, masked:]], dim=1).sort(dim=1).values
        predicted = order[:, begin:end].sort(dim=1).values
        z, _ = conditions(model, tokens, words, None, *(torch.cat([t, t]) for t in (x, visible, predicted)))
        new = _denoised(model, z.flatten(0, 1), noise)
        x = x.scatter(1, predicted[..., None].expand(-1, -1, channels), new.view(rows, -1, channels))
    return x.cpu()


def _denoised(model: UniPic, z: Tensor, noise: torch.Generator) -> Tensor:
    """Tokens (N, 16) of conditions z (2N, D), in STEPS steps with the model's own guidance."""
    head, config = model.head, model.config.head
    table = ddpm_table(config.train_steps, STEPS, config.max_beta)
    start, drawn = (
        torch.randn(*shape, len(z) // 2, config.channels, generator=noise).to(z.device) for shape in ((), (STEPS,))
    )
    return head.sample(z, start, drawn, table, head.embed_steps(table), model.config.guidance, temperature=1.0)


class Drawn:
    """A shard's scenes with their latents, true and redrawn, (S, n, 16) float32; kept in a file once drawn."""

    def __init__(
        self, model: UniPic, vae: Autoencoder, tokens: Tokens, plan: DecoderPlan, number: int, kept: Path | None
    ) -> None:
        self.shard = Shard(plan.seed, number, plan.shard)
        file = kept and kept / f"drawn-{number:05}.safetensors"
        if file is None or not file.exists():
            made = self._make(model, vae, tokens, plan.seed, number)
            if file is None:
                self.true, self.redrawn = made
                return
            write_state(file, dict(zip(("true", "redrawn"), made, strict=True)), {})
        found = load_file(file)
        self.true, self.redrawn = found["true"], found["redrawn"]

    def _make(self, model: UniPic, vae: Autoencoder, tokens: Tokens, seed: int, number: int) -> tuple[Tensor, Tensor]:
        rng, noise, samples = np.random.default_rng((seed, 3, number)), generator(seed, number), self.shard.samples
        true = self.shard.encode(vae, model.config.vae_scale, None).latents
        parts = [slice(at, at + AT_ONCE) for at in range(0, len(samples), AT_ONCE)]
        again = [redrawn(model, tokens, samples[part], true[part], rng, noise) for part in parts]
        return true, torch.cat(again)


def decoder_losses(model: UniPic, plan: DecoderPlan, drawn: Sequence[Drawn], step: int) -> Losses:
    """Squared error of whole pictures, weighted as in phase 1; most are of redrawn latents, the others of true ones."""
    rng = step_rng(plan.seed, step)
    source = drawn[int(rng.integers(len(drawn)))]
    chosen = rng.choice(len(source.true), plan.batch, replace=False)
    again = torch.from_numpy(rng.random(plan.batch) < plan.redrawn)[:, None, None]
    latents = torch.where(again, source.redrawn[chosen], source.true[chosen]) / model.config.vae_scale
    levels, objects = zip(*(painted(source.shard.samples[i].scene) for i in chosen), strict=True)
    weights = torch.where(torch.from_numpy(np.stack(objects)), OBJECT_WEIGHT, 1.0)[:, None]
    device = next(model.parameters()).device
    maps = latents.transpose(1, 2).unflatten(2, (GRID, GRID)).to(device, memory_format=torch.channels_last)
    error = (model.vae_decoder(maps) - to_input(np.stack(levels)).to(device)).square() * weights.to(device)
    return {"loss": error.mean()}


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
