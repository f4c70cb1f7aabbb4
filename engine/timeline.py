"""Memory over a predicted run: what `plan --plot` draws."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby

from .estimate import Asked
from .outline import LIMIT, PROMPT
from .plan import seconds_of, taken
from .residency import Placement


@dataclass(frozen=True)
class Moment:
    """Something is computed for some time while weights and activations, in bytes, are on the card."""

    stage: str
    seconds: float
    weights: int
    activations: int


def timeline(asked: Asked, placement: Placement) -> Iterator[Moment]:
    """One batch of it, operation by operation; by a dry run, since what is kept has no order."""
    if asked.task is None:
        plan = asked.forecast.fresh_answer(asked.seen, PROMPT, LIMIT)
    else:
        plan = asked.forecast.fresh(asked.task, [PROMPT], placement.at_once)
    names = {taken(placement, name): name for name in placement.peaks}
    for stage, entries in groupby(plan.history, key=lambda entry: next(iter(entry[0])).stage.partition("/")[0]):
        if stage not in names:  # another way to do it
            continue
        weights = placement.peaks[names[stage]] - plan.stages[stage].peak_bytes
        for calls, peak in entries:
            seconds = sum(times * seconds_of(call, asked.card) for call, times in calls.items())
            yield Moment(names[stage], seconds, weights, peak)
