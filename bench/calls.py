"""Runs of one task, one after the other: what each took, what it compiled and captured, and whether that has an end."""

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

from unipic_run.engine.graphs import Counts

# From which run of a shape on there is none: engine/graphs.py captures a round when its shape comes a second time.
SETTLED = {"compile_seconds": (2, "compiled kernels for {:.3g} s"), "captures": (3, "captured {} graphs")}
CAPTURING = 0.5  # seconds that all graphs of a shape may take to capture
REPLAYS = 3500  # of a run, at most
Stages = dict[str, float]  # milliseconds


@dataclass(frozen=True)
class Call:
    milliseconds: Stages  # of each stage, and in all
    rounds: list[float]  # milliseconds
    compile_seconds: float  # of kernels that were not on the disk; part of the stages
    capture_seconds: float  # of graphs; part of the stages
    captures: int
    replays: int


def watched(once: Callable[[], tuple[Stages, list[float]]], counts: Counts) -> Call:
    """One run; `counts` goes on counting meanwhile."""
    before, start = replace(counts), time.perf_counter()
    stages, rounds = once()
    total = 1000 * (time.perf_counter() - start)
    compiling = stages.get("compile", 0.0) / 1000
    stages = {name: took for name, took in stages.items() if name not in ("compile", "capture")}
    return Call(
        milliseconds=stages | {"total": total},
        rounds=rounds,
        compile_seconds=compiling,
        capture_seconds=counts.seconds - before.seconds,
        captures=counts.captures - before.captures,
        replays=counts.replays - before.replays,
    )


def summed_up(calls: list[Call], warm_up: int) -> dict[str, Any]:
    """Medians of the runs behind those that warm up, and all of them one by one."""
    warm = calls[warm_up:] or calls[-1:]
    stages = {
        name: statistics.median(call.milliseconds.get(name, 0.0) for call in warm) for name in warm[0].milliseconds
    }
    rounds = [statistics.median(times) for times in zip(*(call.rounds for call in warm), strict=True)]
    found = {"milliseconds": stages, "round_milliseconds": rounds, "unsettled": unsettled(calls)}
    if len(calls) > 1:
        found["first_extra_milliseconds"] = calls[0].milliseconds["total"] - stages["total"]
        found["second_extra_milliseconds"] = calls[1].milliseconds["total"] - stages["total"]
    return found | {"calls": list(map(asdict, calls))}


def unsettled(calls: list[Call]) -> list[str]:
    """Which runs of one shape compiled or captured although they should have found everything there, or too much."""
    found = [
        f"run {number} {said.format(getattr(call, name))}"
        for name, (first, said) in SETTLED.items()
        for number, call in enumerate(calls, 1)
        if number >= first and getattr(call, name)
    ]
    capturing, replays = sum(call.capture_seconds for call in calls), max(call.replays for call in calls)
    found += [f"capturing took {capturing:.2g} s, more than {CAPTURING}"] * (capturing > CAPTURING)
    return found + [f"a run replayed {replays} graphs, more than {REPLAYS}"] * (replays > REPLAYS)
