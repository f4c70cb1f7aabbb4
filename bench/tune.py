"""Measures tile sizes, warps and stages of the kernels that have candidates, and writes `kernels/tuned/sm_XX.json`.

    python bench/tune.py [--only KERNEL ...] [--minutes 30] [--most 40] [--repeat 20] [--jobs 4] [--out FOLDER]

For every shape class that the cases marked gpu ask for (kernels/_tuned.py): candidates are compiled without the card,
and those that spill registers, do not fit its shared memory or do not compile are dropped. The others have to agree
with the operator's reference, and only then are timed as in bench/ops.py. What is at least 2 % faster than the kernel's
own heuristic is listed. The time is shared out among the classes; a file is extended, so that a part can be measured
again. Then every operator, or those of the kernels named, is timed beside torch (bench/against_torch.py); where torch
is faster, that class of calls is listed as torch's. A line a class, then one JSON line; exit status 1 where a
heuristic's result is wrong. Without a CUDA device it says so and succeeds. Nothing but this command ever measures.
"""

import argparse
import datetime
import json
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from unipic_run.bench import ops
from unipic_run.bench.against_torch import WORTH, calls_beside_torch, listed
from unipic_run.bench.agreement import agreement
from unipic_run.bench.aot import on_meta, workers
from unipic_run.bench.aot_compile import build, specialised
from unipic_run.bench.checkout import require_this_checkout
from unipic_run.bench.drawn import drawn
from unipic_run.engine.gpus import SHARED_PER_BLOCK
from unipic_run.engine.precision import true_float32
from unipic_run.kernels import _tuned
from unipic_run.kernels._op import HAS_TRITON, recording
from unipic_run.kernels._registry import Check, checks
from unipic_run.kernels._tuned import Options, Question

WARPS, STAGES = (4, 8), (2, 3, 4)
ATTENTION = {"BLOCK_M": (32, 64, 128), "BLOCK_N": (32, 64, 128), "num_warps": WARPS, "num_stages": STAGES}
PRODUCT = {
    "BLOCK_M": (16, 32, 64, 128),
    "BLOCK_N": (32, 64, 128, 256),
    "BLOCK_K": (32, 64, 128),
    "num_warps": WARPS,
    "num_stages": STAGES,
}
# Of each kernel's options, the values worth a try; an option that a kernel's default does not have is left out.
GRIDS: dict[str, dict[str, Sequence[int]]] = {
    "attention": ATTENTION,
    "attention_int8": ATTENTION,
    "decode_attention": {"BLOCK_N": (32, 64, 128), "num_warps": (2, 4, 8), "num_stages": STAGES},
    "prefix_attention": ATTENTION,
    "prefix_attention_int8": ATTENTION,
    "int8_linear": PRODUCT,
    "int8_of_groups": PRODUCT,
    "int8_to_groups": PRODUCT,
    "int8_to_heads": PRODUCT,
    "int8_to_joint": PRODUCT,
    "int8_to_rotary": PRODUCT,
    "modulated_linear": PRODUCT | {"BLOCK_N": (16, 32, 64, 128)},
    "gated_linear": PRODUCT | {"BLOCK_N": (16, 32, 64, 128)},
    "head_int8": PRODUCT | {"BLOCK_M": (16, 32, 64), "BLOCK_N": (128, 256)},
    "int8_weight": {
        "BLOCK_N": (2, 4, 8, 16, 32),
        "BLOCK_K": (32, 128, 256, 512, 1024),
        "SPLIT": (1, 2, 4, 8),
        "num_warps": (2, 4, 8),
        "num_stages": (3, 4, 5),
    },
    "norm": {"num_warps": (1, 2, 4, 8, 16)},
}


@dataclass
class Class:
    """One shape class of a kernel, and the cases that ask for it: their times are added."""

    question: Question
    checks: list[Check] = field(default_factory=list)

    def __str__(self) -> str:
        return f"{self.question.kernel} {self.question.key}"


