"""Prompts, scenes and their split: what is asked holds, seeds decide, and training keeps off what is held out."""

from collections import Counter
from dataclasses import replace
from itertools import combinations
from math import dist

import numpy as np
import pytest
from unipic_run.pocket.layout import EDGE, GAP, lay_out
from unipic_run.pocket.painter import paint
from unipic_run.pocket.phrases import phrase
from unipic_run.pocket.samples import CATEGORIES, propose, reworded, sample
from unipic_run.pocket.scenes import (
    BACKGROUNDS,
    COLOURS,
    PLACES,
    RELATIONS,
    SHAPES,
    SIDE,
    Figure,
    Group,
    Scene,
    Spec,
    broken,
    exact,
)
from unipic_run.pocket.split import held_out, held_out_combination, named, shown

DRAWN = 150  # samples a category


@pytest.fixture(scope="module", params=["train", "test"])
def drawn(request):
    rng = np.random.default_rng(5)
    return request.param, [sample(rng, category, request.param) for category in CATEGORIES for _ in range(DRAWN)]


def test_every_scene_meets_its_spec_and_nothing_touches(drawn):
    for one in drawn[1]:
        assert not broken(one.scene, one.spec), one
        assert not broken(one.scene, exact(one.scene))
        for a, b in combinations(one.scene.figures, 2):
            assert dist((a.x, a.y), (b.x, b.y)) >= a.reach + b.reach + GAP - 1e-6
        for f in one.scene.figures:
            assert min(f.x, f.y) - f.reach >= EDGE - 1e-6 and max(f.x, f.y) + f.reach <= SIDE - EDGE + 1e-6


def test_training_neither_names_nor_shows_what_is_held_out_and_every_test_prompt_names_it(drawn):
    split, samples = drawn
    for one in samples:
        assert held_out(one.spec) is (split == "test"), one.prompt
        if split == "train":
            assert not any(map(held_out_combination, shown(one.scene))), one.prompt
    assert all(len({s.prompt for s in samples if s.category == category}) >= 50 for category in CATEGORIES)


def test_pictures_described_otherwise_are_still_what_is_said_and_nothing_held_out():
    rng, bare = np.random.default_rng(3), set()
    for category in CATEGORIES:
        for _ in range(DRAWN):
            one = sample(rng, category, "train")
            other = reworded(one, rng)
            assert not held_out(other) and not broken(one.scene, other), (one.prompt, phrase(other, rng))
            if category == "two objects":
                bare |= {group.shape for group in other.groups if group.colour is None}
    assert bare == {*SHAPES}, "circles and crosses among them, which in no other such prompt go without their colour"


def test_training_holds_every_primitive():
    rng = np.random.default_rng(1)
    seen = Counter(
        value
        for category in CATEGORIES
        for _ in range(300)
        for c in named(sample(rng, category, "train").spec)
        for value in c
    )
    assert {*SHAPES, *COLOURS, *PLACES, *RELATIONS, "and", 1, 2, 3, 4} <= set(seen)
    assert min(seen[value] for value in (*SHAPES, *COLOURS, *PLACES, *RELATIONS)) >= 10


def test_groups_are_several_objects_in_a_relation():
    drawn = [sample(np.random.default_rng(i), "groups", "train") for i in range(200)]
    counts = Counter(tuple(group.count for group in one.spec.groups) for one in drawn)
    assert set(counts) == {(2, 1), (1, 2), (2, 2), (3, 1), (1, 3)} and min(counts.values()) >= 10
    assert all(one.spec.relation for one in drawn)


def test_a_fifth_is_held_out_evenly():
    links = (None, "and", *RELATIONS, *PLACES)
    every = [(s, c, link, n) for s in SHAPES for c in COLOURS for link in links for n in (1, 2, 3, 4)]
    out = [combination for combination in every if held_out_combination(combination)]
    assert abs(len(out) / len(every) - 0.2) < 0.01
    for axis, values in enumerate((SHAPES, COLOURS, links, (1, 2, 3, 4))):
        for value in values:
            share = sum(c[axis] == value for c in out) / sum(c[axis] == value for c in every)
            assert 0.18 < share < 0.22, f"{share:.3f} of {value} is held out"


