"""The split by composition: a fifth of what can be combined is never trained on.

A combination is (shape, colour, link, count), where the link is the place of a group, its part in a relation, "and"
beside other groups, or nothing. A training prompt names none that is held out, and a training picture shows none: an
object is read as standing at its place, equal objects as their number, two groups in every relation that holds. Only
what nearly every picture shows, one object with no place said, is held out in prompts alone. A test prompt names at
least one. Sizes and backgrounds are never held out.
"""

from collections.abc import Iterator
from functools import cache

from .scenes import COLOURS, CONVERSE, PLACES, RELATIONS, SHAPES, Figure, Scene, Spec, all_stand

Combination = tuple[str | None, str | None, str | None, int]

_SHAPES = (None, *SHAPES)
_COLOURS = (None, *COLOURS)
_LINKS = (None, "and", *RELATIONS, *PLACES)


@cache
def held_out_combination(combination: Combination) -> bool:
    """A sum of indices modulo 5, not a random hash: every shape, colour, link and count loses the same fifth."""
    shape, colour, link, count = combination
    rank = _SHAPES.index(shape) + 2 * _COLOURS.index(colour) + 3 * _LINKS.index(link) + count
    return rank % 5 == 0


def held_out(what: Spec | Scene) -> bool:
    """Whether a prompt names, or a picture shows, a combination that is kept from training."""
    combinations = named(what) if isinstance(what, Spec) else shown(what)
    return any(map(held_out_combination, combinations))


def named(spec: Spec) -> Iterator[Combination]:
    """What a prompt combines."""
    beside = "and" if len(spec.groups) > 1 else None
    roles = (spec.relation, CONVERSE[spec.relation]) if spec.relation else (None,) * len(spec.groups)
    for group, role in zip(spec.groups, roles, strict=True):
        yield group.shape, group.colour, role or group.place or beside, group.count


def shown(scene: Scene) -> Iterator[Combination]:
    """What a picture combines."""
    groups: dict[tuple[str, str], list[Figure]] = {}
    for figure in scene.figures:
        groups.setdefault((figure.shape, figure.colour), []).append(figure)
    beside = "and" if len(groups) > 1 else None
    for (shape, colour), members in groups.items():
        yield shape, colour, members[0].place if len(members) == 1 else beside, len(members)
    if len(groups) == 2:
        (first, ones), (second, others) = groups.items()
        for relation in RELATIONS:
            if all_stand(tuple(ones), relation, tuple(others)):
                yield *first, relation, len(ones)
                yield *second, CONVERSE[relation], len(others)