def main(arguments: list[str] | None = None) -> int:
    require_this_checkout(__file__)
    options = parse(arguments)
    if not (torch.cuda.is_available() and HAS_TRITON):
        said = "no CUDA device with triton: nothing measured"
        print(f"{said}\n{json.dumps({'bench': 'tune', 'skipped': said})}")
        return 0
    major, minor = torch.cuda.get_device_capability()
    capability, deadline = 10 * major + minor, time.monotonic() + 60 * options.minutes
    print(f"{'kernel and shape class':<48} {'heuristic us':>12} {'best us':>9} {'tried':>5} {'dropped':>7}  options")
    with workers(options.jobs) as each, torch.inference_mode(), true_float32():
        rows, path = [], options.out / f"sm_{capability}.json"
        for row in tune(todo := classes(options.only), options, capability, deadline, each):
            rows.append(row)
            write(path, capability, rows, ops.describe())  # so that nothing measured is lost to what ends it
        named = {check.operator.name for one in todo for check in one.checks} if options.only else None
        beside = list(calls_beside_torch(real(), named, options.repeat))  # with the options that were just listed
    write(path, capability, rows, ops.describe(), beside)
    wrong = [f"{row['kernel']} {row['key']}: {row['problem']}" for row in rows if row["problem"]]
    late = [f"{row['kernel']} {row['key']}" for row in rows if row["late"]]
    summary = ops.describe() | {"bench": "tune", "file": str(path), "wrong": wrong, "out_of_time": late, "rows": rows}
    summary["beside_torch"] = beside
    print(json.dumps(summary | {"passed": bool(rows) and not wrong}))
    return 1 if wrong or not rows else 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="tune", description="Measure kernel options on this card and list the best.")
    parser.add_argument("--only", nargs="+", metavar="KERNEL", choices=GRIDS, help=f"of {', '.join(GRIDS)}")
    parser.add_argument("--minutes", type=float, default=30, help="for trying; torch's paths come behind (default 30)")
    parser.add_argument("--most", type=int, default=40, help="candidates of each shape class (default 40)")
    parser.add_argument("--repeat", type=int, default=20, help="timed runs of each (default 20)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes that compile")
    parser.add_argument("--out", type=Path, default=_tuned.FOLDER, metavar="FOLDER", help="where the table is")
    return parser.parse_args(arguments)


def classes(only: Sequence[str] | None) -> list[Class]:
    """What launchers ask for in the families' real shapes, heard on the meta device."""
    found: dict[tuple[str, str], Class] = {}
    for check in real():
        with _tuned.asking() as questions:
            check.operator.op(*on_meta(check))
        for question in questions:
            if question.kernel in GRIDS and (not only or question.kernel in only):
                one = found.setdefault((question.kernel, question.key), Class(question))
                one.checks += [check] if check not in one.checks else []
    return list(found.values())


def real() -> list[Check]:
    """The families' own shapes; those for the interpreter too are small, and there for their tails."""
    return [check for check in checks("gpu") if "interp" not in check.case.marks]


def tune(
    todo: list[Class], options: argparse.Namespace, capability: int, deadline: float, each: Callable[..., Iterator[Any]]
) -> Iterator[dict[str, Any]]:
    """A row for each class, as they are done; what won elsewhere is tried early."""
    won: dict[str, Counter[tuple[tuple[str, int], ...]]] = {kernel: Counter() for kernel in GRIDS}
    for at, one in enumerate(todo):
        now, before = time.monotonic(), won[one.question.kernel]
        until = now + (deadline - now) / (len(todo) - at)
        early = [dict(winner) for winner, _ in before.most_common()]
        row = best_of(
            one, candidates(one.question, capability, early)[: options.most], options, capability, until, each
        )
        before[tuple(sorted(row["options"].items()))] += 1
        print(line(row), flush=True)
        torch.cuda.empty_cache()
        yield row


def candidates(question: Question, capability: int, early: Iterable[Options] = ()) -> list[Options]:
    """All that could be right: the heuristic, then `early`, then the rest in a random but always the same order."""
    grid = {name: values for name, values in GRIDS[question.kernel].items() if name in question.default}
    every = [dict(zip(grid, values, strict=True)) for values in product(*grid.values())]
    random.Random(0).shuffle(every)
    ordered = [question.default]
    for options in [*early, *every]:
        if (
            options not in ordered
            and options.keys() == question.default.keys()
            and possible(options, question, capability)
        ):
            ordered.append(options)
    return ordered


def possible(options: Options, question: Question, capability: int) -> bool:
    try:
        _tuned.check(options, question, shared_bytes(capability))
    except ValueError:
        return False
    return True


def shared_bytes(capability: int) -> int:
    """Of one block; on a card we know nothing of, the least that any has."""
    return SHARED_PER_BLOCK.get(capability, min(SHARED_PER_BLOCK.values()))


