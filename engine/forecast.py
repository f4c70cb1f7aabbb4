"""What requests to one model need of memory and time, by dry runs that are kept for the next time.

A plan is made for all requests of a shape: for the longest prompt that is kept under it, so none of them needs more.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from types import MappingProxyType
from typing import Any

from ..quant.recipe import Recipe
from .gpus import Card
from .kept_plans import is_kept, kept
from .layers.attention import Attention
from .loaded import Loaded
from .noise import PhiloxNoise
from .plan import APART, BANDED, META, Plan, can_be_apart, dry_answer, dry_run, shapes
from .residency import Bands, Part, Stage, Work
from .task import Batch, Task

ROUNDED = 32  # tokens to which a prompt's length is rounded up, so that other prompts are not planned anew
SEAM = 4  # tokens more that a prompt may take between other words than alone; heuristic
PROMPT = "\ue000"  # stands for a prompt; of the private use area
Size = tuple[int, int]  # (width, height) in pixels
PROBE = "<|im_start|>user\nA sentence, <image> and the rest."  # tells tokenizers apart


class Forecast:
    """Stages of requests to one model, as `residency` wants them; `card`: whose rates its seconds are by."""

    def __init__(self, loaded: Loaded, recipe: Recipe, card: Card) -> None:
        self.loaded, self.recipe, self.card = loaded, recipe, card
        attention = Attention(loaded.family.attention_backend(loaded.model))
        self.attention = attention if attention.ours else Attention()  # other packages do nothing on the meta device

    def plan(self, task: Task, prompts: Sequence[str], images: int) -> Plan:
        """Of a batch of so many images, also with the stages BANDED and, where that can be, APART."""
        shape = self.shape(task, prompts, images)
        return kept(shape, lambda: self.fresh(task, prompts, images))

    def fresh(self, task: Task, prompts: Sequence[str], images: int) -> Plan:
        """The same, but never a kept one: it has its history."""
        shape, sources = self.shape(task, prompts, images), tuple(pixels.to(META) for pixels in task.sources)
        task = replace(task, sources=sources, negative=None if task.negative is None else PROMPT * 2)
        texts = [f"{PROMPT}{min(index, shape['prompts'] - 1)}" for index in range(images)]
        batch = Batch(texts, [PhiloxNoise(seed) for seed in range(images)])
        return dry_run(self._meta(shape["longest"]), task, batch, others=True)

    def is_kept(self, task: Task, prompts: Sequence[str], images: int) -> bool:
        return is_kept(self.shape(task, prompts, images))

    def shape(self, task: Task, prompts: Sequence[str], images: int) -> dict[str, Any]:
        """All that a plan depends on. `longest`: tokens of the longest prompt that may be planned so."""
        longest = sorted(map(self._length, set(prompts)), reverse=True)[:images]
        negative = [] if task.negative is None else [self._length(task.negative)]
        return self._how() | {
            "kind": task.kind,
            "grid": [task.rows, task.columns],
            "sources": [list(pixels.shape[2:]) for pixels in task.sources],
            "posterior": task.posterior,
            "cells": None if task.cells is None else int(task.cells.sum()),
            "steps": task.steps,
            "guided": task.guidance != 1.0,
            "shortcuts": [task.head_steps, task.order, task.cfg_interval, task.solver, task.cfg_cache],
            "negative": task.negative is not None,
            "images": images,
            "prompts": len(longest),  # each has a copy of what they share
            "longest": max(longest + negative),
        }

    def work(self, parts: tuple[Part, ...], task: Task, prompts: Sequence[str], most: int, previews: bool) -> Work:
        """What is to be placed for an image of each prompt, of which up to `most` may be computed together."""
        batches = {size: self.pictures(task, prompts, size, previews) for size in {1, most}}
        can = can_be_apart(self.loaded.family, task, images=1)
        apart = self.pictures(task, prompts, 1, previews, apart=True) if can else ()
        return Work(parts, batches, apart, images=len(prompts))

    def pictures(
        self, task: Task, prompts: Sequence[str], images: int, previews: bool, apart: bool = False
    ) -> tuple[Stage, ...]:
        """The stages of such a batch; `apart`: as Batch has it."""
        family, plan = self.loaded.family, self.plan(task, prompts, images)
        needs = {name: tuple(parts) for name, parts in family.needs(task.kind).items()}
        if previews:
            needs["sample"] += needs["decode"]
        passes = dict.fromkeys(needs, 2) | {"sample": task.steps * (1 + apart), "decode": 1}
        *before, sample, decode = self._stages(plan, needs, passes, {"sample": APART} if apart else {})
        decode = replace(decode, bands=Bands(plan.stages[BANDED].peak_bytes, plan.seconds(self.card)[BANDED]))
        return *before, with_previews(sample, decode, plan) if previews else sample, decode

    def answer_plan(self, size: Size, question: str, limit: int) -> Plan:
        """Of a question about a picture of that size, as the model sees it, answered by at most `limit` tokens."""
        return kept(self.answer_shape(size, question, limit), lambda: self.fresh_answer(size, question, limit))

    def fresh_answer(self, size: Size, question: str, limit: int) -> Plan:
        return dry_answer(self._meta(self._length(question)), size, PROMPT, limit)

    def answer_is_kept(self, size: Size, question: str, limit: int) -> bool:
        return is_kept(self.answer_shape(size, question, limit))

    def answer_shape(self, size: Size, question: str, limit: int) -> dict[str, Any]:
        return self._how() | {"kind": "ask", "size": list(size), "longest": self._length(question), "limit": limit}

    def answers(self, size: Size, question: str, limit: int) -> tuple[Stage, ...]:
        """The stages of such a question."""
        needs = self.loaded.family.needs("ask")
        passes = dict.fromkeys(needs, 1) | {"answer": limit}
        return self._stages(self.answer_plan(size, question, limit), needs, passes)

    def _how(self) -> dict[str, Any]:
        """What all plans of the model depend on; a card's rates come in later."""
        loaded = self.loaded
        how = {"config": asdict(loaded.config), "dtype": str(loaded.dtype), "attention": self.attention.backend}
        return how | {"scheme": self.recipe.scheme, "tokens": len(loaded.tokens.encode(PROBE))}

    def _length(self, text: str) -> int:
        return -(-(len(self.loaded.tokens.encode(text)) + SEAM) // ROUNDED) * ROUNDED

    def _stages(
        self,
        plan: Plan,
        needs: Mapping[str, Sequence[str]],
        passes: Mapping[str, int],
        taken: Mapping[str, str] = MappingProxyType({}),
    ) -> tuple[Stage, ...]:
        """`taken`: the stages of the plan that stand for others."""
        seconds, shares = plan.seconds(self.card), plan.shares(self.card)
        return tuple(
            Stage(
                name,
                needs=tuple(dict.fromkeys(parts)),
                activation=plan.stages[taken.get(name, name)].peak_bytes,
                seconds=seconds[taken.get(name, name)],
                passes=passes[name],
                lookups=frozenset(self.loaded.family.lookups.get(name, ())),
                shares=shares[taken.get(name, name)],
            )
            for name, parts in needs.items()
        )

    def _meta(self, longest: int) -> Loaded:
        loaded = self.loaded
        model = shapes(loaded.family, loaded.config, self.recipe, loaded.dtype, self.attention)
        return Loaded(loaded.family, model, LongestPrompts(loaded.tokens, longest), META)


class LongestPrompts:
    """Tokens in which every prompt has the greatest length there is; what stands around it has its own."""

    def __init__(self, tokens: Any, longest: int) -> None:
        self.tokens, self.longest = tokens, longest

    def encode(self, text: str, by: str = "") -> list[int]:
        around = self.tokens.encode(text.replace(PROMPT, ""), by)
        return around + [0] * (self.longest * (PROMPT in text))


def with_previews(sample: Stage, decode: Stage, plan: Plan) -> Stage:
    """`sample` where pictures are decoded between its rounds: beside what the sampler keeps, not instead of it."""
    decoding = plan.between_rounds - plan.before_decode
    bands = Bands(max(sample.activation, decoding + decode.bands.activation), sample.seconds)
    return replace(sample, activation=max(sample.activation, decoding + decode.activation), bands=bands)
