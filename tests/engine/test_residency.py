"""Placements against an exhaustive search, and the released model's figures against the sizes that were promised."""

import itertools
import random
import time
from dataclasses import replace

import pytest
from unipic_run.engine.residency import Bands, DoesNotFit, Part, Placement, Stage, Work, describe, fit, smaller

GIB = 2**30
LLM, ENCODER, DECODER, HEAD = 2.441, 0.736, 0.741, 0.282
SHARES = {"llm": 0.25, "mar_encoder": 0.06, "mar_decoder": 0.39}  # of the seconds of a round, by the dry run


def gib(amount: float) -> int:
    return round(amount * GIB)


def unipic(precision: str, shares: dict[str, float] | None = None) -> Work:
    """One picture at 1024x1024 in 32 rounds with guidance on an RTX 4090, of UniPic 1.0."""
    half, seconds = (0.5, 2.6) if precision == "int8" else (1.0, 6.5)
    own = {name: share * seconds for name, share in (shares or {}).items()}
    parts = (
        Part("vae_encoder", gib(0.053)),
        Part("vae_decoder", gib(0.071)),
        Part("embed", gib(0.435)),
        Part("llm", gib(LLM * half), gib(LLM * half), gib(LLM * half / 28)),
        Part("mar_encoder", gib(ENCODER * half), gib(ENCODER * half * 0.98), gib(ENCODER * half * 0.98 / 20)),
        Part("mar_decoder", gib(DECODER * half), gib(DECODER * half * 0.97), gib(DECODER * half * 0.97 / 20)),
        Part("head", gib(HEAD * half)),
        Part("proj_in", gib(0.008)),
        Part("proj_out", gib(0.008)),
    )
    sampled = ("mar_encoder", "proj_in", "llm", "proj_out", "mar_decoder", "head")
    stages = (
        Stage("condition", ("embed", "llm"), gib(0.004), 0.01, passes=2, lookups=frozenset({"embed"})),
        Stage("sample", sampled, gib(0.56), seconds, passes=32, shares=own),
        Stage("decode", ("vae_decoder",), gib(1.25), 0.03, bands=Bands(gib(0.4), 0.05)),
    )
    return Work(parts, {1: stages})


def generates_resident(placement: Placement) -> bool:
    """Whether all that making a picture needs stays on the card."""
    return {name for name, where in placement.where.items() if where != "resident"} <= {"embed", "vae_encoder"}


def test_a_picture_in_bf16_and_int8_resident_within_the_promised_memory() -> None:
    for precision, promised in (("none", 5.5), ("int8", 3.2)):
        placement = fit(unipic(precision), gib(promised))
        assert generates_resident(placement) and placement.peak <= gib(promised), describe(placement)
        assert placement.banded == ("decode",)
    everything = fit(unipic("none"), gib(22))
    assert set(everything.where.values()) == {"resident"} and not everything.banded
    assert describe(everything) == "all resident; 6.0 of 22.0 GiB, about 6.5 s"


@pytest.mark.parametrize("shares", [{}, SHARES])
def test_a_picture_in_int8_within_one_and_a_half_gib_takes_at_most_twice_as_long(shares: dict[str, float]) -> None:
    work = unipic("int8", shares)
    placement, resident = fit(work, gib(1.5)), fit(work, gib(22))
    assert placement.peak <= gib(1.5) and placement.seconds <= 2 * resident.seconds, describe(placement)
    assert placement.where["llm"] == "streamed" and placement.where["embed"] == "host"
    assert describe(placement).endswith(f" of 1.5 GiB, about {placement.seconds:.1f} s")
    # Half of 1.5 GiB is still enough, for those who wait.
    with pytest.raises(DoesNotFit) as refused:
        fit(work, gib(0.5))
    least = refused.value.smallest
    assert gib(0.5) < least.peak < gib(0.9) and fit(work, least.peak).peak == least.peak


def test_stepping_down_gets_smaller_each_time_and_ends_at_the_smallest() -> None:
    work = unipic("none")
    seen = [fit(work, gib(22))]
    with pytest.raises(DoesNotFit) as refused:
        while True:
            seen.append(smaller(work, seen[-1]))
    assert all(after.peak < before.peak for before, after in itertools.pairwise(seen))
    assert refused.value.smallest.peak == seen[-1].peak and 5 < len(seen) < 40
    assert {placement.budget for placement in seen} == {gib(22)}


def test_planning_takes_no_time() -> None:
    for precision in ("none", "int8"):
        work, taken = unipic(precision, SHARES), {}
        work = replace(work, images=4, batches={n: tuple(scaled(s, n) for s in work.batches[1]) for n in (1, 2, 4)})
        for budget in (1.25, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 9.0):
            start = time.process_time()
            fit(work, gib(budget))
            taken[budget] = time.process_time() - start
        assert max(taken.values()) < 0.1, taken


def scaled(stage: Stage, images: int) -> Stage:
    """Of a batch, which takes a little less than so many times as long."""
    shares = {name: seconds * images * 0.9 for name, seconds in stage.shares.items()}
    return replace(stage, activation=stage.activation * images, seconds=stage.seconds * images * 0.9, shares=shares)


