"""Batches of the three tasks, drawn for a step: which shards are in use, which scenes, which words."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.random import Generator
from torch import Tensor

from ..engine.models.unipic.prompts import IMAGE, turn, unconditional_turn
from ..engine.tokens import Tokens
from .data import Shard, ask_about
from .phrases import phrase
from .plans import JointPlan
from .samples import Sample, reworded
from .scenes import Spec
from .tokenizer import END
from .train_vae import Autoencoder

DROPPED = 0.1  # share of prompts replaced by the unconditional one
REWORDED = 0.4  # and of pictures of which it is tried to describe them otherwise: not all can be


@dataclass(frozen=True)
class Words:
    """Token rows padded on the right: ids (B, S) int64, lengths (B); `answers` marks positions whose id is one."""

    ids: Tensor
    lengths: Tensor
    answers: Tensor


@dataclass(frozen=True)
class Seen:
    """Whole pictures: latents (B, n, 16), and labels (B, n + 1) of what stands where."""

    latents: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Pictures:
    """What a generation or an edit learns from: the results, the prompts, and what an edit begins with."""

    made: Seen
    words: Words
    source: Seen | None = None


@dataclass(frozen=True)
class Answers:
    """Pictures, and the words of as many questions about each, (B K, S), picture by picture."""

    seen: Seen
    words: Words


class Pool:
    """A window of shards that moves on as training does, so that the model never sees the end of its data."""

    def __init__(self, vae: Autoencoder, scale: float, plan: JointPlan, kept: Path | None) -> None:
        self.vae, self.scale, self.plan, self.kept = vae, scale, plan, kept
        self.shards: dict[int, Shard] = {}

    def at(self, step: int) -> list[Shard]:
        """The shards of a step: few at first, and from some day on the newest `plan.shards`."""
        end = self.plan.first_shards + step // self.plan.fresh_every
        wanted = range(max(0, end - self.plan.shards), end)
        if self.shards.keys() != set(wanted):
            self.shards = {i: self.shards.get(i) or self._make(i) for i in wanted}
        return list(self.shards.values())

    def _make(self, number: int) -> Shard:
        kept = self.kept and self.kept / f"shard-{number:05}.safetensors"
        return Shard(self.plan.seed, number, self.plan.shard).encode(self.vae, self.scale, kept)


class Draw:
    """The batches of one step."""

    def __init__(self, rng: Generator, shards: Sequence[Shard], tokens: Tokens, device: torch.device) -> None:
        self.rng, self.shards, self.tokens, self.device = rng, shards, tokens, device

    def pictures(self, count: int) -> Pictures:
        shard, chosen = self._chosen("samples", count)
        texts = [turn("generate", phrase(self._spec(shard.samples[i]), self.rng, ordered=True)) for i in chosen]
        made = self._seen(shard.latents, shard.labels, chosen)
        return Pictures(made, self._words(self._dropped(texts, "generate")))

    def edits(self, count: int) -> Pictures:
        shard, chosen = self._chosen("edits", count)
        texts = [turn("edit", shard.edits[i].instruction) for i in chosen]
        made = self._seen(shard.targets, shard.target_labels, chosen)
        source = self._seen(shard.sources, shard.source_labels, chosen)
        return Pictures(made, self._words(self._dropped(texts, "edit")), source)

    def answers(self, count: int, each: int) -> Answers:
        """About what edits begin with: there objects stand anywhere, as in the exam."""
        shard, chosen = self._chosen("edits", count)
        asked = [ask_about(self.rng, shard.edits[i].source) for i in chosen for _ in range(each)]
        words = self._words([turn("ask", question) for question, _ in asked], [answer + END for _, answer in asked])
        return Answers(self._seen(shard.sources, shard.source_labels, chosen), words)

    def _spec(self, sample: Sample) -> Spec:
        return reworded(sample, self.rng) if self.rng.random() < REWORDED else sample.spec

    def _chosen(self, what: str, count: int) -> tuple[Shard, list[int]]:
        shard = self.shards[int(self.rng.integers(len(self.shards)))]
        return shard, self.rng.choice(len(getattr(shard, what)), count, replace=False).tolist()

    def _dropped(self, texts: list[str], kind: str) -> list[str]:
        gone = self.rng.random(len(texts)) < DROPPED
        return [unconditional_turn(kind, None) if g else text for g, text in zip(gone, texts, strict=True)]

    def _words(self, texts: Sequence[str], answers: Sequence[str] | None = None) -> Words:
        words = words_of(self.tokens, texts, answers)
        return Words(self._up(words.ids), self._up(words.lengths), self._up(words.answers))

    def _seen(self, latents: Tensor, labels: Tensor, chosen: list[int]) -> Seen:
        return Seen(self._up(latents[chosen]), self._up(labels[chosen]))

    def _up(self, x: Tensor) -> Tensor:
        return x.to(self.device)


def words_of(tokens: Tokens, texts: Sequence[str], answers: Sequence[str] | None = None) -> Words:
    """Prompts as rows of ids; of a text with an image, what follows it. Pads are id 0 and never read."""
    rows = [tokens.encode(text.partition(IMAGE)[2] if IMAGE in text else text) for text in texts]
    prompts = [len(row) for row in rows]
    if answers is not None:
        rows = [row + tokens.encode(answer) for row, answer in zip(rows, answers, strict=True)]
    ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.int64)
    marks = torch.zeros(ids.shape, dtype=torch.bool)
    for i, (row, prompt) in enumerate(zip(rows, prompts, strict=True)):
        ids[i, : len(row)] = torch.tensor(row)
        marks[i, prompt : len(row)] = True
    return Words(ids, torch.tensor([len(row) for row in rows]), marks)


def step_rng(seed: int, step: int) -> Generator:
    return np.random.default_rng((seed, 2, step))
