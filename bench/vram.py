"""Peak memory of each task, every scenario in processes of its own, against the baseline of this card.

    python bench/vram.py [--scenarios NAME ...] [--update]
    python bench/vram.py --simulate [--update]              the dry run's peaks, on a machine without a GPU

Scenarios (bench/vram_scenarios.py) are UniPic 1.0 with random weights that are loaded from disk, within the memory they
are meant for: torch is held to it and the rest of the card is taken away. Three processes each; medians of what torch
had allocated and reserved, of what the driver saw (with nvidia-ml-py), of each stage, of loading, and of the host.
Fails where a peak has grown since bench/baselines/<card>.json (allocated by 1 % or 16 MiB, whichever is more, reserved
by 3 %, the driver's by 5 % or 128 MiB), is above what is published, differs by more than 5 % from what the dry run
predicts, or is passed while loading; and where the host needs 2 GiB more than the checkpoint. --simulate compares what
the dry run predicts of an RTX 4090 with `simulated.json` and with what is published, and fails where planning takes
too long. --update rewrites the baseline.

Exit status: 0, or 1 with a table of what broke, or 2 beside other processes on the GPU. One JSON line last. Without a
CUDA device it says so and succeeds; --device cpu runs the scenarios there and shows what the host needs.
"""

import argparse
import json
import os
import re
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from unipic_run.bench.checkout import require_this_checkout
from unipic_run.bench.ops import Stopped, stop
from unipic_run.bench.vram_checkpoint import random_checkpoint
from unipic_run.bench.vram_gates import GROWTH, MIB, Report, broken, slower, table
from unipic_run.bench.vram_measured import measure
from unipic_run.bench.vram_scenarios import SCENARIOS, Scenario, changed
from unipic_run.bench.vram_watch import Driver, require_alone, the_card
from unipic_run.engine.errors import BudgetError, UsageError
from unipic_run.engine.estimate import estimate
from unipic_run.engine.gpus import DEVICE_NAMES

TOKENIZER = Path("tests/data/unipic-tiny/Qwen2.5-1.5B-Instruct/tokenizer.json")
KEPT = (*GROWTH, "seconds", "line")  # of a report, in a baseline
SIMULATED_ON = "rtx4090"


def main(arguments: list[str] | None = None) -> int:
    root = require_this_checkout(__file__)
    options = parse(arguments)
    if not (options.simulate or options.device == "cpu" or torch.cuda.is_available()):
        said = "no CUDA device: nothing measured (--simulate predicts, --device cpu shows what the host needs)"
        print(f"{said}\n{json.dumps({'bench': 'vram', 'skipped': said})}")
        return 0
    how = {name: getattr(options, name) for name in ("model", "res", "rounds", "dtype")}
    wanted = {one.name: one for one in (changed(SCENARIOS[name], **how) for name in options.scenarios)}
    card, driver, name = {}, None, "simulated" if options.simulate else "cpu"
    try:
        if name == "cpu" and options.device != "cpu":
            card = the_card()
            name, driver = slug(card["name"]), Driver(card["uuid"])
            require_alone(driver, options.shared)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        print(json.dumps({"bench": "vram", "passed": False, "refused": str(error)}))
        return error.exit_code
    found: dict[str, Report] = {}
    signal.signal(signal.SIGTERM, stop)
    reports = simulated(wanted) if options.simulate else measured(root, wanted, options, driver, known_card(card))
    with suppress(Stopped):  # when time is up, what is known so far still counts
        for each, report in reports:
            found[each] = report
            print(line(wanted[each], report), flush=True)
    return finish(options, wanted, found, options.baselines / f"{name}.json", card)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="vram", description="Peak memory of each task in fresh processes.")
    parser.add_argument("--scenarios", nargs="+", choices=SCENARIOS, default=list(SCENARIOS))
    parser.add_argument("--model", help="another architecture, always with random weights: a folder")
    parser.add_argument("--res", type=int, help="in place of the scenarios' own")
    parser.add_argument("--iters", "--steps", dest="rounds", type=int, help="in place of 32")
    parser.add_argument("--dtype", choices=["bf16", "fp16", "fp32"], help="in place of bf16")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--repeats", type=int, default=3, help="processes of each scenario (default 3)")
    parser.add_argument("--shared", action="store_true", help="measure beside other processes, for a look only")
    parser.add_argument("--baselines", type=Path, default=Path(__file__).resolve().parent / "baselines")
    parser.add_argument("--update", action="store_true", help="rewrite the baseline")
    parser.add_argument("--simulate", action="store_true", help="the dry run's peaks instead, no GPU needed")
    parser.add_argument("--time-limit", type=float, default=900.0, help="seconds a process may take (default 900)")
    options = parser.parse_args(arguments)
    if options.shared and options.update:
        parser.error("what was measured beside other processes is no baseline: --shared or --update")
    if options.device == "cpu" and options.update and not options.simulate:
        parser.error("--update is for a GPU, or for --simulate")
    return options