def test_images_are_made_together_where_that_fits_and_in_turn_where_it_does_not() -> None:
    work = unipic("int8")
    work = replace(work, images=4, batches={n: tuple(scaled(s, n) for s in work.batches[1]) for n in (1, 2, 4)})
    together, apart = fit(work, gib(9)), fit(work, gib(2.9))
    assert together.at_once == 4 and not together.split
    assert apart.at_once == 1 and apart.split and "one image at a time" in describe(apart)
    assert apart.seconds > together.seconds


def test_what_cannot_leave_stays_and_what_no_stage_needs_is_idle_where_room_is_short() -> None:
    parts = (Part("fixed", 100, fixed=True), Part("free", 100), Part("unused", 100))
    stages = (Stage("one", ("fixed",), 10, 1.0), Stage("two", ("free",), 10, 1.0))
    work = Work(parts, {1: stages}, link=1e4)
    assert set(fit(work, 310).where.values()) == {"resident"}
    assert fit(work, 309).where == {"fixed": "resident", "free": "resident", "unused": "idle"}
    with pytest.raises(DoesNotFit) as refused:
        fit(work, 209)
    assert refused.value.smallest.peak == 210


def test_the_next_stage_is_brought_early_where_that_does_not_raise_the_peak() -> None:
    parts = Part("a", 100), Part("b", 60)
    for activation, early in ((90, {"three"}), (91, set())):
        stages = Stage("one", ("a",), 150, 1.0), Stage("two", ("a",), activation, 1.0), Stage("three", ("b",), 151, 1.0)
        placement = fit(Work(parts, {1: stages}, link=1e9), 250)
        assert placement.stages == {"one": ("a",), "two": ("a",), "three": ("b",)} and placement.early == early
        assert placement.peaks == {"one": 250, "two": 250 if early else 191, "three": 211}


def test_the_search_misses_nothing() -> None:
    """Against all combinations, with ties in time broken the same way."""
    for seed in range(60):
        rng = random.Random(seed)
        work = anything(rng)
        peaks = sorted({peak for peak, *_ in everything(work)})
        for budget in rng.sample(peaks, min(4, len(peaks))):
            found, fitting = fit(work, budget), [one for one in everything(work) if one[0] <= budget]
            limit = 1.02 * min(seconds for _, seconds, _ in fitting)
            effort, seconds = min((effort, seconds) for _, seconds, effort in fitting if seconds <= limit)
            moved = sum(where != "resident" for where in found.where.values())
            assert (moved, found.apart, bool(found.banded)) == effort and found.seconds == pytest.approx(seconds), (
                f"seed {seed}"
            )
            assert found.peak <= budget
        with pytest.raises(DoesNotFit):
            fit(work, peaks[0] - 1)


def anything(rng: random.Random) -> Work:
    names = "abcd"
    parts = [Part(name, size := rng.randint(20, 100), size - 10, rng.choice([1, 3])) for name in names[:3]]
    parts.append(Part("d", rng.randint(20, 100)))
    stages = [
        Stage(
            f"stage {index}",
            tuple(rng.sample(names, rng.randint(1, 3))),
            rng.randint(0, 100),
            rng.choice([0.5, 1.0, 3.0]),
            passes=rng.choice([1, 8]),
            bands=Bands(rng.randint(0, 50), 3.5) if rng.random() < 0.5 else None,
        )
        for index in range(3)
    ]
    apart = tuple(replace(stage, activation=stage.activation // 2, seconds=1.5 * stage.seconds) for stage in stages)
    return Work(tuple(parts), {1: tuple(stages)}, apart if rng.random() < 0.5 else (), link=100.0)


def everything(work: Work) -> list[tuple[int, float, tuple[int, bool, bool]]]:
    """(peak, seconds, effort) of every placement, written down anew from what the words mean."""
    both = [(False, work.batches[1])] + [(True, work.apart)] * bool(work.apart)
    return [found for apart, stages in both for found in every_home(work, stages, apart)]


def every_home(work: Work, stages: tuple[Stage, ...], apart: bool) -> list[tuple[int, float, tuple[int, bool, bool]]]:
    made = []
    kinds = {
        part.name: [
            kind
            for kind in (("resident", "staged", "streamed") if part.stack else ("resident", "staged"))
            if kind == "resident" or any(part.name in stage.needs for stage in stages)
        ]
        + ["idle"] * all(part.name not in stage.needs for stage in stages)
        for part in work.parts
    }
    for homes in itertools.product(*kinds.values()):
        for bands in {False, any(stage.bands for stage in stages)}:
            peak, seconds, here = 0, 0.0, set()
            for stage in stages:
                banded = bands and stage.bands
                memory, transfers = stage.bands.activation if banded else stage.activation, 0.0
                for part, home in zip(work.parts, homes, strict=True):
                    needed = part.name in stage.needs
                    if home == "resident" or (home == "staged" and needed):
                        memory += part.nbytes
                    if home == "streamed" and needed:
                        memory += part.nbytes - part.stack + 2 * part.layer
                        transfers += stage.passes * part.stack / work.link
                    if home in ("staged", "streamed") and needed and part.name not in here:
                        seconds += (part.nbytes - (part.stack if home == "streamed" else 0)) / work.link
                here = set(stage.needs)
                peak = max(peak, memory)
                seconds += max(transfers, stage.bands.seconds if banded else stage.seconds)
            made.append((peak, seconds, (sum(home != "resident" for home in homes), apart, bool(bands))))
    return made
