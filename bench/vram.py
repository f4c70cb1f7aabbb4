"""Peak memory of each task, every scenario in a process of its own, against the baseline of this card.

    python bench/vram.py [--res 1024] [--update-baseline]
    python bench/vram.py --simulate [--update-baseline]      the dry run's peaks, on a machine without a GPU

A baseline is `bench/baselines/<card>.json`. Allocated memory may grow by 1 % or 16 MiB, whichever is more, reserved
memory by 3 %. Without a CUDA device it says so and succeeds; --device cpu measures resident memory and gates nothing.
--simulate predicts what UniPic 1.0 takes at full size within the memory it is meant for, against `simulated.json`.
One JSON line last; exit status 1 when a gate is broken or a scenario fails.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from unipic_run.bench.checkout import require_this_checkout
from unipic_run.engine.errors import BudgetError
from unipic_run.engine.estimate import estimate
from unipic_run.engine.placing import needed

SCENARIOS = {  # name -> task, images together
    "gen": ("gen", 1),
    "gen-batch4": ("gen", 4),
    "edit": ("edit", 1),
    "ask": ("ask", 1),
}
MIB, GIB = 2**20, 2**30
SLOWER = 1.02  # what a predicted time may grow by
INT8 = {"quant": "int8", "attention": "int8-qk"}
SIMULATED = {  # name -> task, how, GiB of weights and activations that it must keep to
    "gen-bf16": ("gen", {}, 5.5),
    "gen-int8": ("gen", INT8, 3.2),
    "gen-int8-tight": ("gen", INT8, 1.5),
    "gen-int8-batch4": ("gen", INT8 | {"images": 4}, 5.0),
    "edit-int8": ("edit", INT8, 3.8),
    "ask-int8": ("ask", INT8, 3.0),
    "ask-int8-512": ("ask", INT8 | {"res": 512}, 2.5),
}


def main(arguments: list[str] | None = None) -> int:
    root = require_this_checkout(__file__)
    options = parse(arguments)
    if options.simulate:
        return simulate(options)
    if options.device != "cpu" and not torch.cuda.is_available():
        said = "no CUDA device: nothing measured (--device cpu measures resident memory)"
        print(f"{said}\n{json.dumps({'bench': 'vram', 'skipped': said})}")
        return 0
    found = {f"{name}-{options.res}": run(root, *SCENARIOS[name], options) for name in options.scenarios}
    card = next((report["device_name"] for report in found.values() if "device_name" in report), "unknown")
    baseline = options.baselines / f"{slug(card)}.json"
    known = json.loads(baseline.read_text("utf-8"))["scenarios"] if baseline.is_file() else {}
    failures = [f"{name}: {report['error']}" for name, report in found.items() if "error" in report]
    for name, report in found.items():
        print(f"{name:<18} {report.get('memory') or report['error']}")
        if not options.update_baseline:
            failures += [f"{name}: {text}" for text in exceeded(report.get("memory", {}), known.get(name, {}))]
    if options.update_baseline and not failures:
        write_baseline(baseline, {"device_name": card, "scenarios": known | memory_of(found)})
    print(*failures, sep="\n", file=sys.stderr)
    summary = {"bench": "vram", "device_name": card, "baseline": str(baseline) if known else None}
    print(json.dumps(summary | {"passed": not failures, "failures": failures, "scenarios": found}))
    return 1 if failures else 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="vram", description="Peak memory of each task in a fresh process.")
    parser.add_argument("--model", default="unipic", help="whose architecture, with random weights (default unipic)")
    parser.add_argument("--res", type=int, default=1024)
    parser.add_argument("--iters", type=int, default=32)
    parser.add_argument("--dtype", default="bf16")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--scenarios", nargs="+", choices=SCENARIOS, default=list(SCENARIOS))
    parser.add_argument("--baselines", type=Path, default=Path(__file__).resolve().parent / "baselines")
    parser.add_argument("--update-baseline", action="store_true")
    parser.add_argument("--simulate", action="store_true", help="the dry run's peaks instead, no GPU needed")
    parser.add_argument("--time-limit", type=float, default=900.0, help="seconds a scenario may take (default 900)")
    return parser.parse_args(arguments)


def simulate(options: argparse.Namespace) -> int:
    """Every scenario by the dry run, within its memory and against `simulated.json`."""
    baseline, found, failures = options.baselines / "simulated.json", {}, []
    kept = tempfile.TemporaryDirectory()  # plans that other code has made must not count
    os.environ["UNIPIC_RUN_CACHE"] = kept.name
    for name, (task, how, limit) in SIMULATED.items():
        try:
            planned = estimate("unipic", task, vram=needed(int(limit * GIB)), **how)["placement"]
        except BudgetError as error:
            failures.append(f"{name}: {error}, and {limit} are meant")
            continue
        found[name] = {"allocated_bytes": planned["peak_bytes"], "seconds": planned["seconds"], "line": planned["line"]}
        print(f"{name:<18} {planned['line']}", flush=True)
    known = json.loads(baseline.read_text("utf-8"))["scenarios"] if baseline.is_file() else {}
    if options.update_baseline and not failures:
        write_baseline(baseline, {"device_name": "RTX 4090, predicted", "scenarios": found})
    elif missing := known.keys() - found.keys():
        failures.append(f"not simulated: {', '.join(sorted(missing))}")
    else:
        failures += [f"{name}: {text}" for name in found for text in exceeded(found[name], known.get(name, {}))]
    print(*failures, sep="\n", file=sys.stderr)
    print(json.dumps({"bench": "vram", "simulated": True, "passed": not failures, "failures": failures} | found))
    return 1 if failures else 0


def run(root: Path, task: str, batch: int, options: argparse.Namespace) -> dict[str, Any]:
    """One scenario through bench/latency.py: its memory, time and versions, or an error."""
    command = [sys.executable, str(root / "bench" / "latency.py"), "--random-weights", "--json", "--tasks", task]
    for name in ("model", "res", "iters", "dtype", "device"):
        command += [f"--{name}", str(getattr(options, name))]
    try:
        done = subprocess.run(
            [*command, "--batch", str(batch)], capture_output=True, text=True, timeout=options.time_limit
        )
    except subprocess.TimeoutExpired:
        return {"error": f"took more than {options.time_limit:g} s"}
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or ["no message"])[-1][:500]}
    report = json.loads(done.stdout.splitlines()[-1])
    measured = report["tasks"][task]
    return {
        "memory": measured["memory"] | {"process_rss_bytes": report["peak_rss_bytes"]},
        "milliseconds": measured["milliseconds"],
        "device_name": report["device_name"],
        "versions": report["versions"],
    }


def exceeded(now: dict[str, int], before: dict[str, int]) -> list[str]:
    """Which gates are broken, as sentences."""
    allowed = {
        "allocated_bytes": lambda old: old + max(old // 100, 16 * MIB),
        "reserved_bytes": lambda old: old + old * 3 // 100,
    }
    said = [
        f"{name.removesuffix('_bytes')} {now[name] / MIB:.0f} MiB, allowed {limit(before[name]) / MIB:.0f} MiB"
        for name, limit in allowed.items()
        if name in now and name in before and now[name] > limit(before[name])
    ]
    if "seconds" in now and "seconds" in before and now["seconds"] > SLOWER * before["seconds"]:
        said.append(f"{now['seconds']:.2f} s, allowed {SLOWER * before['seconds']:.2f} s")
    return said


def memory_of(found: dict[str, Any]) -> dict[str, Any]:
    return {name: report["memory"] for name, report in found.items()}


def write_baseline(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def slug(name: str) -> str:
    """A card's name as a file name."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


if __name__ == "__main__":
    sys.exit(main())
