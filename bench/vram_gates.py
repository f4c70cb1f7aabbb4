"""What a scenario may take: what it took before, what is published of it, and what the dry run has foreseen."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from unipic_run.bench.vram_scenarios import Scenario
from unipic_run.engine.gpus import GIB, MIB

GROWTH = {  # share and bytes by which a peak may grow, whichever is more
    "allocated_bytes": (0.01, 16 * MIB),
    "reserved_bytes": (0.03, 0),
    "nvml_bytes": (0.05, 128 * MIB),
}
SLOWER = 0.02  # share by which a predicted time may grow
FORESEEN = 0.05  # share of what was measured by which the dry run may be wrong
PLANNING = 20.0  # seconds of a core that the plan of a request for one picture may take
PLANNED = 0.3  # and of any request the second time
HOST_SPARE = 2 * GIB  # of the host's memory, besides what the checkpoint's files take
Report = dict[str, Any]  # of one scenario, bytes and seconds


@dataclass(frozen=True)
class Broken:
    """A row of the table of what broke: `was` is what it is compared with."""

    scenario: str
    what: str
    was: str
    now: str
    allowed: str


def broken(scenario: Scenario, now: Report, before: Report) -> Iterator[Broken]:
    """Every gate that a scenario breaks; what was not measured, or not before, breaks none."""
    for what, was, is_, allowed in (
        *grown(now, before),
        *published(scenario, now),
        *foreseen(now),
        *loading(now),
        *planning(scenario, now),
        *alone(now),
    ):
        yield Broken(scenario.name, what, was, is_, allowed)


Row = tuple[str, str, str, str]


def grown(now: Report, before: Report) -> Iterator[Row]:
    for name, (share, least) in GROWTH.items():
        if now.get(name) is None or before.get(name) is None:
            continue
        limit = before[name] + max(int(share * before[name]), least)
        if now[name] > limit:
            yield name.removesuffix("_bytes"), mib(before[name]), mib(now[name]), mib(limit)
    if "seconds" in now and "seconds" in before and now["seconds"] > (1 + SLOWER) * before["seconds"]:
        yield "predicted time", *(f"{x:.2f} s" for x in (before["seconds"], now["seconds"])), f"+{SLOWER:.0%}"


def published(scenario: Scenario, now: Report) -> Iterator[Row]:
    if scenario.published and now.get("allocated_bytes", 0) > scenario.published * GIB:
        limit = mib(scenario.published * GIB)
        yield "allocated, published", limit, mib(now["allocated_bytes"]), limit


def foreseen(now: Report) -> Iterator[Row]:
    """A peak that the dry run has predicted wrongly, too high or too low: a failure of the simulation."""
    if "predicted_bytes" not in now or "allocated_bytes" not in now:
        return
    predicted, measured = now["predicted_bytes"], now["allocated_bytes"]
    if abs(predicted - measured) > FORESEEN * measured:
        yield "allocated, predicted: the simulation is wrong", mib(predicted), mib(measured), f"within {FORESEEN:.0%}"


def loading(now: Report) -> Iterator[Row]:
    """Loading takes no more of the card than running does, and of the host the checkpoint and a little."""
    if now.get("load_bytes", 0) > now.get("allocated_bytes", 0):
        limit = mib(now["allocated_bytes"])
        yield "allocated while loading, above running", limit, mib(now["load_bytes"]), limit
    if now.get("host_bytes") is not None and "checkpoint_bytes" in now:
        limit = now["checkpoint_bytes"] + HOST_SPARE
        if now["host_bytes"] > limit:
            yield "host memory, beside the checkpoint", mib(now["checkpoint_bytes"]), mib(now["host_bytes"]), mib(limit)


def planning(scenario: Scenario, now: Report) -> Iterator[Row]:
    """Of a simulation: what a user waits for before anything is computed."""
    limits = {"planning_seconds": PLANNING * scenario.images, "planning_again_seconds": PLANNED}
    for name, limit in limits.items():
        if now.get(name, 0.0) > limit:
            yield name.removesuffix("_seconds").replace("_", " "), "", f"{now[name]:.2f} s", f"{limit:g} s"


def alone(now: Report) -> Iterator[Row]:
    """What makes a measurement worth nothing."""
    for said in now.get("warnings", ()):
        if said.startswith("out of memory"):
            yield "ran out of memory", "the plan", said, "never"
    if now.get("strangers"):
        yield "another process used the GPU", "none", f"pid {', '.join(map(str, now['strangers']))}", "none"


def slower(scenarios: dict[str, Scenario], found: dict[str, Report]) -> Iterator[Broken]:
    """Scenarios that are predicted to take too many times as long as another one."""
    for name, now in found.items():
        other, times = scenarios[name].at_most or ("", 0.0)
        if other not in found or "seconds" not in now:
            continue
        was = found[other]["seconds"]
        if now["seconds"] > times * was:
            told = f"{was:.2f} s of {other}", f"{now['seconds']:.2f} s", f"{times:g} times"
            yield Broken(name, "predicted time, published", *told)


def mib(nbytes: float) -> str:
    return f"{nbytes / MIB:.0f} MiB"


def table(rows: list[Broken]) -> list[str]:
    """Lines with aligned columns, the first of them their names; nothing for no rows."""
    if not rows:
        return []
    cells = [("scenario", "what", "was", "is", "allowed"), *(tuple(vars(row).values()) for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    return ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in cells]
