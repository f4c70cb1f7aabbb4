"""Every operator on a CUDA device: first whether it is right, then how fast, beside torch and beside the roof.

    python bench/ops.py [--only NAME ...] [--repeat 20] [--strict]

The roof is measured in the same run: large matrix products and a large copy. What an operator could take at best is
its multiplications at that rate, and nothing beside them, or its bytes at that bandwidth, whichever is longer. Caches
are flushed before every timed run, and the device waits until all of a run is queued, however many launches it takes;
times are medians in microseconds. An operator that disagrees with its reference is not timed. A table, then one JSON
line, whose `slower` lists what takes over 2 % longer than torch on the same arguments, and whether the card's table has
torch do it (kernels/_tuned.py). Exit status 1 when something disagrees or was not reached, with --strict also when
something is slower and not listed there. Without a CUDA device it says so and succeeds.
"""

import argparse
import json
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from unipic_run.bench.agreement import agreement
from unipic_run.bench.checkout import require_this_checkout
from unipic_run.bench.drawn import drawn
from unipic_run.engine.meter import precision
from unipic_run.engine.precision import true_float32
from unipic_run.kernels._op import HAS_TRITON, Operator, recording
from unipic_run.kernels._registry import Check, checks
from unipic_run.kernels._tuned import torch_is_faster

DEVICE = "cuda"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
HALF_SUMS = "fp16 with sums in fp16"
SIDE = {"bf16": 8192, "fp16": 8192, "fp32": 4096, "int8": 8192}  # of the square matrices that make the roof
SMALL = 256  # the same on a CPU, where no roof is claimed and only the way to it is tried
COPIED = 2**30  # bytes, and on a CPU
COPIED_SMALL = 2**22
FLUSHED = 2**28  # more than any card's L2
HEAD_START = 500_000  # cycles that the device waits while the host gets ahead of it; as many more as it needs
LONGEST_START = 2**27  # a function that waits for the device itself never gets ahead, and is not waited for
WARM_UP = 3
SLOWER = 1.02  # of torch's time, so that noise is no finding


def main(arguments: list[str] | None = None) -> int:
    require_this_checkout(__file__)
    options = parse(arguments)
    if not (torch.cuda.is_available() and HAS_TRITON):
        said = "no CUDA device with triton: nothing measured"
        print(f"{said}\n{json.dumps({'bench': 'ops', 'skipped': said})}")
        return 0
    wanted = [check for check in checks("gpu") if not options.only or check.operator.name in options.only]
    roof, rows = {}, []
    signal.signal(signal.SIGTERM, stop)
    with suppress(Stopped), torch.inference_mode(), true_float32():  # at the end of its time, what it has still counts
        roof = measured_roof(options.repeat)
        print("roof, in 1e12 a second:", ", ".join(f"{name} {value / 1e12:.2f}" for name, value in roof.items()))
        print(f"{'operator: case':<64} {'us':>9} {'torch us':>9} {'ratio':>6} {'% of roof':>9} {'launches':>8}")
        for check in wanted:
            rows.append(row := one(check, roof, options.repeat))
            print(line(row), flush=True)
            torch.cuda.empty_cache()
    wrong = [row["check"] for row in rows if row["problem"]]
    passed, slower = len(rows) == len(wanted) > 0 and not wrong, slower_than_torch(rows)
    unlisted = [row for row in slower if not row["torch_is_used"]]
    told = {"roof": roof, "passed": passed, "left": len(wanted) - len(rows), "wrong": wrong, "slower": slower}
    print(json.dumps(describe() | told | {"rows": rows}))
    return 0 if passed and not (options.strict and unlisted) else 1


class Stopped(BaseException):
    """Somebody asked for an end."""


def stop(*_: Any) -> None:
    raise Stopped


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="ops", description="Every operator: correctness, then time against the roof.")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these operators")
    parser.add_argument("--repeat", type=int, default=20, help="timed runs of each (default 20)")
    parser.add_argument("--strict", action="store_true", help="exit status 1 if torch should do more than is listed")
    return parser.parse_args(arguments)


def describe() -> dict[str, Any]:
    import triton

    return {
        "bench": "ops",
        "device_name": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": triton.__version__,
    }