def best_of(
    one: Class,
    some: list[Options],
    options: argparse.Namespace,
    capability: int,
    until: float,
    each: Callable[..., Iterator[Any]],
) -> dict[str, Any]:
    """The row of a class. The heuristic comes first and is measured whatever the time."""
    row = {"kernel": one.question.kernel, "key": one.question.key, "options": some[0], "problem": "", "late": False}
    row |= {"cases": [str(check) for check in one.checks], "tried": 0, "dropped": 0}
    prepared, batch = [remembered(check) for check in one.checks], max(options.jobs, 1)
    for begin in range(0, len(some), batch):
        if begin and time.monotonic() > until:
            return row | {"late": True}
        part = some[begin : begin + batch]
        for candidate, fits in zip(part, compiled(one, part, capability, each), strict=True):
            seconds = measured(one.question.kernel, candidate, prepared, options.repeat) if fits else None
            row["tried"] += 1
            row["dropped"] += seconds is None
            if candidate is some[0]:
                row |= {"seconds": seconds, "heuristic_seconds": seconds}
                if seconds is None:
                    return row | {"problem": "the heuristic spills, fails or disagrees with the reference"}
            elif seconds is not None and seconds < min(row["seconds"], WORTH * row["heuristic_seconds"]):
                row |= {"seconds": seconds, "options": candidate}
    return row


def compiled(
    one: Class, some: Sequence[Options], capability: int, each: Callable[..., Iterator[Any]]
) -> Iterator[bool]:
    """Whether each candidate compiles for the card in all of the class's cases, spills nothing and fits its memory."""
    configurations = []
    for options in some:
        with _tuned.trying(one.question.kernel, options), recording() as launches:
            for check in one.checks:
                check.operator.op(*on_meta(check))
        found = (specialised(launch, launch.kernel.__module__) for launch in launches)
        configurations.append(list({c.key: c for c in found}.values()))
    flat = [c for several in configurations for c in several]
    results = iter(list(each(build, flat, [capability] * len(flat))))
    for several in configurations:
        found = [next(results) for _ in several]
        limit = shared_bytes(capability)
        yield all("error" not in f and not f["spilled"] and f["shared"] <= limit for f in found)


def remembered(check: Check) -> Check:
    """The same, but arguments and the reference's results are made once for all candidates."""
    arguments, results = drawn(check.case, ops.DEVICE), []

    def reference(*wide: Any) -> Any:
        if not results:
            results.append((check.reference or check.operator.torch)(*wide))
        return results[0]

    return replace(check, case=replace(check.case, make=lambda device: arguments), reference=reference)


def measured(kernel: str, options: Options, prepared: list[Check], repeat: int) -> float | None:
    """Seconds of all cases together; None where one does not run or is wrong."""
    total = 0.0
    with _tuned.trying(kernel, options):
        for check in prepared:
            operator, arguments = check.operator, check.case.make(ops.DEVICE)
            try:
                if not agreement(check, ops.DEVICE, operator.op).holds:
                    return None
                total += ops.seconds(lambda run=operator.op, given=arguments: run(*given), repeat)
            except Exception:  # a candidate may ask for what the card has not, and the others must still be measured
                return None
    return total


def write(
    path: Path,
    capability: int,
    rows: list[dict[str, Any]],
    versions: dict[str, Any],
    beside: Iterable[dict[str, Any]] = (),
) -> None:
    """The table with these classes, in place of what it said of them. Never visible half-written."""
    try:
        known = _tuned.read(path)
    except (OSError, ValueError):
        known = {"kernels": {}}
    kernels, slower = known["kernels"], listed(known.get("torch", {}), beside)
    for row in rows:
        entries = kernels.setdefault(row["kernel"], {})
        entries.pop(row["key"], None)
        if not row["problem"] and row["seconds"] < row["heuristic_seconds"]:
            times = {"microseconds": row["seconds"], "heuristic_microseconds": row["heuristic_seconds"]}
            entries[row["key"]] = {"options": row["options"]} | {name: round(1e6 * s, 2) for name, s in times.items()}
    named = {"about": "By bench/tune.py: medians over the cases of a shape class, listed where worth it."}
    named |= {name: value for name, value in versions.items() if name != "bench"}
    named |= {"source": "measured", "date": datetime.date.today().isoformat(), "shared_bytes": shared_bytes(capability)}
    whole = named | {"kernels": {kernel: entries for kernel, entries in kernels.items() if entries}, "torch": slower}
    path.parent.mkdir(parents=True, exist_ok=True)
    half = path.with_suffix(".partial")
    half.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    half.replace(path)
    _tuned.forget()


def line(row: dict[str, Any]) -> str:
    name = f"{row['kernel']} {row['key']}"
    if row["problem"]:
        return f"{name:<48} {row['problem']}"
    times = f"{1e6 * row['heuristic_seconds']:>12.1f} {1e6 * row['seconds']:>9.1f}"
    counts = f"{row['tried']:>5} {row['dropped']:>7}{'  out of time' * row['late']}"
    return f"{name:<48} {times} {counts}  {' '.join(f'{n}={v}' for n, v in row['options'].items())}"


if __name__ == "__main__":
    sys.exit(main())
