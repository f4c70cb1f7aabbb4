"""Compiles every configuration of every kernel for sm_89, and the largest of each kernel for the other cards.

    python bench/aot.py [--only NAME ...] [--jobs 4] [--json FILE]
    python bench/aot.py --file my_kernel.py

Needs no GPU: operators, and what every family does at 1024x1024 in bf16 and in int8, run on the meta device, which
notes what would be launched. Each distinct launch is compiled with the attributes that a user's launch would give it;
where another card has a tuned table, all of them for that card too, as the table has them. Fails on spilled registers,
on more shared memory than a block may have on the card, on int8 operands that no int8 tensor-core instruction
multiplies, on whatever does not compile, and on a kernel or an entry of a table that no case leads to. A table, then
one JSON line; exit status 1 when something fails, 2 where nothing can be compiled.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from unipic_run.bench.aot_compile import HOME, Configuration, build, load, specialised
from unipic_run.bench.aot_coverage import elsewhere, left_out, table_problems
from unipic_run.bench.checkout import require_this_checkout
from unipic_run.bench.drawn import drawn
from unipic_run.engine import families
from unipic_run.engine.estimate import ask_for, tasks_of
from unipic_run.engine.gpus import SHARED_PER_BLOCK
from unipic_run.kernels import _tuned
from unipic_run.kernels._op import HAS_TRITON, recording, recording_all
from unipic_run.kernels._registry import Check, checks, kernel_modules

PRECISIONS = (("none", "sdpa"), ("int8", "int8-qk"))  # quant, attention
REQUEST = "unipic-run"  # how a case begins that is none of a kernel's own


@dataclass
class Job:
    """A configuration, what asks for it, and what its compilation found, by compute capability."""

    configuration: Configuration
    cases: list[str]
    found: dict[int, dict[str, Any]] = field(default_factory=dict)


def main(arguments: list[str] | None = None) -> int:
    require_this_checkout(__file__)
    options = parse(arguments)
    if problem := unusable():
        print(f"{problem}\n{json.dumps({'bench': 'aot', 'skipped': problem})}")
        return 2
    started, whole = time.perf_counter(), not (options.only or options.file)
    with _tuned.asking() as questions:
        jobs = collect(options.only, options.file)
    own = list(elsewhere(lambda: collect(None, None))) if whole else []
    print(f"{'kernel':<28} sm   registers  shared (limit)    spilled  products       configuration")
    rows = []
    for job, capability in compile_all(jobs, own, options.jobs):
        rows.append(row(job, capability))
        print(line(rows[-1]), flush=True)
    failures = [f"{r['kernel']} sm_{r['sm']} ({r['configuration']}): {text}" for r in rows for text in r["problems"]]
    if whole:
        made = {(job.configuration.module, job.configuration.kernel) for job in jobs}
        failures += [*left_out(kernel_modules(), made), *table_problems(questions)]
    print(*failures, sep="\n", file=sys.stderr)
    summary = {"bench": "aot", **versions(), "seconds": round(time.perf_counter() - started, 1)}
    summary |= {"configurations": len(jobs), "passed": bool(jobs) and not failures, "failures": failures, "rows": rows}
    if options.json:
        options.json.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(summary))
    return 0 if summary["passed"] else 1


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="aot", description="Compile every kernel configuration without a GPU.")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these operators")
    parser.add_argument("--file", type=Path, help="a kernel file elsewhere, instead of those of the package")
    parser.add_argument("--jobs", type=int, default=1, help="processes at once (default 1)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the JSON line there")
    return parser.parse_args(arguments)


def unusable() -> str | None:
    if not HAS_TRITON:
        return "triton is not installed: nothing to compile with"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return "TRITON_INTERPRET is set, so kernels are interpreted and nothing is compiled: unset it"
    return None


def versions() -> dict[str, str]:
    import triton

    return {"triton": triton.__version__, "torch": torch.__version__}


def collect(only: Sequence[str] | None, file: Path | None) -> list[Job]:
    """Every distinct configuration that the cases marked aot lead to, in the order of the files."""
    jobs: dict[str, Job] = {}
    for module in [load(str(file.resolve()))] if file else kernel_modules():
        for check in checks("aot", [module]):
            if only and check.operator.name not in only:
                continue
            with recording() as launches:
                check.operator.op(*on_meta(check))
            for launch in launches:
                home = str(file.resolve()) if file else launch.kernel.__module__
                configuration = specialised(launch, home)
                jobs.setdefault(configuration.key, Job(configuration, [])).cases.append(str(check))
    if not (only or file):
        for model, (quant, attention) in product(families.FAMILIES, PRECISIONS):
            for task in tasks_of(families.model(model)):
                for configuration in of_a_request(model, task, quant, attention):
                    asks = f"{REQUEST} {task} {model}, quant {quant}"
                    jobs.setdefault(configuration.key, Job(configuration, [])).cases.append(asks)
    return list(jobs.values())


def of_a_request(model: str, task: str, quant: str, attention: str) -> Iterator[Configuration]:
    """What it launches at 1024x1024; of what repeats in a dry run, each kind of call once."""
    with recording_all() as launches:
        ask_for(model, task, res=1024, quant=quant, attention=attention).plan(at_once=1)
    distinct = {}
    for launch in launches:
        given = tuple((x.dtype, x.shape, x.stride()) if isinstance(x, torch.Tensor) else x for x in launch.arguments)
        distinct.setdefault((launch.kernel, given, tuple(launch.options.items())), launch)
    for launch in distinct.values():
        yield specialised(launch, launch.kernel.__module__)


def on_meta(check: Check) -> tuple[Any, ...]:
    return drawn(check.case, "meta")


def key_of(job: Job) -> str:
    return job.configuration.key


def compile_all(jobs: Sequence[Job], own: list[tuple[Job, int]], processes: int) -> Iterator[tuple[Job, int]]:
    """All of them for the home architecture, then for every other one the largest of each kernel and its `own`."""
    with workers(processes) as each:
        yield from build_each(each, [(job, HOME) for job in jobs])
        largest: dict[tuple[str, str], Job] = {}
        for job in jobs:
            kernel = (job.configuration.module, job.configuration.kernel)
            largest[kernel] = max(largest.get(kernel, job), job, key=size)
        others = [capability for capability in SHARED_PER_BLOCK if capability != HOME]
        once = {(key_of(job), capability): (job, capability) for job in largest.values() for capability in others}
        for job, capability in own:
            once.setdefault((key_of(job), capability), (job, capability))
        yield from build_each(each, list(once.values()))


@contextmanager
def workers(processes: int) -> Iterator[Callable[..., Iterator[Any]]]:
    """A `map` over so many processes."""
    if processes == 1:
        yield map
        return
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        yield pool.map


def build_each(each: Callable[..., Iterator[Any]], tasks: list[tuple[Job, int]]) -> Iterator[tuple[Job, int]]:
    found = each(build, [job.configuration for job, _ in tasks], [capability for _, capability in tasks])
    for (job, capability), result in zip(tasks, found, strict=True):
        job.found[capability] = result
        yield job, capability


def size(job: Job) -> tuple[int, int]:
    (found,) = job.found.values()
    return found.get("shared", -1), found.get("registers", -1)


def row(job: Job, capability: int) -> dict[str, Any]:
    c, found, limit = job.configuration, job.found[capability], SHARED_PER_BLOCK[capability]
    named = {"kernel": c.kernel, "sm": capability, "configuration": str(c), "aligned": c.aligned}
    broken = list(problems(found, limit, c.int8_operands))
    return named | found | {"shared_limit": limit, "cases": sorted(set(job.cases)), "problems": broken}


def problems(found: dict[str, Any], limit: int, int8_operands: int) -> Iterable[str]:
    if "error" in found:
        yield f"does not compile: {found['error']}"
        return
    if found["spilled"]:
        yield f"spills {found['spilled']} bytes a thread"
    if found["shared"] > limit:
        yield f"needs {found['shared']} bytes of shared memory, a block may have {limit}"
    asked = "i8" in found["dots"]
    if found["dots"] and not asked and int8_operands > 1:
        yield f"multiplies {' and '.join(found['dots'])} although {int8_operands} of its arguments are int8"
    if asked and "s8" not in found["mma"]:
        yield "multiplies int8 without int8 tensor-core instructions"


def line(r: dict[str, Any]) -> str:
    if "error" in r:
        return f"{r['kernel']:<28} {r['sm']:<4} does not compile: {r['error']}"
    shared, used = f"{r['shared']} ({r['shared_limit']})", " ".join(r["mma"]) or "none"
    products = f"{' '.join(r['dots'])}: {used}" if r["dots"] else ""
    return (
        f"{r['kernel']:<28} {r['sm']:<4} {r['registers']:<10} {shared:<17} {r['spilled']:<8} {products:<14} "
        f"{r['configuration']}"
    )


if __name__ == "__main__":
    sys.exit(main())
