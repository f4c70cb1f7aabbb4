"""Every operator on a CUDA device: first whether it is right, then how fast, beside torch and beside the roof.

    python bench/ops.py [--only NAME ...] [--repeat 20]

The roof is measured in the same run: large matrix products and a large copy. What an operator could take at best is
its multiplications at that rate or its bytes at that bandwidth, whichever is longer. Caches are flushed before every
timed run; times are medians in microseconds. An operator that disagrees with its reference is not timed. A table, then
one JSON line; exit status 1 when something disagrees. Without a CUDA device it says so and succeeds.
"""

import argparse
import json
import signal
import statistics
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor
from unipic_run.bench.agreement import agreement
from unipic_run.bench.checkout import require_this_checkout
from unipic_run.engine.meter import precision
from unipic_run.engine.precision import true_float32
from unipic_run.kernels._op import HAS_TRITON, Operator, recording
from unipic_run.kernels._registry import Check, checks

DEVICE = "cuda"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SIDE = {"bf16": 8192, "fp16": 8192, "fp32": 4096, "int8": 8192}  # of the square matrices that make the roof
COPIED = 2**30  # bytes
FLUSHED = 2**28  # more than any card's L2
WARM_UP = 3


def main(arguments: list[str] | None = None) -> int:
    require_this_checkout(__file__)
    options = parse(arguments)
    if not (torch.cuda.is_available() and HAS_TRITON):
        said = "no CUDA device with triton: nothing measured"
        print(f"{said}\n{json.dumps({'bench': 'ops', 'skipped': said})}")
        return 0
    wanted = [check for check in checks("gpu") if not options.only or check.operator.name in options.only]
    with torch.inference_mode(), true_float32():
        roof = measured_roof(options.repeat)
        print("roof, in 1e12 a second:", ", ".join(f"{name} {value / 1e12:.2f}" for name, value in roof.items()))
        print(f"{'operator: case':<64} {'us':>9} {'torch us':>9} {'% of roof':>9} {'launches':>8}")
        rows = []
        signal.signal(signal.SIGTERM, stop)
        with suppress(Stopped):  # when time is up, what was measured so far still counts
            for check in wanted:
                rows.append(row := one(check, roof, options.repeat))
                print(line(row), flush=True)
                torch.cuda.empty_cache()
    wrong = [row["check"] for row in rows if row["problem"]]
    passed = len(rows) == len(wanted) > 0 and not wrong
    told = {"roof": roof, "passed": passed, "left": len(wanted) - len(rows), "wrong": wrong, "rows": rows}
    print(json.dumps(describe() | told))
    return 0 if passed else 1


class Stopped(BaseException):
    """Somebody asked for an end."""


def stop(*_: Any) -> None:
    raise Stopped


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="ops", description="Every operator: correctness, then time against the roof.")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these operators")
    parser.add_argument("--repeat", type=int, default=20, help="timed runs of each (default 20)")
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


def measured_roof(repeat: int) -> dict[str, float]:
    """Operations a second of large square products by precision, and bytes a second of a large copy."""
    roof = {name: product_rate(name, repeat) for name in SIDE}
    source = torch.empty(COPIED, dtype=torch.int8, device=DEVICE)
    target = torch.empty_like(source)
    return roof | {"copy": 2 * COPIED / seconds(lambda: target.copy_(source), repeat)}


def product_rate(name: str, repeat: int) -> float:
    """Operations a second of a large square product in a precision (bf16, fp16, fp32, int8)."""
    side = SIDE[name]
    if name == "int8":
        a, b = (torch.ones(side, side, dtype=torch.int8, device=DEVICE) for _ in range(2))
        return 2 * side**3 / seconds(lambda: torch._int_mm(a, b.T), repeat)
    a, b = (torch.randn(side, side, device=DEVICE).to(DTYPES[name]) for _ in range(2))
    return 2 * side**3 / seconds(lambda: a @ b.T, repeat)


def seconds(function: Callable[[], Any], repeat: int, before: Callable[[], Any] = lambda: None) -> float:
    """The median of single runs, each behind a flush of the caches that also hides what the host takes to launch."""
    flush = torch.empty(FLUSHED, dtype=torch.int8, device=DEVICE)
    times = []
    for run in range(WARM_UP + repeat):
        before()
        flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        torch.cuda.synchronize()
        if run >= WARM_UP:
            times.append(start.elapsed_time(end) / 1000)
    return statistics.median(times)


def one(check: Check, roof: dict[str, float], repeat: int) -> dict[str, Any]:
    row = {"check": str(check), "operator": check.operator.name, "problem": ""}
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
    rate = roof[how]
    if how == "int8" and "attention" in operator.name:  # the scores are products of whole numbers, their use is not
        rate = 2 / (1 / roof["int8"] + 1 / roof["fp16"])
    arithmetic, memory = cost.flop / rate, cost.nbytes / roof["copy"]
    best = max(arithmetic, memory)
    return {
        "seconds": ours,
        "torch_seconds": theirs,
        "roof_seconds": best,
        "share_of_roof": best / ours,
        "bound": "arithmetic" if arithmetic > memory else "memory",
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


def line(row: dict[str, Any]) -> str:
    if row["problem"]:
        return f"{row['check']:<64} {row['problem']}"
    slower = "" if row["seconds"] <= row["torch_seconds"] else "  slower than torch"
    times = f"{1e6 * row['seconds']:>9.1f} {1e6 * row['torch_seconds']:>9.1f} {100 * row['share_of_roof']:>9.0f}"
    return f"{row['check']:<64} {times} {row['launches']:>8}{slower}"


if __name__ == "__main__":
    sys.exit(main())
