"""Puts specs and scenes into words: lower case, several phrasings of each thing, a small closed vocabulary."""

import re
from collections.abc import Sequence

from numpy.random import Generator

from .layout import pick
from .scenes import COLOURS, CONVERSE, SHAPES, SIZES, Figure, Group, Scene, Spec

INTROS = ("", "", "", "a picture of ", "an image of ", "a drawing of ", "draw ", "paint ", "show me ", "please draw ")
COUNTS = ("zero", "one", "two", "three", "four")
DIGITS = ("0", "1", "2", "3", "4")
SIZE_WORDS = {"small": ("small", "small", "little"), "large": ("large", "large", "big")}
GROUNDS = (
    "{what} on a {ground} background",
    "{what} on a {ground} background",
    "{what} on {ground}",
    "{what} against a {ground} background",
    "on a {ground} background, {what}",
)
PLACE_WORDS = {
    "left": ("on the left", "on the left side", "at the left"),
    "right": ("on the right", "on the right side", "at the right"),
    "top": ("at the top", "on the top side", "in the top middle"),
    "bottom": ("at the bottom", "on the bottom side", "in the bottom middle"),
    "middle": ("in the middle", "in the center", "in the centre"),
    "top left": ("in the top left corner", "at the top left", "in the upper left corner"),
    "top right": ("in the top right corner", "at the top right", "in the upper right corner"),
    "bottom left": ("in the bottom left corner", "at the bottom left", "in the lower left corner"),
    "bottom right": ("in the bottom right corner", "at the bottom right", "in the lower right corner"),
}
RELATION_WORDS = {
    "left of": ("left of", "to the left of", "on the left of"),
    "right of": ("right of", "to the right of", "on the right of"),
    "above": ("above", "over"),
    "below": ("below", "under"),
}
ITS_SIDE = {"left of": "to its left", "right of": "to its right", "above": "above it", "below": "below it"}

REFERENCES: tuple[tuple[str, ...], ...] = (
    ("shape",),
    ("colour", "shape"),
    ("size", "shape"),
    ("size", "colour", "shape"),
    ("shape", "place"),
    ("colour", "shape", "place"),
    ("colour",),
    ("place",),
)


def words(text: str) -> list[str]:
    """Lower-case words, digits and signs: "Two rings?" gives two, rings, ?"""
    return re.findall(r"[a-z]+|\S", text.lower())


def plural(noun: str) -> str:
    return noun + ("es" if noun.endswith("s") else "s")


def article(text: str) -> str:
    return ("an " if text[0] in "aeiou" else "a ") + text


def listed(parts: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(parts[:-1]), parts[-1])))


def kind(group: Group, many: bool, rng: Generator | None = None) -> str:
    """Size, colour and shape: "small red circles". Without a generator, always the first wording."""
    noun = group.shape or "object"
    size = group.size and (pick(rng, SIZE_WORDS[group.size]) if rng else group.size)
    return " ".join(filter(None, (size, group.colour, plural(noun) if many else noun)))


def counted(group: Group, rng: Generator | None = None) -> str:
    """With its number: "a red circle", "two small stars"."""
    if group.count == 1:
        return article(kind(group, False, rng))
    numbers = DIGITS if rng and rng.random() < 0.1 else COUNTS
    return f"{numbers[group.count]} {kind(group, True, rng)}"


def placed(text: str, place: str | None, rng: Generator) -> str:
    return f"{text} {pick(rng, PLACE_WORDS[place])}" if place else text


def the(group: Group, rng: Generator) -> str:
    """An object pointed at: "the red circle", "the object on the left"."""
    return "the " + placed(kind(group, False, rng), group.place, rng)


def refer(rng: Generator, scene: Scene, figure: Figure, hide: str = "") -> str | None:
    """Words that point at this object of the scene alone, not saying its attribute `hide`; None when there are none."""
    shape, colour, size, place = figure.look
    fitting = []
    for says in REFERENCES:
        group = Group(
            shape if "shape" in says else None,
            colour if "colour" in says else None,
            size if "size" in says else None,
            place=place if "place" in says else None,
        )
        if hide not in says and sum(map(group.fits, scene.figures)) == 1:
            fitting.append(group)
    return the(fitting[int(rng.integers(len(fitting)))], rng) if fitting else None


def phrase(spec: Spec, rng: Generator, ordered: bool = False) -> str:
    """One of the prompts that ask for the spec; `ordered` keeps the order of groups unless all are placed."""
    parts = [placed(counted(group, rng), group.place, rng) for group in spec.groups]
    if spec.relation is not None:
        what = _related(spec, parts, rng)
    elif ordered and not all(group.place for group in spec.groups):
        what = listed(parts)
    else:
        what = listed([parts[i] for i in rng.permutation(len(parts))])
    if spec.background is not None:
        ground = "grey" if spec.background == "gray" and rng.random() < 0.3 else spec.background
        what = pick(rng, GROUNDS).format(what=what, ground=ground)
    return pick(rng, INTROS) + what if not what.startswith("on ") else what


def _related(spec: Spec, parts: Sequence[str], rng: Generator) -> str:
    """The relation from either side: "a above b", "b below a", or "b with a above it"."""
    relation, (a, b) = spec.relation or "", parts
    way = int(rng.integers(5))
    if way == 0 and spec.groups[1].count == 1:
        return f"{b} with {a} {ITS_SIDE[relation]}"
    if way == 1:
        relation, a, b = CONVERSE[relation], b, a
    return f"{a} {pick(rng, RELATION_WORDS[relation])} {b}"


def described(scene: Scene) -> str:
    """The one canonical caption: objects by shape, colour and size in the order of the tables, then the background."""
    looks = [(figure.shape, figure.colour, figure.size) for figure in scene.figures]
    order = sorted(set(looks), key=lambda w: (SHAPES.index(w[0]), tuple(COLOURS).index(w[1]), tuple(SIZES).index(w[2])))
    groups = [Group(shape, colour, size, looks.count((shape, colour, size))) for shape, colour, size in order]
    return f"{listed([counted(group) for group in groups])} on a {scene.background} background"
