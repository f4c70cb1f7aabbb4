"""How a picture's time in bf16 and in int8 relates to the arithmetic and to each other, from logs of bench/latency.py.

    python bench/targets.py BF16.log INT8.log
    python bench/targets.py --predict

Both are of `--tasks gen --plan` at 1024x1024. In bf16 a picture may take 1.35 times its multiplications at the rate of
a large matrix product in the same run; in int8 half of what it takes in bf16. Both are asked of sm_89 cards and told of
others. A line each, one JSON line last; exit status 1 for a target that an sm_89 card misses (a KNOWN one only where it
grew), 2 where a log has not what it takes. --predict needs no card; what compares logs says without one that there is
none, and succeeds.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from unipic_run.bench.checkout import require_this_checkout
from unipic_run.bench.vram_watch import last_json
from unipic_run.engine.estimate import estimate

OVER_ARITHMETIC, OF_BF16 = 1.35, 0.5
ASKED_OF = (8, 9)  # compute capability
EIGHT = {"quant": "int8", "attention": "int8-qk"}
KNOWN = {  # seconds predicted today that exceed a limit: they may not grow
    "unipic in int8, exact": 3.10,
}
PREDICTED = (  # seconds of a picture: model, precision, speed, limit
    ("unipic", {}, "exact", 6.8),
    ("unipic", EIGHT, "exact", 2.6),
    ("unipic", EIGHT, "balanced", 1.6),
    ("unipic", EIGHT, "fast", 1.0),
    ("deepgen", {}, "exact", 8.5),
    ("deepgen", EIGHT, "exact", 3.5),
    ("deepgen", EIGHT, "balanced", 2.0),
    ("deepgen", EIGHT, "fast", 1.3),
)


def main(arguments: list[str] | None = None) -> int:
    require_this_checkout(__file__)
    parser = argparse.ArgumentParser(
        prog="targets", description="A picture's time in bf16 and int8 against its targets."
    )
    parser.add_argument("bf16", type=Path, nargs="?", metavar="BF16.log")
    parser.add_argument("int8", type=Path, nargs="?", metavar="INT8.log")
    parser.add_argument("--predict", action="store_true", help="seconds by the dry run instead")
    options = parser.parse_args(arguments)
    if options.predict:
        return told([prediction(*row) for row in PREDICTED], asked=True)
    if options.int8 is None:
        parser.error("two logs, or --predict")
    if not torch.cuda.is_available():
        said = "no CUDA device: nothing measured"
        print(f"{said}\n{json.dumps({'bench': 'targets', 'skipped': said})}")
        return 0
    asked = torch.cuda.get_device_capability() == ASKED_OF
    try:
        rows = targets(*(picture(log, log.stem) for log in (options.bf16, options.int8)))
    except (OSError, ValueError) as error:
        print(f"{error}\n{json.dumps({'bench': 'targets', 'passed': False, 'problem': str(error)})}")
        return 2
    return told(rows, asked)


def told(rows: list[dict[str, Any]], asked: bool) -> int:
    """The exit status."""
    for row in rows:
        met = "met" if row["met"] else "missed" if asked else "above it, which is asked of sm_89 only"
        met += ", as is known" if row.get("known") else ""
        print(f"{row['target']}: {row['value']:.2f} of {row['limit']:.2f}, {met}")
    passed = not asked or all(row["met"] or row.get("known") for row in rows)
    print(json.dumps({"bench": "targets", "asked": asked, "passed": passed, "targets": rows}))
    return 0 if passed else 1


def prediction(model: str, how: dict[str, str], speed: str, limit: float) -> dict[str, Any]:
    found = estimate(model, "gen", res=1024, gpu="rtx4090", shortcuts={"speed": speed}, **how)
    seconds = found["placement"]["seconds"]
    name = f"{model} in {'int8' if how else 'bf16'}, {speed}"
    row = {"target": f"{name}, seconds predicted on {found['gpu']}", "value": seconds, "limit": limit}
    return row | {"met": seconds <= limit, "known": limit < seconds <= KNOWN.get(name, limit)}


def picture(log: Path, name: str) -> dict[str, Any]:
    """What bench/latency.py said of a picture. Raises ValueError where it did not."""
    told = last_json(log.read_text("utf-8", errors="replace"))
    found = told.get("tasks", {}).get("gen", {}) if isinstance(told, dict) else {}
    if not {"plan", "milliseconds"} <= found.keys():
        raise ValueError(f"{name}: no picture with its plan was measured")
    return told | {"gen": found}


def targets(bf16: dict[str, Any], int8: dict[str, Any]) -> list[dict[str, Any]]:
    """Raises ValueError for logs that do not belong together."""
    for told, dtype, quant in ((bf16, "bf16", "none"), (int8, "bf16", "int8")):
        if (told["dtype"], told["quant"]) != (dtype, quant):
            raise ValueError(f"a log of dtype {told['dtype']} with quant {told['quant']}, not of {dtype} with {quant}")
    if differing := [name for name in ("model", "res", "iters", "batch", "device_name") if bf16[name] != int8[name]]:
        raise ValueError(f"the two logs are of different pictures: {', '.join(differing)}")
    exact, eight = (told["gen"]["milliseconds"]["total"] / 1000 for told in (bf16, int8))
    plan = bf16["gen"]["plan"]
    if not plan["roof_flop_per_second"]:
        raise ValueError("the bf16 log has no measured rate of matrix products")
    at_best = sum(stage["flop"] for stage in plan["stages"].values()) / plan["roof_flop_per_second"]
    values = (
        ("bf16 over its arithmetic at the measured rate", exact / at_best, OVER_ARITHMETIC),
        ("int8 over bf16", eight / exact, OF_BF16),
    )
    return [{"target": name, "value": value, "limit": limit, "met": value <= limit} for name, value, limit in values]


if __name__ == "__main__":
    sys.exit(main())
