"""The closed vocabulary: every word that a prompt, an edit, a question or an answer can hold."""

import re
from collections.abc import Iterator, Sequence

from .edits import CORNER_WORDS, INSTRUCTIONS, SIDE_WORDS
from .phrases import COUNTS, DIGITS, GROUNDS, INTROS, ITS_SIDE, PLACE_WORDS, RELATION_WORDS, SIZE_WORDS, plural, words
from .questions import GROUND, QUESTIONS
from .scenes import BACKGROUNDS, COLOURS, MOST, PLACES, SHAPES

SHOWN = 5  # unknown words that a hint names


def vocabulary() -> tuple[str, ...]:
    """All words in alphabetical order, signs first."""
    return tuple(sorted({word for text in _texts() for word in words(text)}))


def unknown_words(text: str) -> list[str]:
    """The words of a text that the pocket world has no meaning for, in order."""
    known = {*vocabulary(), "."}
    return [word for word in words(text) if word not in known]


def hint(texts: Sequence[str]) -> str | None:
    """What the pocket model knows, in one line, if a text has words beyond that."""
    unknown = list(dict.fromkeys(word for text in texts for word in unknown_words(text)))
    if not unknown:
        return None
    named = ", ".join(map(ascii, unknown[:SHOWN])) + (" and more" if len(unknown) > SHOWN else "")
    return (
        f"pocket has no word for {named}: it knows 1 to {MOST} objects ({', '.join(SHAPES)}; "
        f"{', '.join(COLOURS)}; small, large), where they are, and backgrounds ({', '.join(BACKGROUNDS)}), "
        'as in "two blue stars above a red circle"'
    )


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
