"""Answers token by token, from graphs: with a stand-in for CUDA they are those without, and later ones only replay."""

import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from unipic_run.engine import next_token
from unipic_run.engine.errors import BudgetError
from unipic_run.engine.graphs import Graphs
from unipic_run.engine.layers.attention import Attention

LIMIT = 6
QUESTIONS = ["what is this?", "how many cats are in the picture?", "is it night?"]


def photo(seed, side=64):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8))


def capture(function, device, first):
    """As on CUDA the same tensors are read and written by every replay; what is computed meanwhile is no other."""
    result = function()
    return (lambda: result.copy_(function())), result


@pytest.fixture(params=["unipic", "deepgen"])
def engine(request, monkeypatch):
    """It takes the path of a GPU on the CPU, computed by torch."""
    monkeypatch.setattr(next_token, "launches", lambda x: True)
    engine = request.getfixturevalue({"unipic": "tiny_engine", "deepgen": "deepgen_engine"}[request.param])
    before = engine.loaded.model.graphs
    yield engine
    engine.loaded.model.graphs = before


def answers(engine, picture, res=64):
    return [answer.ids for answer in engine.ask(picture, QUESTIONS, max_new_tokens=LIMIT, res=res)]


def test_answers_are_those_without_graphs_and_the_next_ones_replay(engine):
    expected = [answers(engine, photo(seed)) for seed in range(3)]
    assert all(len(ids) > 3 for found in expected for ids in found)
    graphs = engine.loaded.model.graphs = Graphs(capture, "cpu")
    seen = []
    for seed, found in enumerate(expected):
        assert answers(engine, photo(seed)) == found
        seen.append((graphs.counts.eager, graphs.counts.captures))
    assert seen == [(2, 1)] * 3, "the second token of all is captured, then nothing is launched but questions"
    tokens = sum(len(ids) - 1 + (len(ids) < LIMIT) for found in expected for ids in found)
    assert graphs.counts.replays == tokens - 2 and not graphs.failed and graphs.counts.misses == 0


def test_of_pictures_of_several_sizes_one_cache_is_kept(engine):
    sizes = [64, 448, 64]
    expected = [answers(engine, photo(0, 448), res) for res in sizes]
    graphs = engine.loaded.model.graphs = Graphs(capture, "cpu")
    for res, found in zip(sizes, expected, strict=True):
        assert answers(engine, photo(0, 448), res) == found
        assert len(graphs._stored) == 1 and len(graphs._graphs) == 1
    assert graphs.counts.captures == 3


def test_memory_that_runs_out_before_there_is_a_graph_does_not_cost_the_graphs(engine, monkeypatch):
    model, family = engine.loaded.model, engine.loaded.family
    model.graphs, read = Graphs(capture, "cpu"), family.read_image

    def full(*given, **named):
        read(*given, **named)
        raise torch.OutOfMemoryError("tried to allocate 2 GiB")

    monkeypatch.setattr(family, "read_image", full)
    with pytest.raises(BudgetError), warnings.catch_warnings(record=True) as said:
        engine.ask(photo(0), QUESTIONS[0], max_new_tokens=LIMIT, res=64)
    assert not any("CUDA graphs" in str(one.message) for one in said) and not model.graphs.off


@pytest.mark.parametrize("why", ["Triton is not here", "another backend"])
def test_without_our_kernels_nothing_is_captured(engine, monkeypatch, why):
    expected = answers(engine, photo(0))
    if why == "another backend":
        monkeypatch.setattr(Attention, "ours", False)
    else:
        monkeypatch.setattr(next_token, "launches", lambda x: False)
    graphs = engine.loaded.model.graphs = Graphs(capture, "cpu")
    assert answers(engine, photo(0)) == expected and graphs.counts.eager == 0 and not graphs._stored


def test_without_graphs_a_cache_is_nobody_elses(engine):
    family, model, tokens = engine.loaded.family, engine.loaded.model, engine.loaded.tokens
    model.graphs = Graphs(capture, "cuda")
    with torch.inference_mode():
        seen, told = family.look_to_answer(model, torch.zeros(1, 3, 112, 112)), (5, 7, 60, 9, 11)
        one, other = (family.read_image(model, tokens, seen, spare=len(told)) for _ in range(2))
        assert one.keys is not other.keys and not model.graphs.may_write(one.keys)
        model.graphs = Graphs(capture, "cpu")  # a cache that no graph may write to stays as it is
        expected = [family.next_logits(model, other, [token]).clone() for token in told]
        assert not torch.allclose(expected[0], expected[1], rtol=0.1)
        assert model.graphs.counts.eager == model.graphs.counts.captures == 0
        one, other = (family.read_image(model, tokens, seen, spare=len(told)) for _ in range(2))
        assert one.keys is other.keys and model.graphs.may_write(one.keys), "the one before is not used any more"
        for token, logits in zip(told, expected, strict=True):
            torch.testing.assert_close(family.next_logits(model, other, [token]), logits)
        assert model.graphs.counts.captures == 1 and model.graphs.counts.replays == len(told) - 2
        with pytest.raises(ValueError, match="do not fit a cache"):
            other.advance(300), family.next_logits(model, other, [1])