def measured_roof(repeat: int, device: str = DEVICE) -> dict[str, float]:
    """Operations a second of large square products by precision, and bytes a second of a large copy."""
    roof = {name: product_rate(name, repeat, device) for name in SIDE}
    with sums_in_float16():
        roof[HALF_SUMS] = max(roof["fp16"], product_rate("fp16", repeat, device))
    copied = COPIED_SMALL if device == "cpu" else COPIED
    source = torch.empty(copied, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    return roof | {"copy": 2 * copied / seconds(lambda: target.copy_(source), repeat, device=device)}


@contextmanager
def sums_in_float16() -> Iterator[None]:
    """Inside, cuBLAS may sum products of float16 in float16, at twice the rate on GeForce cards."""
    scope = torch.backends.cuda.matmul
    before, scope.allow_fp16_accumulation = scope.allow_fp16_accumulation, True
    try:
        yield
    finally:
        scope.allow_fp16_accumulation = before


def product_rate(name: str, repeat: int, device: str = DEVICE) -> float:
    """Operations a second of a large square product in a precision (bf16, fp16, fp32, int8)."""
    side = SMALL if device == "cpu" else SIDE[name]
    if name == "int8":
        a, b = (torch.ones(side, side, dtype=torch.int8, device=device) for _ in range(2))
        return 2 * side**3 / seconds(lambda: torch._int_mm(a, b.T), repeat, device=device)
    a, b = (torch.randn(side, side, device=device).to(DTYPES[name]) for _ in range(2))
    return 2 * side**3 / seconds(lambda: a @ b.T, repeat, device=device)


def roofline(name: str, how: str, flop: int, nbytes: int, roof: dict[str, float]) -> tuple[float, str]:
    """The seconds that an operator in a precision takes at best, and whether arithmetic or memory says so."""
    rate = roof[how]
    if how == "int8" and "attention" in name:  # half of it are products of whole numbers, half have sums in float16
        rate = 2 / (1 / roof["int8"] + 1 / roof[HALF_SUMS])
    return max((flop / rate, "arithmetic"), (nbytes / roof["copy"], "memory"))


def nothing() -> None:
    """To be done before a timed run."""


def seconds(
    function: Callable[[], Any],
    repeat: int,
    before: Callable[[], Any] = nothing,
    device: str = DEVICE,
    warm_up: int = WARM_UP,
) -> float:
    """The median of single runs; on a GPU each behind a flush of the caches and a wait that hides the host's work.

    A wait that was over before all was queued is made longer, and the run is not counted.
    """
    if device == "cpu":
        return statistics.median([host_seconds(function, before) for _ in range(warm_up + repeat)][warm_up:])
    flush = torch.empty(FLUSHED, dtype=torch.int8, device=device)
    times, wait = [], HEAD_START
    while len(times) < warm_up + repeat:
        before()
        flush.zero_()
        torch.cuda._sleep(wait)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        late = start.query()
        torch.cuda.synchronize()
        if late and wait:
            wait = 2 * wait if wait < LONGEST_START else 0
        else:
            times.append(start.elapsed_time(end) / 1000)
    return statistics.median(times[warm_up:])


def host_seconds(function: Callable[[], Any], before: Callable[[], Any]) -> float:
    before()
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def one(check: Check, roof: dict[str, float], repeat: int) -> dict[str, Any]:
    row = {"check": str(check), "operator": check.operator.name, "case": check.case.why, "problem": ""}
    check = replace(check, case=replace(check.case, make=partial(drawn, check.case)))
    try:
        found = agreement(check, DEVICE, check.operator.op)  # the kernel itself, so that nothing falls back to torch
        if not found.holds:
            return row | {"problem": f"disagrees with its reference: {found}"}
        return row | timed(check, roof, repeat)
    except Exception as error:  # the others must still be measured
        return row | {"problem": f"{type(error).__name__}: {error}".splitlines()[0][:300]}


def timed(check: Check, roof: dict[str, float], repeat: int) -> dict[str, Any]:
    operator, arguments = check.operator, check.case.make(DEVICE)
    with recording() as launches:
        operator.op(*arguments)
    again = restoring(operator, arguments)
    ours = seconds(lambda: operator.op(*arguments), repeat, again)
    theirs = seconds(lambda: operator.torch(*arguments), repeat, again)
    cost = operator.cost(*arguments)
    how = precision([x for x in arguments if isinstance(x, Tensor)])
    best, bound = roofline(operator.name, how, cost.flop, cost.nbytes, roof)
    return {
        "seconds": ours,
        "torch_seconds": theirs,
        "ratio": ours / theirs,
        "torch_is_used": torch_is_faster(operator.name, arguments),
        "roof_seconds": best,
        "share_of_roof": best / ours,
        "bound": bound,
        "precision": how,
        "flop": cost.flop,
        "nbytes": cost.nbytes,
        "launches": len(launches) + cost.launches,
    }


def restoring(operator: Operator, arguments: tuple[Any, ...]) -> Callable[[], None]:
    """Undoes what a run writes into its arguments, since a counter must not run past its table."""
    kept = [(x, x.clone()) for x in operator.written(arguments)]

    def restore() -> None:
        for x, before in kept:
            x.copy_(before)

    return restore


def slower_than_torch(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Where torch should do the work: operator, case, and how many times longer ours takes, the worst first."""
    found = [row for row in rows if not row["problem"] and row["ratio"] > SLOWER]
    named = ("operator", "case", "ratio", "seconds", "torch_seconds", "torch_is_used")
    return [{name: row[name] for name in named} for row in sorted(found, key=lambda row: -row["ratio"])]


def line(row: dict[str, Any]) -> str:
    if row["problem"]:
        return f"{row['check']:<64} {row['problem']}"
    slower = "  slower than torch" * (row["ratio"] > SLOWER) + ", which is used" * row["torch_is_used"]
    times = f"{1e6 * row['seconds']:>9.1f} {1e6 * row['torch_seconds']:>9.1f} {row['ratio']:>6.2f}"
    times += f" {100 * row['share_of_roof']:>9.0f}"
    return f"{row['check']:<64} {times} {row['launches']:>8}{slower}"


if __name__ == "__main__":
    sys.exit(main())
