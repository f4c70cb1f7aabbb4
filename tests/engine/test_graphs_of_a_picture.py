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
PROMPTS = ["a red fox", "two cats in the snow", "a lamp"]


class StandIn:
    """In place of CUDA: what a capture computes is undone, a replay computes it again into the same tensors."""

    def __call__(self, function, device, first):
        kept = list(leaves(tuple(self.graphs._held.values())))
        before = [x.clone() for x in kept]
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
    model = families.model("unipic").build(replace(config, head=replace(config.head, steps=47))).requires_grad_(False)
    fill(model)
    return model


def latents(model, tokens, seed):
    family, batch = families.model("unipic"), Batch([PROMPTS[seed]], [PhiloxNoise(seed)])
    conditions = family.condition(model, tokens, TASK, batch)
    *_, last = family.sample(model, conditions, TASK, batch, family.schedule(model.config, TASK, batch))
    return last.clone()


def test_a_third_picture_only_replays_and_all_are_those_without_graphs(model, tiny_release):
    tokens = any_tokens(tiny_release / "Qwen2.5-1.5B-Instruct" / "tokenizer.json", families.model("unipic").IMAGE)
    with torch.inference_mode():
        expected = [latents(model, tokens, seed) for seed in range(3)]
        stand_in = StandIn()
        model.graphs = stand_in.graphs = graphs.Graphs(stand_in, kind="cpu")
        counts, captures = model.graphs.counts, []
        for seed, picture in enumerate(expected):
            torch.testing.assert_close(latents(model, tokens, seed), picture, atol=1e-5, rtol=1e-4)
            captures.append(counts.captures)
    rounds = 3
    heads = captures[0]  # one for every number of tokens that a round reveals
    assert 1 <= heads <= rounds and captures[1:] == [heads + rounds, heads + rounds]
    assert counts.misses == 0 and not model.graphs.failed
    assert counts.replays == (rounds * 4 - heads) + rounds * 4 + rounds * (4 + 1), "four whole chunks a round"


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
