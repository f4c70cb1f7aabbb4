"""An engine under a budget: the same pictures and answers, whatever has to wait in the host's memory."""

import numpy as np
import pytest
import torch
from PIL import Image
from unipic_run import Engine
from unipic_run.engine.errors import BudgetError, UnipicWarning, UsageError
from unipic_run.engine.placing import as_vram, budget_on
from unipic_run.quant.recipe import NONE

CPU = torch.device("cpu")
HOW = {"res": 64, "steps": 3, "seed": 5}


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("UNIPIC_RUN_CACHE", str(tmp_path_factory.getbasetemp() / "placing"))


@pytest.fixture
def under(tiny_release):
    """An engine of the tiny model that may take so many bytes of its device, here the CPU."""
    engines = []

    def make(budget):
        with Engine.from_pretrained(tiny_release, device="cpu") as plain:
            loaded = plain.loaded
        engine = Engine(loaded.family, loaded.model, loaded.tokens, "tiny", NONE, CPU, budget)
        engines.append(engine)
        return engine

    yield make
    for engine in engines:
        engine.close()


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


@pytest.mark.filterwarnings("ignore:64x64 is far")
def test_out_of_memory_goes_on_in_less_and_finishes(tiny_engine, under, monkeypatch):
    engine, seen = under(2**40), []
    family = engine.loaded.family
    decode = family.decode

    def fails_at_first(*arguments, bands=False, **options):
        seen.append(bands)
        if len(seen) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory, says the test")
        return decode(*arguments, bands=bands, **options)

    engine.generate(["a red fox", "a lamp"], batch_size=2, **HOW)  # what it needs is known now
    monkeypatch.setattr(family, "decode", fails_at_first)
    with pytest.warns(UnipicWarning, match="out of memory: going on with"):
        made = engine.generate(["a red fox", "a lamp"], batch_size=2, **HOW)
    monkeypatch.undo()
    single = [tiny_engine.generate(prompt, **HOW).images[0] for prompt in ("a red fox", "a lamp")]
    assert all(
        np.abs(np.asarray(a, int) - np.asarray(b, int)).max() <= 1 for a, b in zip(made.images, single, strict=True)
    )


def test_what_cannot_fit_says_what_could(under):
    engine = under(1000)
    with pytest.raises(BudgetError, match=r"GiB of GPU memory are the least.*--vram \d"):
        engine.generate("a red fox", **HOW)


def test_amounts_of_memory():
    assert as_vram("8") == as_vram("8GiB") == as_vram(8) == 8 * 2**30 and as_vram("7.5 gb") == int(7.5 * 2**30)
    for wrong in ("", "0", "-1", "8 MiB", "1e3", "all"):
        with pytest.raises(UsageError, match="no amount of memory"):
            as_vram(wrong)
    with pytest.raises(UsageError, match="bounds what a GPU"):
        budget_on(CPU, 2**33)
