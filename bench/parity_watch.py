"""What the real modules computed while the engine ran: forward hooks and wrapped calls that replace nothing."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from unipic_run.bench.parity_stream import Stream
from unipic_run.engine import text
from unipic_run.engine.engine import Engine
from unipic_run.engine.kv_cache import KVCache
from unipic_run.engine.schedules import Round
from unipic_run.engine.task import Task


@dataclass(frozen=True)
class Prefill:
    """A stretch of prompt that went through the LLM: `ids` are its text tokens, `x` also holds image features."""

    cache: KVCache
    ids: tuple[int, ...]
    x: Tensor  # (1, L, H)
    hidden: Tensor  # (1, L, H)


@dataclass
class Sampled:
    """One batch: its conditions, and per round the plan and the tensors by name."""

    task: Task
    conditions: Any
    rounds: list[tuple[Round, dict[str, Any]]] = field(default_factory=list)
    tokens: Tensor | None = None  # (B, n, 16) after the last round


class Watch:
    """Everything seen inside the `with`, as copies on the CPU."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.stream = engine, Stream(engine.loaded.model)
        self.prefills: list[Prefill] = []
        self.encoded: list[tuple[Tensor, Tensor]] = []  # latents in, features out, of every MAR encoder call
        self.batches: list[Sampled] = []
        self.images: list[Tensor] = []  # (B, 3, H, W) before clamping
        self.pixels: Tensor | None = None  # the picture of a question
        self.logits: list[Tensor] = []
        self.scores: list[Tensor] = []
        self._ids: list[int] = []  # embedded since the last prefill
        self._now: dict[str, Any] = {}  # of the current round

    def __enter__(self) -> "Watch":
        model, engine = self.engine.loaded.model, self.engine
        loaded = engine.loaded
        model.graphs.clear("watched")  # hooks copy to the CPU, which no capture allows
        with ExitStack() as stack:
            stack.callback(model.graphs.clear)
            for module, hook in (
                (model.embed, self._on_embed),
                (model.mar_encoder, self._on_encoder),
                (model.llm, self._on_llm),
                (model.mar_decoder, self._on_decoder),
                (model.vae_decoder, self._on_image),
            ):
                stack.callback(module.register_forward_hook(hook).remove)
            self._wrap(stack, model.llm, "extend", self._extend)
            self._wrap(stack, model.head, "sample", self._head_sample)
            self._wrap(stack, text, "penalise", self._penalise)
            engine.loaded = replace(loaded, family=WatchedFamily(loaded.family, self))
            stack.callback(setattr, engine, "loaded", loaded)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    def prompt(self, cache: KVCache, shared: KVCache | None = None) -> list[Prefill]:
        """The stretches that filled a cache, those of the cache it was forked from first."""
        before = [] if shared is None or shared is cache else self.prompt(shared)
        return before + [prefill for prefill in self.prefills if prefill.cache is cache]

    def _wrap(self, stack: ExitStack, owner: Any, name: str, wrapper: Callable[..., Any]) -> None:
        """Shadow a method of an instance, or a function of a module, until the watch ends."""
        original = getattr(owner, name)
        setattr(owner, name, partial(wrapper, original))
        if isinstance(owner, nn.Module):
            stack.callback(delattr, owner, name)
        else:
            stack.callback(setattr, owner, name, original)

    def _on_embed(self, module: nn.Module, args: tuple[Tensor], out: Tensor) -> None:
        self._ids += args[0].flatten().tolist()

    def _on_encoder(self, module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
        self.encoded.append((kept(args[0]), kept(out)))
        self._now |= {"enc": kept(out)}

    def _on_llm(self, module: nn.Module, args: tuple[Any, ...], out: Tensor) -> None:
        x, prompts = args
        positions = prompts.positions(x.shape[1])
        self._now |= {"llm_in": kept(self.stream.plain(x)), "position_ids": kept(positions)}
        self._now |= {"llm_out": kept(self.stream.plain_normed(out))}

    def _on_decoder(self, module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
        self._now |= {"enc_out": kept(args[0]), "z": kept(out)}

    def _on_image(self, module: nn.Module, args: tuple[Tensor], out: Tensor) -> None:
        self.images.append(kept(out))

    def _extend(self, extend: Callable[..., Tensor], x: Tensor, cache: KVCache) -> Tensor:
        hidden = extend(x, cache)
        plain = kept(self.stream.plain(x)), kept(self.stream.plain_normed(hidden))
        self.prefills.append(Prefill(cache, tuple(self._ids), *plain))
        self._ids = []
        return hidden

    def _head_sample(
        self, sample: Callable[..., Tensor], z: Tensor, start: Tensor, noise: Tensor, *rest: Any
    ) -> Tensor:
        sampled = sample(z, start, noise, *rest)
        _, _, guidance, _ = rest  # between the noise table, embedded timesteps and temperature
        self._now |= {"head_z": kept(z), "noise_init": kept(start), "noise": kept(noise), "cfg": [guidance]}
        self._now |= {"sampled": kept(sampled)}
        return sampled

    def _penalise(self, penalise: Callable[..., Tensor], *args: Any) -> Tensor:
        scores = penalise(*args)
        self.scores.append(kept(scores))
        return scores

    def begin(self, task: Task, conditions: Any) -> None:
        self.batches.append(Sampled(task, conditions))

    def end_round(self, plan: Round, tokens_in: Tensor, tokens: Tensor) -> None:
        plan = replace(plan, visible=kept(plan.visible), predicted=kept(plan.predicted))
        self.batches[-1].rounds.append((plan, self._now | {"tokens_in": tokens_in}))
        self.batches[-1].tokens, self._now = tokens, {}


class WatchedFamily:
    """A family module whose verbs tell the watch what they saw."""

    def __init__(self, family: Any, watch: Watch) -> None:
        self._family, self._watch = family, watch

    def __getattr__(self, name: str) -> Any:
        return getattr(self._family, name)

    def condition(self, model: nn.Module, tokens: Any, task: Task, *rest: Any) -> Any:
        conditions = self._family.condition(model, tokens, task, *rest)
        self._watch.begin(task, conditions)
        return conditions

    def sample(self, model: nn.Module, conditions: Any, task: Task, batch: Any, rounds: Any) -> Iterator[Tensor]:
        known = torch.zeros(self._family.latents(model.config, len(batch.noises), task.rows, task.columns))
        revealed = self._family.sample(model, conditions, task, batch, rounds)
        for plan, tokens in zip(rounds.rounds, revealed, strict=True):
            self._watch.end_round(plan, known, kept(tokens))
            known = kept(tokens)
            yield tokens

    def look_to_answer(self, model: nn.Module, pixels: Tensor) -> Any:
        self._watch.pixels = kept(pixels)
        return self._family.look_to_answer(model, pixels)

    def next_logits(self, *args: Any) -> Tensor:
        logits = self._family.next_logits(*args)
        self._watch.logits.append(kept(logits))
        return logits


def kept(x: Tensor) -> Tensor:
    """A copy on the CPU that later work cannot change."""
    return x.detach().to("cpu", copy=True)
