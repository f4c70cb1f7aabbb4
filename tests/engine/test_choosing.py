"""`quant="auto"`: which precision a card of some size gets, and what is said about it."""

from dataclasses import replace

import pytest
import torch
from unipic_run import Engine
from unipic_run.engine import choosing, families, loading
from unipic_run.engine.budget import CONTEXT, overhead
from unipic_run.engine.checkpoint.convert import convert
from unipic_run.engine.choosing import Blueprint, choose, least_whole, scheme_for
from unipic_run.engine.errors import UsageError
from unipic_run.engine.estimate import RoughTokens
from unipic_run.engine.gpus import CARDS, GIB
from unipic_run.engine.layers.attention import Attention
from unipic_run.engine.models.unipic.config import RELEASED
from unipic_run.engine.outline import task_of
from unipic_run.engine.request import Largest

CARD, CPU = CARDS["rtx4090"], torch.device("cpu")
BESIDE = overhead(CARD)


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("UNIPIC_RUN_CACHE", str(tmp_path_factory.getbasetemp() / "choosing"))


@pytest.fixture
def plan():
    """The released model, asked for pictures that are soon planned: memory is nearly all weights."""
    config = replace(RELEASED, resolution=256, rounds=2)
    return Blueprint("unipic", families.model("unipic"), config, RoughTokens(), torch.bfloat16, Attention(), Largest())


def without_bitsandbytes(monkeypatch):
    monkeypatch.setattr(choosing, "has_bitsandbytes", lambda: False)


@pytest.mark.parametrize("moving", [True, False])
def test_the_first_that_fits_is_taken(plan, monkeypatch, moving):
    without_bitsandbytes(monkeypatch)
    least = {scheme: BESIDE.needed(least_whole(plan, scheme, CARD, moving)) for scheme in ("none", "int8")}
    assert least["int8"] < 0.65 * least["none"]
    for scheme, gib in least.items():
        just, short = int(gib * GIB) + 2**20, int((gib - 0.02) * GIB)
        chosen, why = choose(plan, CARD, BESIDE, just, moving)
        assert chosen == scheme and f"{gib:.2f} in {'bf16' if scheme == 'none' else scheme}" in why
        assert choose(plan, CARD, BESIDE, short, moving)[0] == "int8", "whatever does not fit"
    said = choose(plan, CARD, BESIDE, 2 * GIB, moving)[1]
    assert said.startswith("256x256 takes") and "of the 2.00 GiB that may be used" in said
    assert said.endswith("layers come when they are needed" if moving else "vram auto lets weights wait on the host")


def test_without_a_budget_everything_has_to_be_there_at_once(plan):
    for scheme in ("none", "int8"):
        assert least_whole(plan, scheme, CARD, moving=False) > least_whole(plan, scheme, CARD, moving=True) + 0.4 * GIB


def test_the_largest_request_that_is_declared_decides(plan, monkeypatch):
    without_bitsandbytes(monkeypatch)
    one = needed_for(plan)
    assert needed_for(plan, n=4) > one and needed_for(plan, size=(512, 512)) > one
    assert needed_for(plan, task="edit") > one > needed_for(plan, task="ask"), "which needs neither decoder nor head"
    assert needed_for(plan, steps=1) >= one, "all tokens in one round"
    assert needed_for(plan, True, previews=True) > needed_for(plan, True), "a decoder beside the sampler"
    between = int((one + needed_for(plan, n=4)) / 2 * GIB)
    assert choose(plan, CARD, BESIDE, between, moving=False)[0] == "none"
    chosen, why = choose(replace(plan, largest=Largest(n=4)), CARD, BESIDE, between, moving=False)
    assert chosen == "int8" and why.startswith("4 pictures of 256x256 take ")
    for largest, said in (
        (Largest(), "256x256 takes"),
        (Largest("edit", (512, 256)), "an edit of 512x256 takes"),
        (Largest("edit", n=2), "2 edits of 256x256 take"),
        (Largest("ask", (512, 512)), "a question about 512x512 takes"),
    ):
        assert choosing.told(largest, plan.config) == said


