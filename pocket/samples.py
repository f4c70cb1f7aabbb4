"""Draws (prompt, spec, scene) by category, GenEval's (arXiv 2310.11513) and richer scenes besides."""

from dataclasses import dataclass, replace
from typing import Literal

from numpy.random import Generator

from .layout import lay_out, pick
from .phrases import phrase
from .scenes import BACKGROUNDS, COLOURS, MOST, PLACES, RELATIONS, SHAPES, SIZES, Group, Scene, Spec, exact
from .split import held_out

Split = Literal["train", "test"]

SCORED = ("single object", "two objects", "counting", "colour", "position", "binding")  # GenEval's
CATEGORIES = (*SCORED, "small object", "scene", "groups")


@dataclass(frozen=True)
class Sample:
    """A prompt, what it asks, and one scene that is a correct picture of it."""

    category: str
    prompt: str
    spec: Spec
    scene: Scene


def sample(rng: Generator, category: str, split: Split) -> Sample:
    """One sample of a category. A training sample neither names nor shows what is held out, a test one names it.

    A "scene" stands anywhere, and its prompt says everything; "groups" are several objects in a relation.
    """
    free = category == "scene"
    while True:
        spec = propose(rng, category)
        if not free and held_out(spec) is not (split == "test"):
            continue
        scene = lay_out(spec, rng, compose=not free)
        if scene is None or (split == "train" and held_out(scene)):
            continue
        if free and held_out(spec := exact(scene)) is not (split == "test"):
            continue
        return Sample(category, phrase(spec, rng), spec, scene)


def reworded(sample: Sample, rng: Generator) -> Spec:
    """The same picture by places rather than colours; as it was where objects are several of a kind, or held out so.

    What is held out leaves words little company: no training prompt joins "a circle" by "and" if it says neither its
    colour nor its place.
    """
    spec, figures = sample.spec, sample.scene.figures
    if spec.relation is not None or len(figures) != len(spec.groups):
        return spec
    groups = [
        replace(group, colour=pick(rng, (None, group.colour)), place=figure.place)
        for group, figure in zip(spec.groups, figures, strict=True)
    ]
    other = replace(spec, groups=tuple(groups))
    return spec if held_out(other) else other


def propose(rng: Generator, category: str) -> Spec:
    """A spec of the category, from either side of the split; it may be too crowded to paint."""
    draw = _Draw(rng)
    if category == "single object":
        return Spec((draw.group(colour=0.7, size=0.4),), None, draw.background(0.4))
    if category == "small object":
        return Spec((replace(draw.group(colour=0.5, size=0.0), size="small"),), None, draw.background(0.4))
    if category == "two objects":
        return Spec(draw.groups(2, colour=0.4, size=0.2, alike=False), None, draw.background(0.2))
    if category == "counting":
        count = int(rng.integers(2, MOST + 1))
        return Spec((replace(draw.group(colour=0.6, size=0.3), count=count),), None, draw.background(0.2))
    if category == "colour":
        return Spec((draw.group(colour=1.0, size=0.0),), None, draw.background(0.6))
    if category == "position":
        if draw.chance(0.5):
            place = pick(rng, tuple(PLACES))
            return Spec((replace(draw.group(colour=0.6, size=0.2), place=place),), None, draw.background(0.2))
        return Spec(draw.groups(2, colour=0.6, size=0.1), pick(rng, tuple(RELATIONS)), draw.background(0.2))
    if category == "binding":
        return Spec(draw.groups(2, colour=1.0, size=0.3), None, draw.background(0.2))
    if category == "scene":
        return draw.scene()
    if category == "groups":
        first, second = draw.groups(2, colour=0.8, size=0.1)
        count = int(rng.integers(2, MOST))
        first, second = replace(first, count=count), replace(second, count=int(rng.integers(1, MOST + 1 - count)))
        pair = (first, second) if draw.chance(0.5) else (second, first)
        return Spec(pair, pick(rng, tuple(RELATIONS)), draw.background(0.2))
    raise ValueError(f"unknown category {category!r}: use one of {', '.join(CATEGORIES)}")


def any_scene(rng: Generator) -> Scene:
    """One to four objects, as edits and questions use them; from either side of the split."""
    while True:
        scene = lay_out(propose(rng, "scene"), rng, compose=False)
        if scene is not None:
            return scene


class _Draw:
    """Random parts of a spec; the numbers are the chance that an attribute is said."""

    def __init__(self, rng: Generator) -> None:
        self.rng = rng

    def chance(self, p: float) -> bool:
        return bool(self.rng.random() < p)

    def background(self, said: float) -> str | None:
        return pick(self.rng, tuple(BACKGROUNDS)) if self.chance(said) else None

    def group(self, colour: float, size: float) -> Group:
        return Group(
            pick(self.rng, SHAPES),
            pick(self.rng, tuple(COLOURS)) if self.chance(colour) else None,
            pick(self.rng, tuple(SIZES)) if self.chance(size) else None,
        )

    def groups(self, number: int, colour: float, size: float, alike: bool = True) -> tuple[Group, ...]:
        """Groups that cannot be taken for each other: another shape or, if they may be alike, another colour said."""
        found: list[Group] = []
        while len(found) < number:
            new = self.group(colour, size)
            twins = [old for old in found if old.shape == new.shape]
            if all(alike and new.colour and old.colour and new.colour != old.colour for old in twins):
                found.append(new)
        return tuple(found)

    def scene(self) -> Spec:
        """One to four objects with anything said about them."""
        number = int(self.rng.choice([1, 2, 3, 4], p=[0.2, 0.45, 0.25, 0.1]))
        groups = list(self.groups(number, colour=0.85, size=0.5))
        for _ in range(int(self.rng.integers(0, MOST - number + 1))):
            i = int(self.rng.integers(number))
            groups[i] = replace(groups[i], count=groups[i].count + 1)
        relation = pick(self.rng, tuple(RELATIONS)) if number == 2 and self.chance(0.5) else None
        if relation is None:
            for i, group in enumerate(groups):
                if group.count == 1 and self.chance(0.3):
                    groups[i] = replace(group, place=pick(self.rng, tuple(PLACES)))
        return Spec(tuple(groups), relation, self.background(0.6))
