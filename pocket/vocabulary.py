"""The closed vocabulary: every word that a prompt, an edit, a question or an answer can hold."""

import re
from collections.abc import Iterator

from .edits import CORNER_WORDS, INSTRUCTIONS, SIDE_WORDS
from .phrases import COUNTS, DIGITS, GROUNDS, INTROS, ITS_SIDE, PLACE_WORDS, RELATION_WORDS, SIZE_WORDS, plural, words
from .questions import GROUND, QUESTIONS
from .scenes import BACKGROUNDS, COLOURS, PLACES, SHAPES


def vocabulary() -> tuple[str, ...]:
    """All words in alphabetical order, signs first."""
    return tuple(sorted({word for text in _texts() for word in words(text)}))


def unknown_words(text: str) -> list[str]:
    """The words of a text that the pocket world has no meaning for, in order."""
    known = {*vocabulary(), "."}
    return [word for word in words(text) if word not in known]


def _texts() -> Iterator[str]:
    """Everything texts are put together from."""
    nouns = (*SHAPES, "object")
    yield from (*nouns, *map(plural, nouns))
    yield from (*COLOURS, *BACKGROUNDS, "grey", *PLACES, *COUNTS, *DIGITS[2:], GROUND)
    yield from ("a", "an", "the", "and", ",", "yes", "no")
    yield from (*INTROS, *ITS_SIDE.values())
    for table in (SIZE_WORDS, PLACE_WORDS, RELATION_WORDS, INSTRUCTIONS, QUESTIONS):
        for phrasings in table.values():
            yield from map(_bare, phrasings)
    yield from map(_bare, (*GROUNDS, *CORNER_WORDS, *SIDE_WORDS))


def _bare(template: str) -> str:
    return re.sub(r"\{\w*\}", " ", template)
