"""What a request needs of memory and time, by a dry run that is kept in the cache folder for the next time."""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..quant.recipe import Recipe
from .checkpoint.cache import cache_root
from .gpus import Card
from .layers.attention import Attention
from .loaded import Loaded
from .meter import Meter
from .noise import PhiloxNoise
from .plan import META, Plan, dry_answer, dry_run, shapes, total
from .residency import Bands, Stage
from .task import Batch, Task

ROUNDED = 32  # tokens to which a prompt's length is rounded, so that other prompts are not planned anew


class Forecast:
    """Stages of requests to one model, as `residency` wants them; `card`: whose rates its seconds are by."""

    def __init__(self, loaded: Loaded, recipe: Recipe, card: Card) -> None:
        self.loaded, self.recipe, self.card = loaded, recipe, card
        attention = Attention(loaded.family.attention_backend(loaded.model))
        self.attention = attention if attention.ours else Attention()  # other packages do nothing on the meta device

    def costs(self, task: Task, prompts: Sequence[str], images: int) -> dict[str, dict[str, Any]]:
        """By stage of a batch of so many of these images: activation bytes, seconds, FLOP, bytes moved, launches."""
        distinct = sorted(set(prompts), key=self._length, reverse=True)[:images]
        return self._found(
            {
                "kind": task.kind,
                "grid": [task.rows, task.columns],
                "cells": None if task.cells is None else int(task.cells.sum()),
                "steps": task.steps,
                "guided": task.guidance != 1.0,
                "images": images,
                "prompts": len(distinct),  # each has a copy of what they share
                "longest": max(map(self._length, (*distinct, task.negative or ""))),
            },
            lambda: self._made(task, [*distinct, *[distinct[0]] * (images - len(distinct))]),
        )

    def pictures(self, task: Task, prompts: Sequence[str], images: int, previews: bool) -> tuple[Stage, ...]:
        """The stages of such a batch."""
        family, found = self.loaded.family, self.costs(task, prompts, images)
        needs = {name: tuple(family.needs[name]) for name in ("condition", "sample", "decode")}
        if task.pixels is not None:
            needs["condition"] += tuple(family.needs["encode"])
        if previews:
            needs["sample"] += tuple(family.needs["decode"])
            most = max(found[name]["activation"] for name in ("sample", "decode"))
            found = found | {"sample": found["sample"] | {"activation": most}}
        passes = {"condition": 2, "sample": task.steps, "decode": 1}
        return tuple(self._stage(name, needs[name], passes[name], found[name]) for name in needs)

    def answer_costs(self, side: int, question: str, limit: int) -> dict[str, dict[str, Any]]:
        """The same of a question about a picture of side x side tokens, answered by at most `limit`."""
        shape = {"kind": "ask", "side": side, "prompt": self._length(question), "limit": limit}
        return self._found(shape, lambda: self._told(dry_answer(self._meta(), side, question, limit)))

    def answers(self, side: int, question: str, limit: int) -> tuple[Stage, ...]:
        """The stages of such a question."""
        family, found = self.loaded.family, self.answer_costs(side, question, limit)
        reading = (*family.needs["encode"], *family.needs["condition"])
        return (
            self._stage("condition", reading, 1, found["condition"]),
            self._stage("answer", tuple(family.needs["answer"]), limit, found["answer"]),
        )

    def _length(self, text: str) -> int:
        return -(-len(self.loaded.tokens.encode(text)) // ROUNDED)

    def _stage(self, name: str, needs: tuple[str, ...], passes: int, found: dict[str, Any]) -> Stage:
        lookups = frozenset(self.loaded.family.lookups.get(name, ()))
        bands = Bands(found["bands"]["activation"], found["bands"]["seconds"]) if "bands" in found else None
        told = {key: found[key] for key in ("activation", "seconds", "shares")}
        return Stage(name, tuple(dict.fromkeys(needs)), passes=passes, lookups=lookups, bands=bands, **told)

    def _meta(self) -> Loaded:
        loaded = self.loaded
        model = shapes(loaded.family, loaded.config, self.recipe, loaded.dtype, self.attention)
        return Loaded(loaded.family, model, loaded.tokens, META)

    def _made(self, task: Task, prompts: list[str]) -> dict[str, Any]:
        """The stages of a batch, and what decoding in bands costs."""
        meta, meter = self._meta(), Meter()
        pixels = None if task.pixels is None else task.pixels.to(META)
        batch = Batch(prompts, [PhiloxNoise(seed) for seed in range(len(prompts))])
        found = self._told(dry_run(meta, replace(task, pixels=pixels), batch))
        shape = (len(prompts), task.rows * task.columns, meta.config.mar.channels)
        with torch.inference_mode(), meter:
            latents = torch.empty(shape, dtype=meta.dtype, device=META)
            meta.family.decode(meta.model, latents, task.rows, task.columns, bands=True)
        found["decode"]["bands"] = self._told(Plan({"": total(meter, "")}, {}, meter.calls))[""]
        return found

    def _told(self, plan: Plan) -> dict[str, Any]:
        seconds, shares = plan.seconds(self.card), plan.shares(self.card)
        return {
            name: {
                "activation": stage.peak_bytes,
                "seconds": seconds[name],
                "shares": shares[name],
                "flop": stage.flop,
                "nbytes": stage.nbytes,
                "launches": stage.launches,
            }
            for name, stage in plan.stages.items()
        }

    def _found(self, shape: dict[str, Any], make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What was kept for this shape of request; else it is made and kept."""
        path = self._path(shape)
        with suppress(OSError, ValueError):
            return json.loads(path.read_text("utf-8"))
        found = make()
        with suppress(OSError):  # a cache that cannot be written is no reason to fail
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_name(f"{path.name}.partial-{os.getpid()}")
            partial.write_text(json.dumps(found), encoding="utf-8")
            partial.replace(path)
        return found

    def _path(self, shape: dict[str, Any]) -> Path:
        how = [__version__, torch.__version__, asdict(self.loaded.config), str(self.loaded.dtype), self.recipe.scheme]
        told = json.dumps([*how, self.attention.backend, self.card.name, shape], sort_keys=True)
        return cache_root() / "plans" / f"{hashlib.sha256(told.encode()).hexdigest()[:32]}.json"