def test_the_split_of_a_prompt_does_not_hang_on_sizes_order_or_background():
    a, b = Group("star", "blue", count=2), Group("ring", "yellow")
    small = Group("star", "blue", "small", count=2)
    same = [Spec((a, b), "above"), Spec((b, a), "below"), Spec((small, b), "above", "black")]
    assert len({frozenset(named(spec)) for spec in same}) == 1


def test_the_seed_decides():
    def drawing(seed):
        rng = np.random.default_rng(seed)
        samples = [sample(rng, category, "train") for category in CATEGORIES]
        return [s.prompt for s in samples], [paint(s.scene).tobytes() for s in samples]

    assert drawing(3) == drawing(3) != drawing(4)


def test_one_prompt_has_many_pictures():
    rng = np.random.default_rng(0)
    circles = [
        s.scene
        for s in (sample(rng, "single object", "train") for _ in range(1500))
        if s.spec == Spec((Group("circle"),))
    ]
    looks = [scene.figures[0].look for scene in circles]
    held = {colour for colour in COLOURS if held_out_combination(("circle", colour, "middle", 1))}
    assert {look[1] for look in looks} == set(COLOURS) - held and {look[3] for look in looks} == {"middle"}
    assert {scene.background for scene in circles} == set(BACKGROUNDS)
    spots = np.array([(scene.figures[0].x, scene.figures[0].y, scene.figures[0].radius) for scene in circles])
    assert (np.ptp(spots, axis=0) > (3, 3, 1)).all()


def test_a_composition_follows_the_order_of_the_prompt():
    rng = np.random.default_rng(0)
    ring, star, cross = Group("ring"), Group("star", place="left"), Group("cross", count=2)

    def places(*groups, relation=None):
        scene = lay_out(Spec(groups, relation), rng, compose=True)
        return [(figure.shape, figure.place) for figure in scene.figures]

    assert places(ring, replace(star, place=None)) == [("ring", "left"), ("star", "right")]
    assert places(ring, star) == [("ring", "right"), ("star", "left")]
    assert places(ring, cross, relation="above") == [
        ("ring", "top"),
        ("cross", "bottom left"),
        ("cross", "bottom right"),
    ]
    assert {size for scene in [lay_out(Spec((cross, ring)), rng, True)] for *_, size, _ in [scene.figures[0].look]} == {
        "small"
    }


def test_a_training_prompt_names_groups_in_the_order_in_which_they_stand():
    rng, ring, star = np.random.default_rng(0), Group("ring"), Group("star")

    def first(*groups, ordered):
        said = (phrase(Spec(groups), rng, ordered) for _ in range(40))
        return {text.index("ring") < text.index("star") for text in said}

    assert first(ring, star, ordered=True) == {True}
    assert first(ring, replace(star, place="left"), ordered=True) == {True}
    placed = replace(ring, place="right"), replace(star, place="left")
    assert first(*placed, ordered=True) == first(ring, star, ordered=False) == {True, False}


def circle(x, y, colour="red", shape="circle", radius=12.0):
    return Figure(shape, colour, x, y, radius)


def test_what_is_asked_and_only_that_must_be_there():
    scene = Scene((circle(30, 30), circle(30, 90), circle(100, 60, "blue", "star", 20.0)), "black")
    circles, star = Group("circle", "red", count=2), Group("star", size="large")
    assert not broken(scene, Spec((circles, star), "left of", "black"))
    assert not broken(scene, Spec((Group("circle"), Group("circle", place="top left"), star)))
    wrong = [
        Spec((circles, star), "right of"),
        Spec((circles, star), None, "white"),
        Spec((circles,)),
        Spec((circles, Group("star", size="small"))),
        Spec((circles, Group("star", place="left"))),
        Spec((Group("circle", "red", count=3),)),
        Spec((Group("circle"), Group("circle", "blue"), star)),
    ]
    assert all(broken(scene, spec) for spec in wrong)


def test_a_spec_of_no_or_too_many_objects_is_refused():
    for groups in ((), (Group("circle", count=5),), (Group("circle", count=3), Group("star", count=2))):
        with pytest.raises(ValueError, match="objects"):
            Spec(groups)
    with pytest.raises(ValueError, match="left of"):
        Spec((Group("circle"),), "left of")
    with pytest.raises(ValueError, match="unknown category"):
        propose(np.random.default_rng(0), "colours")
