"""Every family offers what the engine calls, and its table of needs names parts that exist."""

import inspect
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
import torch
from unipic_run import Engine
from unipic_run.engine import families
from unipic_run.engine.checkpoint.convert import convert
from unipic_run.engine.noise import PhiloxNoise
from unipic_run.engine.request import FITS, POSTERIORS
from unipic_run.engine.sampling import SHORTCUTS, SPED, SPEEDS
from unipic_run.engine.task import Batch, Task
from unipic_run.engine.verbs import Verbs

ANSWERING = (
    "look_to_answer",
    "read_image",
    "question_ids",
    "next_logits",
    "question_size",
    "question_picture",
    "check_question",
)


@pytest.mark.parametrize("name", families.FAMILIES)
def test_families_have_the_verbs(name: str) -> None:
    module = families.model(name)
    skipped = () if "ask" in module.kinds else ANSWERING
    for verb, wanted in vars(Verbs).items():
        if inspect.isfunction(wanted) and not verb.startswith("_") and verb not in skipped:
            expected = [p for p in inspect.signature(wanted).parameters if p != "self"]
            assert list(inspect.signature(getattr(module, verb)).parameters) == expected, verb
    assert isinstance(module.IMAGE, str)
    speeds = module.speeds(families.architecture(name)[1])
    assert [*speeds] == [speed for speed in SPEEDS if speed != "exact"]
    assert {field for chosen in speeds.values() for field in chosen} <= set(SPED)  # which --from decides anew


def test_an_architecture_is_found_as_a_model_is(
    tiny_release: Path, tiny_deepgen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, row in families.FAMILIES.items():
        assert families.architecture(row.hub) == families.architecture(name)
    listed = convert(tiny_release, tmp_path / "models" / "mine")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("UNIPIC_RUN_CACHE", str(tmp_path))
    found = families.architecture(str(tiny_release))
    assert found == families.architecture(str(listed)) == families.architecture("~/models/mine")
    assert found == families.architecture("mine") != families.architecture("unipic")
    for name in ("mine", "pocket"):  # a folder wins over a listed name, a short name over a folder
        copytree(tiny_deepgen, name)
    assert families.architecture("mine")[0].name == "deepgen" and families.architecture("pocket")[0].name == "unipic"


@pytest.mark.parametrize(
    ("name", "speed", "chosen"),
    [
        ("unipic", "balanced", {"head_steps": (40, 10), "cfg_cache": 2.0}),
        ("unipic", "fast", {"steps": 24, "head_steps": (20, 10), "order": "gtr", "cfg_cache": 2.0}),
        ("deepgen", "balanced", {"steps": 28}),
        ("deepgen", "fast", {"steps": 18}),
        ("unipic2-kontext", "fast", {"steps": 18}),
    ],
)
def test_speeds_are_what_their_price_was_measured_of(name: str, speed: str, chosen: dict) -> None:
    """docs/speed.md has it."""
    assert families.model(name).speeds(families.architecture(name)[1])[speed] == chosen


def test_speeds_are_shares_of_what_a_small_model_takes() -> None:
    config = families.architecture("unipic")[1]
    small = replace(config, rounds=1, head=replace(config.head, steps=1))
    assert families.model("unipic").speeds(small)["fast"] == {
        "steps": 1,
        "head_steps": (1, 1),
        "order": "gtr",
        "cfg_cache": 2.0,
    }


@pytest.mark.parametrize("name", families.FAMILIES)
def test_stages_in_front_of_the_first_step_are_verbs(name: str) -> None:
    module = families.model(name)
    for kind in module.kinds:
        stages, last = [*module.needs(kind)], ["answer"] if kind == "ask" else ["sample", "decode"]
        before = stages[: -len(last)]
        assert stages[-len(last) :] == last and before[-1] == "condition"
        assert kind != "ask" or before == ["look", "condition"]
        for stage in before if kind != "ask" else ():
            assert len(inspect.signature(getattr(module, stage)).parameters) == 5, stage
    assert set(module.fits) <= set(FITS) and module.most_sources >= 1
    assert set(module.shortcuts) <= set(SHORTCUTS)
    assert module.posteriors and set(module.posteriors) <= set(POSTERIORS)


def parts_that_run(model: torch.nn.Module, work: Callable[[], Any]) -> tuple[set[str], Any]:
    ran: set[str] = set()
    hooks = [part.register_forward_hook(lambda *_, name=name: ran.add(name)) for name, part in model.named_children()]
    try:
        with torch.inference_mode():
            return ran, work()
    finally:
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize("kind", ["generate", "edit", "inpaint"])
def test_needs_are_the_parts_that_run(kind: str, tiny_engine: Engine) -> None:
    """Residency relies on it. Hooks see calls of a part itself, not of the methods `llm.extend` and `head.sample`."""
    family, model, tokens = tiny_engine.loaded.family, tiny_engine.loaded.model, tiny_engine.loaded.tokens
    needs = {stage: set(parts) for stage, parts in family.needs(kind).items()}
    sources = () if kind == "generate" else (torch.zeros(1, 3, 64, 64),)
    cells = torch.ones(4, 4, dtype=torch.bool) if kind == "inpaint" else None
    task = Task(kind, 4, 4, 2, 3.0, "constant", 1.0, sources=sources, cells=cells)
    batch, state = Batch(["a cat"], [PhiloxNoise(1)]), None
    rounds = family.schedule(model.config, task, batch)

    for stage in [*needs][:-2]:
        verb = partial(getattr(family, stage), model, tokens, task, batch, state)
        ran, state = parts_that_run(model, verb)
        assert ran | ({"llm"} if stage == "condition" else set()) == needs[stage], stage
    ran, latents = parts_that_run(model, lambda: list(family.sample(model, state, task, batch, rounds))[-1])
    assert ran | {"head"} == needs["sample"]
    ran, _ = parts_that_run(model, lambda: family.decode(model, latents, 4, 4))
    assert ran == needs["decode"]


def test_of_a_question_too(tiny_engine: Engine) -> None:
    family, model, tokens = tiny_engine.loaded.family, tiny_engine.loaded.model, tiny_engine.loaded.tokens
    needs = {stage: set(parts) for stage, parts in family.needs("ask").items()}
    ran, seen = parts_that_run(model, lambda: family.look_to_answer(model, torch.zeros(1, 3, 64, 64)))
    assert ran == needs["look"]
    ran, cache = parts_that_run(model, lambda: family.read_image(model, tokens, seen, spare=2))
    assert ran | {"llm"} == needs["condition"]
    ran, _ = parts_that_run(model, lambda: family.next_logits(model, cache, [1, 2]))
    assert ran | {"llm"} == needs["answer"]
