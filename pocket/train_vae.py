"""Phase 1: the autoencoder, on crops around objects.

Squared error, weighted on objects and their edges: most of a picture is plain background, and an even loss leaves small
objects out. Latents are sampled from the posterior under a light KL term, so that the decoder bears the small errors
of the diffusion head.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.random import Generator
from torch import Tensor, nn

from ..engine.layers.vae import VAEConfig, VAEDecoder, VAEEncoder
from .detector import detect
from .painter import paint
from .plans import VAEPlan
from .samples import CATEGORIES, Split, any_scene, sample
from .scenes import SIDE, Scene
from .sitting import Losses, Plan, Run, generator, sit
from .split import held_out

OBJECT_WEIGHT = 7.0  # of a pixel that an object covers or borders; the background has 1
OBJECT_DIFFERS = 12  # levels from the bare background
KL_WEIGHT = 1e-3
START_LOG_VARIANCE = -6.0
CROP = 64
WHOLE_FROM = 0.85  # share of the steps after which whole pictures are used, with their own borders


class Autoencoder(nn.Module):
    """The two halves under their names in the model."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.vae_encoder, self.vae_decoder = VAEEncoder(config), VAEDecoder(config)


def initialise(vae: Autoencoder) -> None:
    """torch's own values, and a narrow posterior: in a wide one the decoder first learns to ignore the latents."""
    with torch.no_grad():
        vae.vae_encoder.quant_conv.bias[vae.vae_decoder.conv_in.in_channels :] = START_LOG_VARIANCE


def device_of(module: nn.Module) -> torch.device:
    return next(module.parameters()).device


def to_input(pictures: np.ndarray) -> Tensor:
    """uint8 (B, h, w, 3) to (B, 3, h, w) in [-1, 1]."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1


def to_output(pixels: Tensor) -> np.ndarray:
    return (127.5 * pixels + 128).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu().numpy()


def training_scene(rng: Generator) -> Scene:
    while held_out(scene := any_scene(rng)):
        pass
    return scene


def painted(scene: Scene) -> tuple[np.ndarray, np.ndarray]:
    """Levels (h, w, 3) uint8 and where an object is (h, w) bool."""
    levels = np.asarray(paint(scene))
    bare = np.asarray(paint(Scene((), scene.background, scene.shade)), np.int16)
    return levels, np.abs(levels - bare).max(-1) > OBJECT_DIFFERS


def crop_at(rng: Generator, scene: Scene, side: int) -> tuple[int, int]:
    """A corner of a crop that has an object in or near it, as most of the picture has nothing to learn from."""
    figure = scene.figures[int(rng.integers(len(scene.figures)))]
    place = np.array([figure.y, figure.x]) - rng.uniform(0, side, 2)
    row, column = np.clip(place.round().astype(int), 0, SIDE - side)
    return int(row), int(column)


def crops(rng: Generator, count: int, side: int) -> tuple[Tensor, Tensor]:
    """Pixels (B, 3, side, side) and their weights (B, 1, side, side)."""
    pictures, weights = [], []
    for _ in range(count):
        scene = training_scene(rng)
        levels, on_object = painted(scene)
        row, column = crop_at(rng, scene, side)
        here = slice(row, row + side), slice(column, column + side)
        pictures.append(levels[here])
        weights.append(np.where(on_object[here], OBJECT_WEIGHT, 1.0).astype(np.float32))
    return to_input(np.stack(pictures)), torch.from_numpy(np.stack(weights))[:, None]


def vae_losses(vae: Autoencoder, pixels: Tensor, weights: Tensor, noise: torch.Generator) -> Losses:
    mean, log_variance = vae.vae_encoder(pixels).chunk(2, dim=1)
    log_variance = log_variance.clamp(-12.0, 4.0)
    latents = mean + (log_variance / 2).exp() * torch.randn(mean.shape, generator=noise).to(mean.device)
    error = ((vae.vae_decoder(latents) - pixels).square() * weights).mean()
    kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
    return {"loss": error + KL_WEIGHT * kl, "error": error.detach(), "kl": kl.detach()}


def train_vae(
    config: VAEConfig, plan: VAEPlan, state: Path | None, minutes: float, device: str = "cpu"
) -> tuple[Autoencoder, bool]:
    """The autoencoder with averaged weights, and whether its training is complete."""
    torch.manual_seed(plan.seed)
    vae = Autoencoder(config)
    initialise(vae)
    vae.to(device, memory_format=torch.channels_last)
    schedule = Plan(plan.steps, plan.rate, plan.matrix_rate, warmup=100, decay=0.35, average=0.998, weight_decay=0.0)
    run = Run(dict(vae.named_parameters()), schedule, state)

    def losses_of(step: int) -> Losses:
        rng = np.random.default_rng((plan.seed, step))
        whole = step >= WHOLE_FROM * plan.steps
        side, count = (SIDE, max(plan.batch // 4, 1)) if whole else (CROP, plan.batch)
        pixels, weights = crops(rng, count, side)
        pixels = pixels.to(device).contiguous(memory_format=torch.channels_last)
        return vae_losses(vae, pixels, weights.to(device), generator(plan.seed, step))

    done = sit(run, losses_of, minutes)
    vae.load_state_dict(run.average)
    return vae.requires_grad_(False).eval(), done


@dataclass(frozen=True)
class Judged:
    """How well held-out pictures survive the autoencoder."""

    psnr: float  # dB, over all pixels
    read: float  # share whose whole scene the detector reads right afterwards
    std: float  # of the latents


@torch.inference_mode()
def judge_vae(vae: Autoencoder, pictures: int = 280, seed: int = 10, split: Split = "test") -> Judged:
    rng = np.random.default_rng(seed)
    scenes = [sample(rng, CATEGORIES[i % len(CATEGORIES)], split).scene for i in range(pictures)]
    errors, read, latents = [], 0, []
    for at in range(0, pictures, 8):
        some = scenes[at : at + 8]
        pixels = to_input(np.stack([np.asarray(paint(scene)) for scene in some])).to(device_of(vae))
        mean = vae.vae_encoder(pixels).chunk(2, dim=1)[0]
        out = vae.vae_decoder(mean)
        latents.append(mean.flatten())
        errors.append(((out.clamp(-1, 1) - pixels) / 2).square().mean())
        for scene, image in zip(some, to_output(out), strict=True):
            seen = detect(image)
            read += not seen.faults and seen.scene.look == scene.look
    return Judged(float(-10 * torch.stack(errors).mean().log10()), read / pictures, float(torch.cat(latents).std()))
