"""Choosing the next token: penalty, greedy, nucleus, and when to stop; and hearing of answers."""

from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from unipic_run.engine.noise import PhiloxNoise
from unipic_run.engine.outcome import CancelToken
from unipic_run.engine.reading import answer_all
from unipic_run.engine.request import AskRequest
from unipic_run.engine.text import decode_text, penalise, pick


def test_penalty_pushes_used_tokens_down_whatever_their_sign() -> None:
    logits, used = torch.tensor([2.0, -2.0, 2.0]), torch.tensor([True, True, False])
    torch.testing.assert_close(penalise(logits, used, 1.25), torch.tensor([1.6, -2.5, 2.0]))


def test_nucleus_draws_only_inside_top_p_in_proportion() -> None:
    scores = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    drawn = Counter(pick(scores, 1.0, 0.75, PhiloxNoise(1), step) for step in range(2000))
    assert set(drawn) == {0, 1}
    assert abs(drawn[0] / 2000 - 0.5 / 0.8) < 0.03
    everything = Counter(pick(scores, 1.0, 1.0, PhiloxNoise(1), step) for step in range(2000))
    assert set(everything) == {0, 1, 2, 3}


def test_a_tiny_temperature_is_greedy() -> None:
    assert pick(torch.tensor([1.0, 5.0, 2.0]), 1e-39, 1.0, PhiloxNoise(1), 0) == 1


def run(logits: list[list[float]], **options: object) -> tuple[list[int], list[list[int]]]:
    asked: list[list[int]] = []

    def next_logits(ids: list[int]) -> torch.Tensor:
        asked.append(list(ids))
        return torch.tensor(logits[len(asked) - 1])

    settings = {"eos": 2, "limit": 10, "penalty": 1.0, "temperature": 0.0, "top_p": 1.0, **options}
    return list(decode_text(next_logits, [8, 9], noise=PhiloxNoise(0), **settings)), asked


def test_stops_before_the_end_token() -> None:
    ids, asked = run([[1.0, 0, 0], [0, 1.0, 0], [0, 0, 1.0]])
    assert ids == [0, 1] and asked == [[8, 9], [0], [1]]


def test_limit_asks_the_model_no_more_than_needed() -> None:
    ids, asked = run([[1.0, 0, 0]] * 3, limit=2)
    assert ids == [0, 0] and len(asked) == 2


def test_tokens_chosen_earlier_are_taken_as_they_are_and_then_it_goes_on() -> None:
    logits = [[1.0, 0.9, 0], [1.0, 0.9, 0], [1.0, 0.95, 0]]
    whole, _ = run(logits, limit=3, penalty=1.08)
    assert whole == [0, 0, 1]
    assert run(logits, limit=3, penalty=1.08, given=(1, 1)) == ([1, 1, 0], [[8, 9], [1], [1]])
    assert run(logits, limit=3, penalty=1.08, given=(0, 0)) == (whole, [[8, 9], [0], [0]]), "they count as used"


def test_penalty_reaches_generated_tokens() -> None:
    assert run([[1.0, 0.9, 0]] * 3, limit=2, penalty=2.0)[0] == [0, 1]


def test_each_answer_is_heard_before_the_next_is_begun() -> None:
    def answer(request: AskRequest, cancel: CancelToken) -> list[str]:
        if request.question == "b":
            raise KeyboardInterrupt
        return [request.question]

    clock = SimpleNamespace(seconds={}, device=torch.device("cpu"))
    reader = SimpleNamespace(answer=answer, clock=clock, tokens=SimpleNamespace(decode="".join))
    requests, heard = [AskRequest("a", 64), AskRequest("b", 64)], []
    with pytest.raises(KeyboardInterrupt):
        answer_all(reader, requests, CancelToken(), lambda task, **how: how | {"attention": "sdpa"}, heard.append)
    assert [one.text for one in heard] == ["a"]
