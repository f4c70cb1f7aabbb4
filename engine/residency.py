"""What of a model sits where while a request runs: pure planning on numbers, without torch.

    placement = fit(work, budget)       # the fastest that fits
    placement = smaller(work, placement)   # the next one, where that ran out of memory

A part is
    resident  on the card all the time
    staged    on the card in the stages that need it, in pinned memory of the host otherwise
    streamed  the same, but of its stack of layers only two are on the card at a time: the next one comes meanwhile
    host      never on the card: an embedding table of which only rows are looked up
    idle      on the host, since no stage needs it

Time is a sum over stages. What a stage needs and is not there comes before it begins, nothing of which is taken to
overlap. Layers that are streamed come while others are computed: where it is known how long those of the same stack
take, no other work hides the transfers (two layers ahead is next to nothing); else all of the stage may.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from operator import add
from typing import Literal

from .gpus import GIB

LINK = 20e9  # bytes a second from pinned memory over PCIe 4.0 x16, whose sum is 31.5e9; heuristic, never measured
SAME = 1.02  # predictions are not better than that: of placements so close in time the simplest is taken; heuristic
STEP = 15 / 16  # of the peak: the least step down after memory ran out; heuristic

Where = Literal["resident", "staged", "streamed", "host", "idle"]


@dataclass(frozen=True)
class Part:
    """`stack` and `layer`: bytes of all layers that may be streamed and of the largest, 0 for none."""

    name: str
    nbytes: int
    stack: int = 0
    layer: int = 0
    fixed: bool = False  # cannot leave the card

    @property
    def streamed_bytes(self) -> int:
        """On the card, with two buffers in place of the stack."""
        return self.nbytes - self.stack + 2 * self.layer


@dataclass(frozen=True)
class Bands:
    """A stage that computes its widest maps in bands of rows: what it then costs."""

    activation: int
    seconds: float


@dataclass(frozen=True)
class Stage:
    """`activation`: the peak of all that lives beside the weights. `seconds`: of computing, with all parts there."""

    name: str
    needs: tuple[str, ...]
    activation: int
    seconds: float
    passes: int = 1  # how often a stack is gone through
    lookups: frozenset[str] = frozenset()  # of what it needs, tables of which the host can look up the rows
    shares: Mapping[str, float] = field(default_factory=dict)  # seconds in a part's own layers, where known
    bands: Bands | None = None


@dataclass(frozen=True)
class Work:
    """`batches`: for each number of images at once that may be tried, the stages of such a batch, in order.

    `apart`: those of one image whose guidance rows are computed one after the other, where that can be.
    """

    parts: tuple[Part, ...]
    batches: Mapping[int, tuple[Stage, ...]]
    apart: tuple[Stage, ...] = ()
    images: int = 1
    link: float = LINK  # bytes per second


@dataclass(frozen=True)
class Placement:
    """`stages`: what each stage has to have brought, in order; of those in `early` it comes in the stage before."""

    where: Mapping[str, Where]
    stages: Mapping[str, tuple[str, ...]]
    early: frozenset[str]
    banded: tuple[str, ...]  # stages that compute in bands
    at_once: int  # images
    apart: bool  # whether the guidance rows of an image come one after the other
    peaks: Mapping[str, int]  # predicted bytes, weights and activations, by stage
    seconds: float  # predicted, of all images
    split: bool  # whether more images could be computed at once
    budget: int

    @property
    def peak(self) -> int:
        return max(self.peaks.values())


class DoesNotFit(Exception):
    """No placement keeps to the budget; `smallest` needs least, `smallest.peak` bytes."""

    def __init__(self, budget: int, smallest: Placement) -> None:
        super().__init__(f"{smallest.peak / GIB:.2f} GiB is the least this takes, and {budget / GIB:.2f} may be used")
        self.smallest = smallest


def fit(work: Work, budget: int) -> Placement:
    """The fastest placement whose weights and activations take at most `budget` bytes; of equals the simplest.

    Raises DoesNotFit.
    """
    best = _best(work, budget)
    if best is None:
        raise DoesNotFit(budget, _best(work, least(work)))
    return best


def smaller(work: Work, placement: Placement) -> Placement:
    """The next one after this, which ran out of memory: its peak is smaller, and by a step worth trying if it can be.

    Raises DoesNotFit.
    """
    smallest = least(work)
    if smallest >= placement.peak:
        raise DoesNotFit(placement.peak - 1, placement)
    found = _best(work, max(smallest, min(placement.peak - 1, int(STEP * placement.peak))))
    return replace(found, budget=placement.budget)


def least(work: Work) -> int:
    """The smallest peak there is, in bytes."""
    return min(max(map(add, case.activations(), case.least()[0])) for case in _cases(work, work.parts))


def describe(placement: Placement) -> str:
    """One line, such as `llm, mar_encoder streamed; decode in bands; 1.4 of 1.5 GiB, about 5 s`."""
    said = []
    for where, words in (("streamed", "streamed"), ("staged", "staged"), ("host", "on the host"), ("idle", "idle")):
        if names := [name for name, place in placement.where.items() if place == where]:
            said.append(f"{', '.join(names)} {words}")
    said += [f"{name} in bands" for name in placement.banded]
    if placement.split:
        said.append("one image at a time" if placement.at_once == 1 else f"{placement.at_once} images at a time")
    if placement.apart:
        said.append("guidance in two passes")
    seconds = f"{placement.seconds:.{0 if placement.seconds >= 10 else 1}f}"
    memory = f"{placement.peak / GIB:.1f} of {placement.budget / GIB:.1f} GiB, about {seconds} s"
    return "; ".join([*(said or ["all resident"]), memory])


@dataclass(frozen=True)
class _Home:
    """One way to keep a part, and what it costs: bytes in each stage, seconds."""

    where: Where
    nbytes: tuple[int, ...]
    waits: float  # seconds of transfers that nothing hides
    hidden: tuple[float, ...]  # seconds of transfers in each stage that its computing hides, as far as it lasts


@dataclass(frozen=True)
class _Case:
    """A batch size, with or without bands: what all placements of it share."""

    at_once: int
    apart: bool
    stages: tuple[Stage, ...]
    bands: bool
    batches: int
    homes: tuple[tuple[_Home, ...], ...]  # of each part, what takes most memory and least time first

    def activations(self) -> tuple[int, ...]:
        return tuple(s.bands.activation if self.bands and s.bands else s.activation for s in self.stages)

    def seconds(self, waits: float, hidden: Iterable[float]) -> float:
        computing = (s.bands.seconds if self.bands and s.bands else s.seconds for s in self.stages)
        return self.batches * (waits + sum(map(max, computing, hidden)))

    def least(self) -> list[tuple[int, ...]]:
        """What each stage takes at least, by how many parts have been given a home."""
        rest = [tuple(0 for _ in self.stages)]
        for homes in reversed(self.homes):
            rest.append(tuple(map(add, rest[-1], homes[-1].nbytes)))
        return rest[::-1]


@dataclass(frozen=True)
class _Found:
    seconds: float
    effort: tuple[int, bool, bool, int]  # parts that are not resident, rows apart, bands, batches: less is simpler
    case: _Case
    homes: tuple[_Home, ...]


def _best(work: Work, budget: int) -> Placement | None:
    found: list[_Found] = []
    parts = sorted(work.parts, key=lambda part: -part.nbytes)  # the largest first: soon it is clear what cannot fit
    for case in _cases(work, parts):
        _search(case, budget, found)
    if not found:
        return None
    limit = SAME * min(one.seconds for one in found)
    best = min((one for one in found if one.seconds <= limit), key=lambda one: (one.effort, one.seconds))
    return _placement(work, parts, best, budget)


def _cases(work: Work, parts: Iterable[Part]) -> Iterator[_Case]:
    batches = [(at_once, False, stages) for at_once, stages in sorted(work.batches.items(), reverse=True)]
    for at_once, apart, stages in batches + [(1, True, work.apart)] * bool(work.apart):
        homes = tuple(tuple(_homes(part, stages, work.link)) for part in parts)
        for bands in (False, True)[: 1 + any(stage.bands for stage in stages)]:
            yield _Case(at_once, apart, stages, bands, -(-work.images // at_once), homes)


def _homes(part: Part, stages: tuple[Stage, ...], link: float) -> Iterator[_Home]:
    """Each takes less memory than the one before it, in every stage."""
    needed = [part.name in stage.needs for stage in stages]
    nothing = (0,) * len(stages)
    yield _Home("resident", (part.nbytes,) * len(stages), 0.0, nothing)
    if part.fixed:
        return
    if all(part.name in stage.lookups for stage, need in zip(stages, needed, strict=True) if need):
        yield _Home("host" if any(needed) else "idle", nothing, 0.0, nothing)
        return
    arrivals = sum(need and not before for before, need in pairwise([False, *needed]))
    if not all(needed):
        yield _Home("staged", tuple(need * part.nbytes for need in needed), arrivals * part.nbytes / link, nothing)
    if part.stack > 2 * part.layer:
        waits, hidden = arrivals * (part.nbytes - part.stack) / link, [0.0] * len(stages)
        for index, stage in enumerate(stages):
            seconds = needed[index] * stage.passes * part.stack / link
            if part.name in stage.shares:
                waits += max(0.0, seconds - stage.shares[part.name])
            else:
                hidden[index] = seconds
        yield _Home("streamed", tuple(need * part.streamed_bytes for need in needed), waits, tuple(hidden))


def _search(case: _Case, budget: int, found: list[_Found]) -> None:
    """Add to `found` the placements that fit, without those that are neither faster nor simpler than another one."""
    room = [tuple(budget - least for least in step) for step in case.least()]
    start = (), case.activations(), 0.0, (0.0,) * len(case.stages)
    open_ = [start]
    while open_:
        chosen, used, waits, hidden = open_.pop()
        if any(taken > free for taken, free in zip(used, room[len(chosen)], strict=True)):
            continue
        moved = sum(home.where != "resident" for home in chosen)
        one = _Found(case.seconds(waits, hidden), (moved, case.apart, case.bands, case.batches), case, chosen)
        # Whatever is chosen for the other parts makes it neither faster nor simpler.
        if any(other.seconds <= one.seconds and other.effort <= one.effort for other in found):
            continue
        if len(chosen) == len(case.homes):
            found.append(one)
            continue
        for home in reversed(case.homes[len(chosen)]):
            sums = tuple(map(add, used, home.nbytes)), waits + home.waits, tuple(map(add, hidden, home.hidden))
            open_.append(((*chosen, home), *sums))


def _placement(work: Work, parts: list[Part], best: _Found, budget: int) -> Placement:
    case, homes = best.case, {part.name: home for part, home in zip(parts, best.homes, strict=True)}
    names, peaks = [stage.name for stage in case.stages], list(case.activations())
    for home in homes.values():
        peaks = list(map(add, peaks, home.nbytes))
    moving = [part.name for part in work.parts if homes[part.name].where in ("staged", "streamed")]
    stages = [tuple(name for name in moving if name in stage.needs) for stage in case.stages]
    early, peak = set(), max(peaks)
    for index, (now, then) in enumerate(pairwise(stages)):
        coming = sum(homes[name].nbytes[index + 1] for name in then if name not in now)
        if 0 < coming <= peak - peaks[index]:  # where it does not raise the peak
            peaks[index] += coming
            early.add(names[index + 1])
    return Placement(
        where={part.name: homes[part.name].where for part in work.parts},
        stages=dict(zip(names, stages, strict=True)),
        early=frozenset(early),
        banded=tuple(stage.name for stage in case.stages if case.bands and stage.bands),
        at_once=case.at_once,
        apart=case.apart,
        peaks=dict(zip(names, peaks, strict=True)),
        seconds=best.seconds,
        split=case.at_once < max(work.batches),
        budget=budget,
    )
