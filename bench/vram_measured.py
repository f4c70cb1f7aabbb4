"""Scenarios on a real device: each in fresh processes that load a checkpoint as a user's would, and are looked at."""

import statistics
import sys
from pathlib import Path
from typing import Any

from unipic_run.bench.latency import UNSETTLED
from unipic_run.bench.vram_gates import Report
from unipic_run.bench.vram_scenarios import Scenario
from unipic_run.bench.vram_watch import Done, Driver, last_json, last_line, run_watched

PEAKS = ("allocated_bytes", "reserved_bytes", "nvml_bytes", "host_bytes", "load_bytes", "load_reserved_bytes")


def measure(
    root: Path, scenario: Scenario, folder: Path, device: str, driver: Driver | None, repeats: int, limit: float
) -> Report:
    """Medians over `repeats` processes of at most `limit` seconds each; or `error`, and no more processes then."""
    found = []
    for _ in range(repeats):
        report = told(run_watched(command(root, scenario, folder, device), driver, limit), scenario.task)
        if "error" in report:
            return report
        found.append(report)
    return merged(found)


def command(root: Path, scenario: Scenario, folder: Path, device: str) -> list[str]:
    """Two requests through bench/latency.py: behind the first, graphs hold memory too."""
    how = {"model": folder, "tasks": scenario.task, "res": scenario.res, "iters": scenario.rounds}
    how |= {"dtype": scenario.dtype, "quant": scenario.quant, "attn": scenario.attention, "batch": scenario.images}
    how |= {"device": device, "warm-up": 1}
    words = [word for name, value in how.items() for word in (f"--{name}", str(value))]
    if device != "cpu" and scenario.card:
        words += ["--vram", str(scenario.card), "--ballast"]
    return [sys.executable, str(root / "bench" / "latency.py"), *words, "--json"]


def told(done: Done, task: str) -> Report:
    """What one process has measured of itself, and what was seen of it."""
    if done.status is None:
        return {"error": "took too long"}
    said = last_json(done.stdout) or {}
    if done.status not in (0, UNSETTLED) or task in said.get("left", [task]):  # some of its runs are not all
        return {"error": last_line(done.stderr)}
    measured, load, nvml = said["tasks"][task], said["load"]["memory"] or {}, done.seen.nvml_bytes
    report = {
        name: value for name, value in measured["memory"].items() if name in ("allocated_bytes", "reserved_bytes")
    }
    report |= {"stages": measured["stage_memory"], "host_bytes": done.seen.host_bytes}
    report |= {f"load_{name}".replace("load_allocated", "load"): value for name, value in load.items()}
    report["nvml_bytes"] = None if nvml is None else nvml - said["ballast_bytes"]
    if placement := measured.get("placement"):
        report |= {"predicted_bytes": placement["peak_bytes"], "predicted_stages": placement["peaks"]}
        report |= {"line": placement["line"], "captures": said["graphs"]["captures"]}
    report |= {"milliseconds": measured["milliseconds"], "load_seconds": said["load"]["seconds"]}
    report |= {"warnings": said["warnings"], "unsettled": measured["unsettled"]}
    report |= {"strangers": sorted(done.seen.strangers)}
    report |= {"nvml_missing": done.seen.nvml_missing} if nvml is None else {}
    return report | {"process_rss_bytes": said["peak_rss_bytes"], "versions": said["versions"]}


def merged(found: list[Report]) -> Report:
    """The first process's report with the medians of all in place of its peaks, and between which values they lay."""
    report: dict[str, Any] = dict(found[0])
    spread = {}
    for name in PEAKS:
        each = [one[name] for one in found if one.get(name) is not None]
        if each:
            report[name], spread[name] = int(statistics.median(each)), [min(each), max(each)]
    report["stages"] = {
        stage: {name: int(statistics.median(one["stages"][stage][name] for one in found)) for name in peak}
        for stage, peak in found[0]["stages"].items()
    }
    report["warnings"] = sorted({text for one in found for text in one["warnings"]})
    report["strangers"] = sorted({pid for one in found for pid in one["strangers"]})
    return report | {"spread": spread, "processes": len(found)}
