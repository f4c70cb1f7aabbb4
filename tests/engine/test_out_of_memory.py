"""Memory that runs out while an engine works: the request goes on in less of it, and nothing is lost or told twice."""

import warnings
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from unipic_run.engine.errors import BudgetError, HostMemoryError, UnipicWarning
from unipic_run.engine.graphs import Graphs
from unipic_run.engine.room import Room

HOW = {"res": 64, "steps": 3, "seed": 5}
ASKED = {"res": 64, "max_new_tokens": 6, "seed": 3}
FULL = BudgetError("out of memory")
PHOTO = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
pytestmark = pytest.mark.filterwarnings("ignore:64x64 is far", "ignore:32x32 is far")


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("UNIPIC_RUN_CACHE", str(tmp_path_factory.getbasetemp() / "placing"))


def failing(monkeypatch, family, name, at):
    """The family's function runs out of memory at its calls of these numbers; returns the numbers of all calls."""
    work, calls = getattr(family, name), []

    def run(*arguments, **options):
        calls.append(len(calls) + 1)
        if calls[-1] in at:
            raise torch.OutOfMemoryError("CUDA out of memory, says the test")
        return work(*arguments, **options)

    monkeypatch.setattr(family, name, run)
    return calls


@contextmanager
def going_on(times):
    """Inside, so many lines say that a request goes on in less memory."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    said = [str(one.message) for one in caught if one.category is UnipicWarning]
    said = [line for line in said if line.startswith("out of memory: going on with")]
    assert len(said) == times, said


def same(made, expected):
    """To a level: decoding in bands rounds elsewhere."""
    return np.abs(np.asarray(made, int) - np.asarray(expected, int)).max() <= 1


def test_pictures_go_on_in_less_and_no_preview_comes_twice(tiny_engine, under, monkeypatch):
    engine, events, how = under(2**40), [], {"batch_size": 2, "preview_every": 2, **HOW}
    prompts = ["a red fox", "a lamp"]
    engine.generate(prompts, **how)  # what it needs is known now
    failing(monkeypatch, engine.loaded.family, "decode", at=[2])  # the first one makes the previews
    with going_on(1):
        made = engine.generate(prompts, on_event=events.append, **how)
    monkeypatch.undo()
    for prompt, image in zip(prompts, made.images, strict=True):
        assert same(image, tiny_engine.generate(prompt, **HOW).images[0])
    rounds = [(event.round, event.done, len(event.previews)) for event in events if event.stage == "sample"]
    assert rounds[:3] == [(1, 0, 0), (2, 0, 2), (3, 0, 0)], "the batch that fails when it is decoded"
    assert len(rounds) > 3 and not any(previews for *_, previews in rounds[3:])
    assert sum(len(event.images) for event in events) == 2 and len(made.settings) == 2


@pytest.mark.parametrize(
    ("name", "at"), [("look_to_answer", [1]), ("read_image", [1]), ("next_logits", [1]), ("next_logits", [3, 6])]
)
def test_answers_go_on_behind_what_was_given(tiny_engine, under, monkeypatch, name, at):
    asked = {"temperature": 1.0, **ASKED}
    questions = ["what is this?", "and that?"]
    expected = [answer.ids for answer in tiny_engine.ask(PHOTO, questions, **asked)]
    engine = under(2**40)
    engine.ask(PHOTO, questions, **asked)
    failing(monkeypatch, engine.loaded.family, name, at)
    with going_on(len(at)):
        answers = engine.ask(PHOTO, questions, **asked)
    assert [answer.ids for answer in answers] == expected and len(expected[0]) == 6
    assert all({"look", "condition", "answer"} == set(answer.timings) for answer in answers)


def test_a_stream_says_nothing_twice(tiny_engine, under, monkeypatch):
    expected, engine = "".join(tiny_engine.ask(PHOTO, "what?", stream=True, **ASKED)), under(2**40)
    engine.ask(PHOTO, "what?", **ASKED)  # what it needs is known now
    calls, pieces = failing(monkeypatch, engine.loaded.family, "next_logits", at=[2, 7]), []
    with going_on(2):
        for piece in engine.ask(PHOTO, "what?", stream=True, **ASKED):
            pieces.append((len(calls), piece))
    assert "".join(piece for _, piece in pieces) == expected
    assert any(asked < 7 for asked, _ in pieces) and any(asked > 7 for asked, _ in pieces), "before and after"


@pytest.mark.parametrize("name", ["condition", "look_to_answer", "read_image"])
def test_nothing_of_what_failed_is_held_when_weights_move(under, monkeypatch, name):
    engine, made, alive = under(2**40), [], []
    family, less = engine.loaded.family, engine.placing.less
    work = getattr(family, name)

    def asked():
        engine.generate("a red fox", **HOW) if name == "condition" else engine.ask(PHOTO, "what?", **ASKED)

    asked()  # what it needs is known now

    def remembered(*arguments, **options):
        found = work(*arguments, **options)
        made.append(weakref.ref(found))
        return found

    def watched():
        alive.extend(one() is not None for one in made)
        return less()

    monkeypatch.setattr(engine.placing, "less", watched)
    monkeypatch.setattr(family, name, remembered)
    failing(monkeypatch, family, "decode" if name == "condition" else "next_logits", at=[1])
    with going_on(1):
        asked()
    assert alive == [False] and len(made) == 2


def test_graphs_are_the_first_to_go():
    loaded = with_graphs()
    graphs, room = loaded.model.graphs, Room(loaded, 4, less=lambda: (loaded, 1))
    assert graphs.holds
    with going_on(1):
        assert room.shrink(FULL) and room.at_once == 4
    assert not graphs.holds and graphs.off
    assert room.shrink(FULL) and room.at_once == 1, "nothing is done again for graphs that are gone"
    graphs.counts.captures += 1  # but given up meanwhile
    assert not Room(loaded).shrink(FULL)


def test_what_frees_memory_of_a_gpu_is_not_tried_for_the_machines_own():
    loaded = with_graphs("cuda")
    room = Room(loaded, 4, less=lambda: pytest.fail("weights of the GPU would go to the machine's memory"))
    with going_on(0):
        assert not room.shrink(HostMemoryError("no RAM"))
    assert loaded.model.graphs.holds and room.at_once == 4
    with going_on(1):
        assert Room(with_graphs(), 4).shrink(HostMemoryError("no RAM")), "where both are one"


def test_the_next_request_tries_graphs_again_and_leaves_other_reasons_alone():
    loaded = with_graphs()
    graphs = loaded.model.graphs
    with going_on(1):
        Room(loaded).shrink(FULL)
    assert graphs.refusal("round", torch.device("cpu"))
    Room(loaded)
    assert not graphs.refusal("round", torch.device("cpu"))
    graphs.clear("watched")
    Room(loaded)
    assert graphs.off == "watched"


def with_graphs(device="cpu"):
    """A model on a device that has captured one function."""
    graphs = Graphs(lambda function, device, first: (lambda: None, function()), "cpu")
    graphs.run("round", 1, torch.neg, (torch.ones(2),), after=1)
    return SimpleNamespace(model=SimpleNamespace(graphs=graphs), device=torch.device(device))


def test_without_a_budget_pictures_go_on_one_at_a_time(tiny_engine, monkeypatch):
    prompts, how = ["a red fox", "a lamp"], {"batch_size": 2, **HOW}
    expected = [tiny_engine.generate(prompt, **HOW).images[0] for prompt in prompts]
    calls = failing(monkeypatch, tiny_engine.loaded.family, "decode", at=[1])
    with going_on(1):
        made = tiny_engine.generate(prompts, **how)
    assert len(calls) == 3 and all(map(same, made.images, expected))
    failing(monkeypatch, tiny_engine.loaded.family, "decode", at=[1])
    with going_on(0), pytest.raises(BudgetError, match="make smaller pictures, or add --quant int8"):
        tiny_engine.generate("a red fox", **{**how, "batch_size": 4})


def test_without_a_budget_it_ends_in_an_error_and_the_engine_stays_usable(tiny_engine, monkeypatch):
    failing(monkeypatch, tiny_engine.loaded.family, "next_logits", at=[1])
    with pytest.raises(BudgetError, match="out of memory while answering"):
        tiny_engine.ask(PHOTO, "what?", **ASKED)
    assert tiny_engine.ask(PHOTO, "what?", **ASKED).ids


def test_where_no_smaller_way_is_left_it_says_what_was_tried(under, monkeypatch):
    engine = under(2**40)
    engine.ask(PHOTO, "what?", **ASKED)  # what it needs is known now
    failing(monkeypatch, engine.loaded.family, "next_logits", at=range(1000))
    with pytest.warns(UnipicWarning, match="going on with"), pytest.raises(BudgetError, match="in the smallest way"):
        engine.ask(PHOTO, "what?", **ASKED)


SMALL = {
    "pictures": lambda engine: np.asarray(engine.generate("a red fox", res=32, steps=1, seed=5).images[0], int),
    "answers": lambda engine: engine.ask(PHOTO, "what?", res=32, max_new_tokens=3).ids,
}


@pytest.mark.filterwarnings("ignore:out of memory")
@pytest.mark.parametrize("task", SMALL)
def test_a_failure_at_any_operation_changes_nothing(under, fails_at, task):
    """200 points in all: 100 over each request, every second one where parts have to come and go."""
    with ThreadPoolExecutor(1) as pool:  # a fault may hit what ends torch's inference mode, which is a thread's own
        pool.submit(fail_everywhere, under(2**40), SMALL[task], fails_at).result()


def fail_everywhere(engine, run, fails_at):
    refused = []
    expected = run(engine)
    tight = int(0.6 * engine.placing.placement.peak)
    for turn, budget in enumerate((2**40, tight)):
        engine.placing.budget = budget
        run(engine)
        with fails_at() as whole:
            run(engine)
        for point in range(50):
            engine.placing.budget, at = budget, 1 + (2 * point + turn) * whole.count // 100
            try:
                with fails_at(at) as fault:
                    found = run(engine)
            except BudgetError:
                refused.append(at / whole.count)
                continue
            assert fault.count > whole.count, "it was done again"
            assert np.abs(np.subtract(found, expected)).max() <= 1, at
    assert np.abs(np.subtract(run(engine), expected)).max() <= 1
    assert all(share > 0.97 for share in refused), "only a picture that is on its way down cannot be made again"
