"""Edits of a scene with their true result, and the judge: the asked change happened and the rest stayed."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import permutations

from numpy.random import Generator

from .detector import Picture, Verdict, detect
from .layout import EVERYWHERE, clear, draw, pick, settle
from .phrases import PLACE_WORDS, article, counted, placed, refer
from .samples import Split, any_scene
from .scenes import BACKGROUNDS, COLOURS, MOST, PLACES, SHAPES, SIZES, Figure, Group, Scene
from .split import held_out

STAYS = 8.0  # pixels an object may drift and still count as where it was
INSTRUCTIONS = {
    "recolour": (
        "make {it} {new}",
        "paint {it} {new}",
        "turn {it} {new}",
        "change the color of {it} to {new}",
        "change the colour of {it} to {new}",
    ),
    "remove": ("remove {it}", "delete {it}", "erase {it}", "take away {it}"),
    "add": ("add {new}", "draw {new}", "put in {new}"),
    "background": (
        "make the background {new}",
        "turn the background {new}",
        "change the background to {new}",
        "change the color of the background to {new}",
    ),
    "move": ("move {it} to {new}", "put {it} {at}", "bring {it} to {new}"),
    "swap": ("replace {it} with {new}", "turn {it} into {new}", "change {it} into {new}", "swap {it} for {new}"),
}
KINDS = tuple(INSTRUCTIONS)
CORNER_WORDS = ("the {} corner", "the {}")
SIDE_WORDS = ("the {} side", "the {}")


@dataclass(frozen=True)
class Edit:
    """What is asked of a source scene, and one true result.

    `changed` is what the new or altered object must look like, and `spot` where it must still stand; None when there
    is no such object, and when it may stand anywhere (or at the place that `changed` names).
    """

    kind: str
    source: Scene
    instruction: str
    target: Scene
    changed: Group | None = None
    spot: Figure | None = None

    @property
    def kept(self) -> tuple[Figure, ...]:
        """The objects that must stay as they were."""
        return tuple(figure for figure in self.target.figures if figure in self.source.figures)


def sample_edit(rng: Generator, kind: str, split: Split) -> Edit:
    """One edit of a kind. In training neither scene shows what is held out; in the test the result does."""
    while True:
        source = any_scene(rng)
        if split == "train" and held_out(source):
            continue
        edit = _MAKERS[kind](rng, source)
        if edit is not None and held_out(edit.target) is (split == "test"):
            return edit


def check_edit(image: Picture, edit: Edit) -> Verdict:
    """Whether a picture is a correct result: every kept object and the background as they were, and the change made."""
    seen = detect(image)
    reasons = list(seen.faults)
    found, wanted = seen.scene.figures, edit.target
    if seen.scene.background != wanted.background:
        reasons.append(f"background is {seen.scene.background}, not {wanted.background}")
    if len(found) != len(wanted.figures):
        reasons.append(f"{len(found)} objects, not {len(wanted.figures)}")
        return Verdict(tuple(reasons))
    kept = edit.kept
    matches = [order[len(kept) :] for order in permutations(found) if all(map(_stayed, kept, order))]
    if not matches:
        reasons.append("the rest did not stay")
    elif edit.changed is not None and not any(_done(edit, rest[0]) for rest in matches):
        reasons.append(f"no object became {' '.join(filter(None, (edit.changed.colour, edit.changed.shape)))} as asked")
    return Verdict(tuple(reasons))


def _near(a: Figure, b: Figure) -> bool:
    return math.dist((a.x, a.y), (b.x, b.y)) <= STAYS


def _stayed(was: Figure, now: Figure) -> bool:
    return was.look[:3] == now.look[:3] and _near(was, now)


def _done(edit: Edit, now: Figure) -> bool:
    return edit.changed is not None and edit.changed.fits(now) and (edit.spot is None or _near(edit.spot, now))


def _other(rng: Generator, options: Sequence[str], current: str | None) -> str:
    return pick(rng, [option for option in options if option != current])


def _say(rng: Generator, kind: str, **words: str) -> str:
    return pick(rng, INSTRUCTIONS[kind]).format(**words)


def _chosen(rng: Generator, scene: Scene) -> tuple[Figure, tuple[Figure, ...], str] | None:
    """(an object, the others, words that point at it alone)."""
    figure = scene.figures[int(rng.integers(len(scene.figures)))]
    it = refer(rng, scene, figure)
    return None if it is None else (figure, tuple(f for f in scene.figures if f is not figure), it)


def _recolour(rng: Generator, source: Scene) -> Edit | None:
    if (chosen := _chosen(rng, source)) is None:
        return None
    figure, others, it = chosen
    new = replace(figure, colour=_other(rng, tuple(COLOURS), figure.colour))
    changed = Group(new.shape, new.colour, new.size)
    text = _say(rng, "recolour", it=it, new=new.colour)
    return Edit("recolour", source, text, replace(source, figures=(*others, new)), changed, new)


def _remove(rng: Generator, source: Scene) -> Edit | None:
    if len(source.figures) == 1 or (chosen := _chosen(rng, source)) is None:
        return None
    return Edit("remove", source, _say(rng, "remove", it=chosen[2]), replace(source, figures=chosen[1]))


def _add(rng: Generator, source: Scene) -> Edit | None:
    if len(source.figures) == MOST:
        return None
    size, place = pick(rng, tuple(SIZES)), pick(rng, tuple(PLACES))
    says_size, says_place = rng.random(2) < 0.5
    new = draw(rng, pick(rng, SHAPES), pick(rng, tuple(COLOURS)), size)
    put = settle(rng, new, [PLACES[place]] if says_place else EVERYWHERE, source.figures)
    if put is None:
        return None
    changed = Group(new.shape, new.colour, size if says_size else None, 1, place if says_place else None)
    text = _say(rng, "add", new=placed(counted(changed, rng), changed.place, rng))
    return Edit("add", source, text, replace(source, figures=(*source.figures, put)), changed)


def _background(rng: Generator, source: Scene) -> Edit | None:
    new = _other(rng, tuple(BACKGROUNDS), source.background)
    return Edit("background", source, _say(rng, "background", new=new), replace(source, background=new))


def _move(rng: Generator, source: Scene) -> Edit | None:
    if (chosen := _chosen(rng, source)) is None:
        return None
    figure, others, it = chosen
    place = _other(rng, tuple(PLACES), figure.place)
    moved = settle(rng, figure, [PLACES[place]], others)
    if moved is None:
        return None
    words = CORNER_WORDS if " " in place else SIDE_WORDS if place != "middle" else ("the {}",)
    text = _say(rng, "move", it=it, new=pick(rng, words).format(place), at=pick(rng, PLACE_WORDS[place]))
    changed = Group(figure.shape, figure.colour, figure.size, 1, place)
    return Edit("move", source, text, replace(source, figures=(*others, moved)), changed)


def _swap(rng: Generator, source: Scene) -> Edit | None:
    if (chosen := _chosen(rng, source)) is None:
        return None
    figure, others, it = chosen
    new = replace(figure, shape=_other(rng, SHAPES, figure.shape))
    if not clear(new, others):
        return None
    text = _say(rng, "swap", it=it, new=article(new.shape))
    changed = Group(new.shape, new.colour, new.size)
    return Edit("swap", source, text, replace(source, figures=(*others, new)), changed, new)


_MAKERS: dict[str, Callable[[Generator, Scene], Edit | None]] = {
    "recolour": _recolour,
    "remove": _remove,
    "add": _add,
    "background": _background,
    "move": _move,
    "swap": _swap,
}
