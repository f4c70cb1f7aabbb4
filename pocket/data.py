"""Training data as latents: scenes, edits and questions, painted and encoded a shard at a time.

A shard follows from (seed, its number) and the autoencoder; only its latents, which take time, are kept on disk. Words
are drawn anew whenever a scene is used.
"""

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from numpy.random import Generator
from safetensors.torch import load_file
from torch import Tensor

from . import questions
from .config import GRID, STRIDE
from .edits import KINDS, Edit, sample_edit
from .layout import pick
from .painter import paint, stencil
from .plans import Sizes
from .samples import CATEGORIES, Sample, sample
from .scenes import BACKGROUNDS, COLOURS, SHAPES, SIDE, SIZES, Figure, Scene
from .sitting import write_state
from .train_vae import Autoencoder, device_of, to_input

# What is hard comes more often.
TWO = ("two objects", "two objects", "binding", "binding")
DRAWN = (*CATEGORIES, *TWO, "single object", "small object", "small object", "counting", "position", "scene")
ASKED = (*questions.KINDS, "count", "where", "where", "yes or no", "yes or no")
EDITED = (*KINDS, "recolour", "add", "move", "move")
COVERS = 0.15  # share of a cell that an object must cover to be its label
ENCODED_AT_ONCE = 16


class Shard:
    """`scenes` samples and `edits` edits with their latents (., n, 16) float32, scaled to unit deviation."""

    def __init__(self, seed: int, number: int, sizes: Sizes) -> None:
        rng = np.random.default_rng((seed, 1, number))
        self.samples: list[Sample] = [sample(rng, pick(rng, DRAWN), "train") for _ in range(sizes.scenes)]
        self.edits: list[Edit] = [sample_edit(rng, pick(rng, EDITED), "train") for _ in range(sizes.edits)]
        self.latents = self.sources = self.targets = torch.empty(0)

    def encode(self, vae: Autoencoder, scale: float, kept: Path | None) -> "Shard":
        """Fill the latents, from the file `kept` where it exists."""
        if kept is not None and kept.exists():
            latents = load_file(kept)["latents"].float()
        else:
            latents = encode(vae, self.scenes(), scale)
            if kept is not None:
                write_state(kept, {"latents": latents.half()}, {})
            latents = latents.half().float()  # the same whether it was kept or not
        counts = [len(self.samples), len(self.edits), len(self.edits)]
        self.latents, self.sources, self.targets = latents.split(counts)
        return self

    def scenes(self) -> Iterator[Scene]:
        yield from (drawn.scene for drawn in self.samples)
        yield from (edit.source for edit in self.edits)
        yield from (edit.target for edit in self.edits)

    @cached_property
    def labels(self) -> Tensor:
        """int64 (S, n + 1): of each sample the object of every cell, then the background."""
        return torch.stack([label(drawn.scene) for drawn in self.samples])

    @cached_property
    def source_labels(self) -> Tensor:
        """The same of the edits' sources, (E, n + 1)."""
        return torch.stack([label(edit.source) for edit in self.edits])

    @cached_property
    def target_labels(self) -> Tensor:
        return torch.stack([label(edit.target) for edit in self.edits])


@torch.inference_mode()
def encode(vae: Autoencoder, scenes: Iterator[Scene], scale: float) -> Tensor:
    """Scaled latent tokens (S, n, 16) of painted scenes."""
    done, waiting = [], [np.asarray(paint(scene)) for scene in scenes]
    for at in range(0, len(waiting), ENCODED_AT_ONCE):
        pixels = to_input(np.stack(waiting[at : at + ENCODED_AT_ONCE])).to(device_of(vae))
        mean = vae.vae_encoder(pixels.contiguous(memory_format=torch.channels_last)).chunk(2, dim=1)[0]
        done.append((mean.flatten(2).transpose(1, 2) * scale).cpu())
    return torch.cat(done).contiguous()


def label(scene: Scene) -> Tensor:
    """Which object each cell shows most of (0 for none), and last the background; int64 (n + 1)."""
    most = np.full((GRID, GRID), COVERS, np.float32)
    labels = np.zeros((GRID, GRID), np.int64)
    for figure in scene.figures:
        covered = _covered(figure)
        labels[covered > most] = _kind(figure)
        most = np.maximum(most, covered)
    ground = tuple(BACKGROUNDS).index(scene.background or "")
    return torch.from_numpy(np.append(labels.ravel(), ground))


def _kind(figure: Figure) -> int:
    look = SHAPES.index(figure.shape) * len(COLOURS) + tuple(COLOURS).index(figure.colour)
    return 1 + look * len(SIZES) + tuple(SIZES).index(figure.size)


def looks(kinds: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The indices of shape, colour and size that a cell's label stands for; of no object they mean nothing."""
    look = (kinds - 1).div(len(SIZES), rounding_mode="floor")
    return look // len(COLOURS), look % len(COLOURS), (kinds - 1) % len(SIZES)


def _covered(figure: Figure) -> np.ndarray:
    """Share of each cell that an object covers, (GRID, GRID)."""
    mask, (left, top) = stencil(figure)
    full = np.zeros((SIDE, SIDE), np.float32)
    x, y = max(left, 0), max(top, 0)
    piece = np.asarray(mask, np.float32)[y - top : SIDE - top, x - left : SIDE - left] / 255
    full[y : y + piece.shape[0], x : x + piece.shape[1]] = piece
    return full.reshape(GRID, STRIDE, GRID, STRIDE).mean((1, 3))


def ask_about(rng: Generator, scene: Scene) -> tuple[str, str]:
    """A question about a scene, and its answer."""
    while True:  # not every kind has one about every scene
        if found := questions.MAKERS[pick(rng, ASKED)](rng, scene):
            return found