def test_an_edit_has_as_many_sources_as_were_declared():
    family, config = families.model("deepgen"), families.architecture("deepgen")[1]
    task = task_of(Largest("edit", (96, 64), sources=3), family, config, torch.bfloat16)
    assert len(task.sources) == 3 and {source.shape for source in task.sources} == {(1, 3, 64, 96)}
    unipic = families.model("unipic")
    assert len(task_of(Largest("edit", sources=3), unipic, RELEASED, torch.bfloat16).sources) == 1, "it takes no more"


def needed_for(plan, moving=False, **how):
    return BESIDE.needed(least_whole(replace(plan, largest=Largest(**how)), "none", CARD, moving))


def test_an_engine_hears_of_the_largest_request(tiny_release, monkeypatch):
    heard = []
    monkeypatch.setattr(loading, "scheme_for", lambda plan, *_: heard.append(plan.largest) or "none")
    declared = {"task": "edit", "res": 128, "n": 2, "steps": 4, "previews": True}
    for largest in (None, declared, {"size": (64, 32)}):
        Engine.from_pretrained(tiny_release, device="cpu", quant="auto", largest=largest).close()
    assert heard == [Largest(), Largest("edit", (128, 128), 2, 4, True), Largest(size=(64, 32))]
    for wrong, why in (({"tasks": 1}, "known are task"), ({"res": 100}, "multiple of 16"), ({"n": 0}, "n 0 is out")):
        with pytest.raises(UsageError, match=why):
            Engine.from_pretrained(tiny_release, device="cpu", largest=wrong)


def test_nf4_is_the_last_resort_where_bitsandbytes_is_there(plan, monkeypatch):
    pytest.importorskip("bitsandbytes")
    whole = {scheme: least_whole(plan, scheme, CARD, moving=True) for scheme in ("int8", "nf4")}
    weights = 0.5 * 2.441 + 0.5 * 0.736 + 0.5 * 0.741  # GiB in int8 of the stacks alone
    assert 0.5 * weights * GIB < whole["nf4"] < 0.7 * whole["int8"]
    between = int(BESIDE.needed((whole["nf4"] + whole["int8"]) // 2) * GIB)
    assert choose(plan, CARD, BESIDE, between, moving=True)[0] == "nf4"
    assert choose(plan, CARD, BESIDE, int(1.2 * GIB), moving=True)[0] == "int8"
    without_bitsandbytes(monkeypatch)
    assert choose(plan, CARD, BESIDE, between, moving=True)[0] == "int8"


def test_on_a_gpu_it_asks_what_is_free_or_the_bound(plan, monkeypatch):
    asked = []
    monkeypatch.setattr(choosing, "card_of", lambda device: CARD)
    monkeypatch.setattr(
        choosing, "choose", lambda plan, card, beside, may, moving: asked.append((may, moving)) or ("int8", "so")
    )
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: type("", (), {"total_memory": 24 * GIB}))
    said = []
    for bound, free in ((None, 24 * GIB), (None, 9 * GIB), (6 * GIB, 9 * GIB)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, 24 * GIB))
        assert scheme_for(plan, torch.device("cuda", 0), bound, "none", said.append) == "int8"
    assert asked == [(24 * GIB, False), (9 * GIB + CONTEXT, False), (6 * GIB, True)], "what is free, not the card"
    assert said == ["quant auto: int8, so"] * 3


def test_a_stored_precision_stays_and_a_cpu_takes_none(tiny_release, tmp_path):
    said = []
    folder = convert(tiny_release, tmp_path / "int8", quant="int8")
    for model, expected in ((tiny_release, "none"), (folder, "int8")):
        with Engine.from_pretrained(model, device="cpu", quant="auto", vram="auto", say=said.append) as engine:
            assert engine.quant == expected and engine.placing is None
            picture = engine.generate("a red fox", size=(128, 128), steps=1)
        assert picture.settings[0].get("quant", "none") == expected
    assert [line for line in said if "auto" in line] == [
        "quant auto: none, on the cpu",
        "quant auto: int8, as the checkpoint is stored",
    ]
