"""An engine under a budget: the same pictures and answers, whatever has to wait in the host's memory."""

import gc
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from unipic_run import Engine
from unipic_run.engine import budget, gpus, limits, loading
from unipic_run.engine.budget import overhead
from unipic_run.engine.errors import BudgetError, HostMemoryError, UsageError
from unipic_run.engine.gpus import GIB
from unipic_run.engine.transfer import room_of, tensors_of

HOW = {"res": 64, "steps": 3, "seed": 5}


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("UNIPIC_RUN_CACHE", str(tmp_path_factory.getbasetemp() / "placing"))


def photo():
    y, x = np.mgrid[:64, :64]
    return Image.fromarray(np.stack([4 * x, 4 * y, 2 * (x + y)], axis=-1).astype(np.uint8))


def same(made, expected):
    """To a level: decoding in bands rounds elsewhere."""
    return np.abs(np.asarray(made, int) - np.asarray(expected, int)).max() <= 1


@pytest.mark.filterwarnings("ignore::unipic_run.engine.errors.UnipicWarning")
def test_a_smaller_budget_moves_more_and_changes_nothing(tiny_engine, under):
    expected = tiny_engine.generate("a red fox", **HOW).images[0]
    night = tiny_engine.edit(photo(), "make it night", **HOW).images[0]
    answer = tiny_engine.ask(photo(), "what is this?", res=64, max_new_tokens=5).ids
    engine, lines = under(2**40), []
    for _ in range(30):
        try:
            made = engine.generate("a red fox", **HOW).images[0]
        except BudgetError:
            break
        lines.append(engine.placing.line)
        assert same(made, expected), lines[-1]
        engine.placing.budget = engine.placing.placement.peak - 1
    assert len(lines) >= 4 and lines[0].startswith("all resident") and "streamed" in lines[-1], lines
    engine.placing.budget = 2**40
    assert same(engine.edit(photo(), "make it night", **HOW).images[0], night)
    engine.placing.budget = engine.placing.placement.peak * 3 // 4
    assert same(engine.edit(photo(), "make it night", **HOW).images[0], night), engine.placing.line
    assert engine.ask(photo(), "what is this?", res=64, max_new_tokens=5).ids == answer
    assert not engine.placing.line.startswith("all resident")


def test_what_cannot_fit_says_what_could(under):
    engine = under(1000)
    with pytest.raises(BudgetError, match=r"GiB of GPU memory are the least.*--vram \d"):
        engine.generate("a red fox", **HOW)