def simulated(wanted: dict[str, Scenario]) -> Iterator[tuple[str, Report]]:
    """Every scenario by the dry run, within the memory that it is given."""
    with tempfile.TemporaryDirectory() as kept:  # plans that other code has made must not count
        os.environ["UNIPIC_RUN_CACHE"] = kept
        for name, one in wanted.items():
            taken, start = [], time.process_time()
            try:
                for _ in range(3):  # from the second time on it is known
                    told = predicted(one, one.model, SIMULATED_ON)
                    taken.append(time.process_time() - start - sum(taken))
            except BudgetError as error:
                yield name, {"error": f"{error}, and {one.card} are meant"}
                continue
            placed = told["placement"]
            report = {"allocated_bytes": placed["peak_bytes"], "reserved_bytes": placed["reserved_bytes"]}
            report |= {"seconds": placed["seconds"], "line": placed["line"]}
            again = min(taken[1:])  # into one of them the collection of the dry run's garbage may fall
            yield name, report | {"planning_seconds": taken[0], "planning_again_seconds": again}


def predicted(one: Scenario, model: str, gpu: str) -> dict[str, Any]:
    """What the dry run says of a scenario on a card. Raises BudgetError."""
    how = {"res": one.res, "steps": one.rounds, "images": one.images, "quant": one.quant, "dtype": one.dtype}
    attention = "sdpa" if one.attention == "auto" else one.attention
    return estimate(model, one.task, **how, attention=attention, gpu=gpu, vram=one.card)


def measured(
    root: Path, wanted: dict[str, Scenario], options: argparse.Namespace, driver: Driver | None, gpu: str
) -> Iterator[tuple[str, Report]]:
    """Every scenario on the device, all of one model and precision from one checkpoint."""
    with tempfile.TemporaryDirectory() as kept:
        os.environ["UNIPIC_RUN_CACHE"] = str(Path(kept) / "cache")
        sizes: dict[Path, int] = {}
        for name, one in wanted.items():
            folder = Path(kept) / slug(f"{one.model} {one.dtype}")
            if folder not in sizes:
                sizes[folder] = random_checkpoint(one.model, root / TOKENIZER, one.dtype, folder, complain)
            report = measure(root, one, folder, options.device, driver, options.repeats, options.time_limit)
            if driver:  # where the device is the host, its memory holds what is computed as well
                report |= {"checkpoint_bytes": sizes[folder]}
            if report.get("captures"):  # what graphs keep, and libraries, is beside what a placement counts
                try:
                    foreseen = predicted(one, str(folder), gpu)
                except BudgetError as error:
                    yield name, {"error": f"it ran, and was foreseen not to fit: {error}"}
                    continue
                report["predicted_bytes"] += foreseen["graphs"]["kept"] + foreseen["workspace_bytes"]
            yield name, report


def known_card(card: dict[str, Any]) -> str:
    """Whose rates stand for those of this card, as the engine chooses them."""
    return card["name"] if card.get("name") in DEVICE_NAMES else SIMULATED_ON


def finish(
    options: argparse.Namespace, wanted: dict[str, Scenario], found: dict[str, Report], path: Path, card: dict[str, Any]
) -> int:
    """The table, the baseline, the JSON line and the exit status."""
    known = json.loads(path.read_text("utf-8"))["scenarios"] if path.is_file() else {}
    before = {} if options.update else known
    whole = wanted.keys() == SCENARIOS.keys()
    errors = [f"{name}: {report['error']}" for name, report in found.items() if "error" in report]
    errors += [f"{name}: not reached before time was up" for name in wanted.keys() - found.keys()]
    errors += [
        f"{name}: in the baseline, and no scenario any more" for name in sorted(before.keys() - found.keys()) if whole
    ]
    fine = {name: report for name, report in found.items() if "error" not in report}
    rows = [row for name, report in fine.items() for row in broken(wanted[name], report, before.get(name, {}))]
    rows += slower(wanted, fine)
    if options.update and not errors:
        kept = {
            name: {key: report[key] for key in KEPT if report.get(key) is not None} for name, report in fine.items()
        }
        kept = kept if whole else known | kept
        write_baseline(path, {"device_name": card.get("name", f"{SIMULATED_ON}, predicted"), "scenarios": kept})
    elif fresh := sorted(fine.keys() - before.keys() if options.simulate or card else ()):
        said = f"no baseline in {path.name} for {', '.join(fresh)}: --update makes one"
        if options.simulate and whole:  # of a card there may be none yet
            errors.append(said)
        else:
            complain(said)
    for text in (*table(rows), *errors):
        complain(text)
    summary = {"bench": "vram", "simulated": options.simulate, "card": card, "baseline": path.name if known else None}
    summary |= {"shared": options.shared, "passed": not (rows or errors), "errors": errors}
    print(json.dumps(summary | {"broken": list(map(asdict, rows)), "scenarios": found}))
    return 1 if rows or errors else 0


def line(scenario: Scenario, report: Report) -> str:
    """What was found of a scenario, in GiB."""
    if "error" in report:
        return f"{scenario.name:<18} {report['error']}"
    names = {"allocated": "allocated_bytes", "predicted": "predicted_bytes", "reserved": "reserved_bytes"}
    names |= {"driver": "nvml_bytes", "loading": "load_bytes", "host": "host_bytes"}
    said = [f"{word} {report[key] / 1024 / MIB:.2f}" for word, key in names.items() if report.get(key) is not None]
    if scenario.published:
        said.insert(1, f"published {scenario.published:g}")
    if report.get("nvml_missing"):
        said.append(f"driver not measured: {report['nvml_missing']}")
    placed = f"; {report['line']}" if "line" in report else ""
    return f"{scenario.name:<18} {', '.join(said)}{placed}"


def write_baseline(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def slug(name: str) -> str:
    """A card's name as a file name."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def complain(sentence: str) -> None:
    print(sentence, file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
