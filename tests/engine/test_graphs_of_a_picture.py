"""Pictures of one shape, one after the other: what is captured at the first, the second and never again."""

from dataclasses import replace

import pytest
import torch
from unipic_run.bench.random_model import any_tokens, architecture, fill
from unipic_run.engine import families, graphs
from unipic_run.engine.models.unipic import sampler
from unipic_run.engine.noise import PhiloxNoise
from unipic_run.engine.task import Batch, Task

TASK = Task("generate", 4, 4, steps=3, guidance=3.0, cfg_schedule="linear", temperature=0.9)
STEPS = 47  # of the head: nine chunks of five and one of two
PROMPTS = ["a red fox", "two cats in the snow", "a lamp"]


class StandIn:
    """In place of CUDA: what a capture computes is undone, a replay computes it again into the same tensors."""

    def __call__(self, function, device, first):
        kept = list(leaves(tuple(self.graphs._held.values())))
        before = [x.clone() for x in kept]
        for x in kept:
            if x.shape == (3,) and x.dtype == torch.int64:  # a capture takes no step; this does, if there are any left
                x.fill_(STEPS - 1)
        result = function()
        for x, was in zip(kept, before, strict=True):
            x.copy_(was)

        def replay():
            again = function()
            if result is not None:
                result.copy_(again)

        return replay, result


def leaves(x):
    if isinstance(x, torch.Tensor):
        yield x
    for part in graphs.parts(x) or ():
        yield from leaves(part)


@pytest.fixture
def model(tiny_release, monkeypatch):
    """A tiny model that takes the path of a GPU on the CPU, computed by torch."""
    monkeypatch.setattr(sampler, "launches", lambda x: True)
    config = architecture(str(tiny_release))
    model = (
        families.model("unipic").build(replace(config, head=replace(config.head, steps=STEPS))).requires_grad_(False)
    )
    fill(model)
    return model


def latents(model, tokens, seed, **how):
    task = replace(TASK, **how)
    family, batch = families.model("unipic"), Batch([PROMPTS[seed]], [PhiloxNoise(seed)])
    conditions = family.condition(model, tokens, task, batch)
    *_, last = family.sample(model, conditions, task, batch, family.schedule(model.config, task, batch))
    return last.clone()


def test_a_third_picture_only_replays_and_all_are_those_without_graphs(model, tiny_release):
    tokens = any_tokens(tiny_release / "Qwen2.5-1.5B-Instruct" / "tokenizer.json", families.model("unipic").IMAGE)
    with torch.inference_mode():
        expected = [latents(model, tokens, seed) for seed in range(3)]
        stand_in = StandIn()
        model.graphs = stand_in.graphs = graphs.Graphs(stand_in, kind="cpu")
        counts, captures, eager = model.graphs.counts, [], []
        for seed, picture in enumerate(expected):
            torch.testing.assert_close(latents(model, tokens, seed), picture, atol=1e-5, rtol=1e-4)
            captures.append(counts.captures)
            eager.append(counts.eager)
    rounds, calls = 3, 1 + 9 + 1  # what it understands, nine whole chunks of the head's steps, and the last one
    assert captures == [rounds, 3 * rounds, 3 * rounds], (
        "whole chunks at sight, what comes once a round the second time"
    )
    assert eager == [3 * rounds, 5 * rounds, 5 * rounds], "nothing is launched the third time"
    assert counts.misses == 0 and not model.graphs.failed
    assert counts.replays == 3 * rounds * calls - eager[-1]


@pytest.mark.parametrize("speed", ["balanced", "fast"])
def test_shortcuts_are_replayed_as_well(model, tiny_release, speed):
    how = families.model("unipic").speeds(model.config)[speed]
    tokens = any_tokens(tiny_release / "Qwen2.5-1.5B-Instruct" / "tokenizer.json", families.model("unipic").IMAGE)
    with torch.inference_mode():
        stand_in = StandIn()
        model.graphs = stand_in.graphs = graphs.Graphs(stand_in, kind="cpu")
        counts, seen = model.graphs.counts, []
        for _ in range(3):
            seen.append((latents(model, tokens, 0, **how), counts.eager, counts.captures))
    (first, *_), second, third = seen
    torch.testing.assert_close(third[0], first, atol=1e-5, rtol=1e-4)
    assert third[1:] == second[1:] and not model.graphs.failed, "whatever the steps of a round, all is captured by then"


def test_weights_that_move_take_their_graphs_with_them(model, tiny_release):
    tokens = any_tokens(tiny_release / "Qwen2.5-1.5B-Instruct" / "tokenizer.json", families.model("unipic").IMAGE)
    with torch.inference_mode():
        stand_in = StandIn()
        model.graphs = stand_in.graphs = graphs.Graphs(stand_in, kind="cpu")
        latents(model, tokens, 0)
        replays = model.graphs.counts.replays
        model.graphs.clear("layers are streamed")
        latents(model, tokens, 0)
    assert model.graphs.counts.replays == replays > 0