@pytest.mark.parametrize("fails", ["loading.Source", "worker.Placing"])
def test_a_load_that_fails_leaves_torch_its_memory(tiny_release, monkeypatch, card, fails):
    said = []
    monkeypatch.setattr(budget, "bound_on", lambda device, vram: 6 * GIB)
    with Engine.from_pretrained(tiny_release, device="cpu", vram="auto", say=said.append) as engine:
        assert engine.placing.budget == overhead(gpus.card("rtx4090")).usable(6 * GIB) and len(card.limits) == 1
    assert any(line.startswith("vram auto: 6.00 GiB") for line in said)
    assert card.limits[1:] == [pytest.approx(24)], "when it is closed"
    forgotten = Engine.from_pretrained(tiny_release, device="cpu", vram="auto")
    forgotten.placing = None  # whose hooks are part of a cycle
    del forgotten
    gc.collect()
    assert card.limits[3:] == [pytest.approx(24)], "or forgotten"
    monkeypatch.setattr(f"unipic_run.engine.{fails}", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        Engine.from_pretrained(tiny_release, device="cpu", vram="auto")
    assert card.limits[5:] == [pytest.approx(24)]


@pytest.mark.filterwarnings("ignore::unipic_run.engine.errors.UnipicWarning")
@pytest.mark.parametrize("quant", ["none", "int8", "nf4"])
def test_what_a_task_does_not_use_is_dropped_and_read_again(tiny_release, monkeypatch, quant):
    if quant == "nf4":
        pytest.importorskip("bitsandbytes")
    monkeypatch.setattr(budget, "bound_on", lambda device, vram: 6 * GIB)
    monkeypatch.setattr(limits, "held_to", lambda device, bound: nullcontext(str))
    how, asked = {"device": "cpu", "quant": quant}, {"res": 64, "max_new_tokens": 4}
    with Engine.from_pretrained(tiny_release, **how) as plain:
        answer, picture = plain.ask(photo(), "what?", **asked).ids, plain.generate("a red fox", **HOW).images[0]
        night, whole = plain.edit(photo(), "make it night", **HOW).images[0], nbytes(plain)
    with Engine.from_pretrained(tiny_release, **how, vram=6, drop_idle=True) as engine:
        for _ in range(2):
            engine.placing.budget = 2**40
            engine.ask(photo(), "what?", **asked)
            engine.placing.budget = engine.placing.placement.peak - 1
            assert engine.ask(photo(), "what?", **asked).ids == answer
            idle = {name for name, where in engine.placing.placement.where.items() if where == "idle"}
            assert idle == engine.placing.mover.dropped and idle, engine.placing.line
            assert nbytes(engine) == whole - sum(p.nbytes for p in engine.placing.parts if p.name in idle)
            assert same(engine.generate("a red fox", **HOW).images[0], picture)
            assert same(engine.edit(photo(), "make it night", **HOW).images[0], night)


@pytest.mark.filterwarnings("ignore:64x64 is far")
def test_where_the_machine_itself_has_no_room_for_weights_no_more_of_them_go_there(under, monkeypatch):
    engine, places = under(2**40), []
    place = engine.placing.mover.place

    def full(found):
        places.append(found)
        raise MemoryError

    monkeypatch.setattr(engine.placing.mover, "place", full)
    with pytest.raises(HostMemoryError, match=r"RAM.*moving weights.*--drop-idle"):
        engine.ask(photo(), "what?", res=64, max_new_tokens=2)
    assert len(places) == 1
    monkeypatch.setattr(engine.placing.mover, "place", place)
    assert engine.ask(photo(), "what?", res=64, max_new_tokens=2).ids


def test_drop_idle_needs_a_bound(tiny_release):
    with pytest.raises(UsageError, match=r"drop_idle has no effect without vram.*--vram auto"):
        Engine.from_pretrained(tiny_release, device="cpu", drop_idle=True)


def test_what_is_free_is_asked_behind_the_pull(tiny_release, monkeypatch):
    order, resolve = [], loading.hub.resolve
    monkeypatch.setattr(budget, "bound_on", lambda device, vram: order.append(f"vram {vram}"))
    monkeypatch.setattr(loading.hub, "resolve", lambda *a, **how: order.append("pull") or resolve(*a, **how))
    for vram in ("auto", 6):
        Engine.from_pretrained(tiny_release, device="cpu", vram=vram).close()
    assert order == ["pull", "vram auto", "vram 6", "pull"], "a wrong number is refused before anything is fetched"


def test_the_longest_question_is_the_one_of_most_tokens(under, monkeypatch):
    engine, asked = under(2**40), []
    short, long = "\u6f22\u5b57\u6f22\u5b57", "Describe this image"
    count = {text: len(engine.loaded.tokens.encode(text)) for text in (short, long)}
    assert len(short) < len(long) and count[short] > count[long]
    answers = engine.placing.answers
    monkeypatch.setattr(
        engine.placing, "answers", lambda side, text, limit: asked.append(text) or answers(side, text, limit)
    )
    engine.ask(photo(), [long, short], res=64, max_new_tokens=2)
    assert asked == [short]


def test_graphs_are_forgotten_before_weights_move(under, monkeypatch):
    engine, seen = under(2**40), []
    graphs, place = engine.loaded.model.graphs, engine.placing.mover.place
    graphs._held["round", 1] = torch.ones(2)
    monkeypatch.setattr(engine.placing.mover, "place", lambda found: seen.append(graphs.holds) or place(found))
    engine.ask(photo(), "what?", res=64, max_new_tokens=2)
    assert seen == [False]


def test_parts_that_come_and_go_take_graphs_with_them_that_answer(under):
    engine = under(2**40)
    engine.ask(photo(), "what?", res=64, max_new_tokens=2)
    graphs, placing = engine.loaded.model.graphs, engine.placing
    asked = placing.placement
    engine.generate("a red fox", **HOW)
    drawn = placing.placement
    for found, part, forgotten in (
        (asked, "embed", True),
        (asked, "llm", True),
        (asked, "mar_encoder", False),
        (drawn, "embed", False),
        (drawn, "mar_encoder", True),
    ):
        graphs._held["round", 1] = (torch.ones(2),)
        placing.placement = replace(found, where={**found.where, part: "staged"})
        placing._left(part)
        assert graphs.holds is not forgotten, part
    for found, part, refused in (
        (asked, "llm", {"token"}),
        (asked, "mar_encoder", set()),
        (drawn, "llm", {"round"}),
        (drawn, "embed", set()),
    ):
        placing.placement = replace(found, where={**found.where, part: "streamed"})
        placing._forget_graphs()
        assert graphs.failed.keys() == refused, part


def nbytes(engine):
    """Of weights in memory, as packs count them."""
    return sum(room_of(x) for *_, x in tensors_of(engine.loaded.model.modules()) if not x.is_meta)
