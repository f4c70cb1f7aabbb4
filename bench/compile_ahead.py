"""Compiles the kernels for this card on all cores, so that no bench behind it waits for one kernel after the other.

    python bench/compile_ahead.py [--jobs N]

What a launch compiles lies in Triton's cache folder, named by what it is made of: what bench/aot.py compiles without
a card is what a launch finds there. Kernels of requests come first. One JSON line last, also when SIGTERM ends it
early; exit status 1 when a kernel does not compile. Without a CUDA device it says so and succeeds.
"""

import argparse
import json
import os
import signal
import sys
import time
from contextlib import suppress

import torch
from unipic_run.bench.aot import REQUEST, Job, build_each, collect, unusable, workers
from unipic_run.bench.checkout import require_this_checkout
from unipic_run.bench.ops import Stopped, stop


def main(arguments: list[str] | None = None) -> int:
    require_this_checkout(__file__)
    parser = argparse.ArgumentParser(prog="compile_ahead", description="Compile the kernels for this card.")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes at once (default: cores)")
    options = parser.parse_args(arguments)
    said = "no CUDA device: nothing compiled" if not torch.cuda.is_available() else unusable()
    if said:
        print(f"{said}\n{json.dumps({'bench': 'compile_ahead', 'skipped': said})}")
        return 0
    start, (major, minor) = time.perf_counter(), torch.cuda.get_device_capability()
    jobs, done, failures = [], 0, []
    signal.signal(signal.SIGTERM, stop)
    with suppress(Stopped):  # what is compiled by then is compiled
        jobs = sorted(collect(None, None), key=late)
        with workers(options.jobs) as each:
            for job, capability in build_each(each, [(job, 10 * major + minor) for job in jobs]):
                done += 1
                if error := job.found[capability].get("error"):
                    failures.append(f"{job.configuration.kernel} ({job.configuration}): {error}")
    for failure in failures:
        print(failure, file=sys.stderr)
    summary = {"bench": "compile_ahead", "capability": [major, minor], "compiled": done, "left": len(jobs) - done}
    summary |= {"seconds": round(time.perf_counter() - start, 1), "failures": failures}
    print(json.dumps(summary | {"passed": bool(jobs) and not failures and done == len(jobs)}))
    return 1 if failures or not jobs else 0


def late(job: Job) -> bool:
    """Whether no request asks for it."""
    return not any(case.startswith(REQUEST) for case in job.cases)


if __name__ == "__main__":
    sys.exit(main())
