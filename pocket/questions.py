"""Questions about a scene with their one true answer, short and in the words of the prompts."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from numpy.random import Generator

from .layout import pick
from .phrases import COUNTS, DIGITS, RELATION_WORDS, article, described, kind, refer, words
from .samples import Split, any_scene
from .scenes import BACKGROUNDS, COLOURS, CONVERSE, RELATIONS, SHAPES, Figure, Group, Scene, stands
from .split import held_out

QUESTIONS = {
    "count": ("how many {what} are there?", "how many {what} do you see?", "count the {what}"),
    "colour": ("what color is {it}?", "what colour is {it}?", "which color is {it}?"),
    "shape": ("what shape is {it}?", "which shape is {it}?"),
    "where": ("where is {it}?", "where do you see {it}?"),
    "exists": ("is there {what}?", "do you see {what}?"),
    "relation": ("is {a} {relation} {b}?",),
    "is": ("is {it} {what}?",),
    "describe": ("describe the picture", "describe the image", "what is in the picture?", "what do you see?"),
}
KINDS = ("count", "colour", "shape", "where", "yes or no", "describe")
GROUND = "the background"


@dataclass(frozen=True)
class Question:
    kind: str
    scene: Scene
    text: str
    answer: str


Asked = tuple[str, str] | None  # (text, answer)


def sample_question(rng: Generator, kind: str, split: Split) -> Question:
    """One question of a kind. A training scene shows nothing held out, a test scene does."""
    while True:
        scene = any_scene(rng)
        if held_out(scene) is (split == "test") and (asked := MAKERS[kind](rng, scene)) is not None:
            return Question(kind, scene, *asked)


def check_answer(answer: str, question: Question) -> bool:
    """Equal but for capitals, punctuation, articles, digits and spelling."""
    return normalised(answer) == normalised(question.answer)


def normalised(answer: str) -> list[str]:
    same = {**dict(zip(DIGITS, COUNTS, strict=True)), "grey": "gray", "little": "small", "big": "large"}
    same |= {"none": "zero", "center": "middle", "centre": "middle"}
    kept = (word for word in words(answer) if word.isalnum() and word not in ("a", "an", "the"))
    return [same.get(word, word) for word in kept]


def _say(rng: Generator, kind: str, **parts: str) -> str:
    return pick(rng, QUESTIONS[kind]).format(**parts)


def _figure(rng: Generator, scene: Scene) -> Figure:
    return scene.figures[int(rng.integers(len(scene.figures)))]


def _count(rng: Generator, scene: Scene) -> Asked:
    """Of the objects that are there, or now and then of others."""
    figure = _figure(rng, scene)
    if rng.random() < 0.25:
        figure = replace(figure, shape=pick(rng, SHAPES), colour=pick(rng, tuple(COLOURS)))
    shape, colour, size, _ = figure.look
    ways = (Group(), Group(shape), Group(None, colour), Group(shape, colour), Group(shape, None, size))
    group = ways[int(rng.choice(5, p=[0.2, 0.3, 0.15, 0.2, 0.15]))]
    number = sum(map(group.fits, scene.figures))
    return _say(rng, "count", what=kind(group, True, rng)), COUNTS[number]


def _colour(rng: Generator, scene: Scene) -> Asked:
    if rng.random() < 0.25:
        return _say(rng, "colour", it=GROUND), scene.background or ""
    figure = _figure(rng, scene)
    it = refer(rng, scene, figure, hide="colour")
    return None if it is None else (_say(rng, "colour", it=it), figure.colour)


def _shape(rng: Generator, scene: Scene) -> Asked:
    figure = _figure(rng, scene)
    it = refer(rng, scene, figure, hide="shape")
    return None if it is None else (_say(rng, "shape", it=it), figure.shape)


def _where(rng: Generator, scene: Scene) -> Asked:
    figure = _figure(rng, scene)
    it = refer(rng, scene, figure, hide="place")
    return None if it is None else (_say(rng, "where", it=it), figure.place)


def _describe(rng: Generator, scene: Scene) -> Asked:
    return _say(rng, "describe"), described(scene)


def _yes_or_no(rng: Generator, scene: Scene) -> Asked:
    """Half of the answers are yes, whatever is asked."""
    yes = bool(rng.random() < 0.5)
    ways = (_exists, _is_colour, _is_ground, _stands)
    text = None
    while text is None:  # the background can always be asked for
        text = ways[int(rng.choice(4, p=[0.35, 0.2, 0.1, 0.35]))](rng, scene, yes)
    return text, "yes" if yes else "no"


def _exists(rng: Generator, scene: Scene, yes: bool) -> str | None:
    """A no differs from an object that is there in its shape or colour only."""
    figure = _figure(rng, scene)
    group = Group(figure.shape, figure.colour if rng.random() < 0.7 else None)
    if not yes:
        if group.colour is not None and rng.random() < 0.5:
            group = replace(group, colour=pick(rng, tuple(COLOURS)))
        else:
            group = replace(group, shape=pick(rng, SHAPES))
        if any(map(group.fits, scene.figures)):
            return None
    return _say(rng, "exists", what=article(kind(group, False)))


def _is_colour(rng: Generator, scene: Scene, yes: bool) -> str | None:
    figure = _figure(rng, scene)
    it = refer(rng, scene, figure, hide="colour")
    colour = figure.colour if yes else pick(rng, [c for c in COLOURS if c != figure.colour])
    return None if it is None else _say(rng, "is", it=it, what=colour)


def _is_ground(rng: Generator, scene: Scene, yes: bool) -> str | None:
    others = [ground for ground in BACKGROUNDS if ground != scene.background]
    return _say(rng, "is", it=GROUND, what=(scene.background or "") if yes else pick(rng, others))


def _stands(rng: Generator, scene: Scene, yes: bool) -> str | None:
    a, b = _figure(rng, scene), _figure(rng, scene)
    relation = pick(rng, tuple(RELATIONS))
    if not stands(a, relation, b):
        return None
    first, second = refer(rng, scene, a, hide="place"), refer(rng, scene, b, hide="place")
    if first is None or second is None:
        return None
    said = pick(rng, RELATION_WORDS[relation if yes else CONVERSE[relation]])
    return _say(rng, "relation", a=first, relation=said, b=second)


MAKERS: dict[str, Callable[[Generator, Scene], Asked]] = {
    "count": _count,
    "colour": _colour,
    "shape": _shape,
    "where": _where,
    "yes or no": _yes_or_no,
    "describe": _describe,
}
