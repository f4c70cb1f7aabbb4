"""Where the time of a picture goes, by class of operation, and how close each class comes to what the device could do.

    python bench/classes.py --model unipic --random-weights --res 1024 --iters 32 [--quant int8 --attn int8-qk]

One picture is made with every operation launched by itself. The first of each kind (operation, shape, type) is timed
alone with cold caches, as in bench/ops.py, and counts as often as it comes. Its roof is its arithmetic at the rate of a
large matrix product or its bytes at that of a large copy, both measured in the same run, whichever takes longer. A
class of over 10 % of the time has to reach 60 % of its roof, or bench/causes.json says for this architecture why not.

Takes the options of bench/latency.py that say which picture of which model. A table, then one JSON line; exit status 1
where a class falls short, or a kernel could not be had and torch was timed in its place. On a CPU there is no roof
worth the name: the way is gone and no class is judged. When its time is up (SIGTERM) or something fails, it tells of
the part of the picture that it came to, judges nothing and fails.
"""

import json
import signal
import sys
import traceback
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from unipic_run.bench import latency
from unipic_run.bench.checkout import require_this_checkout
from unipic_run.bench.ops import Stopped, measured_roof, roofline, stop
from unipic_run.bench.stopwatch import stopwatch, time_a_picture
from unipic_run.engine.device import as_device, current
from unipic_run.engine.meter import Call
from unipic_run.engine.precision import true_float32
from unipic_run.engine.sampling import EXACT
from unipic_run.kernels._op import HAS_TRITON, OPERATORS

CAUSES = Path(__file__).with_name("causes.json")
LARGE, NEAR = 0.10, 0.60  # share of the time from which a class counts, share of its roof that it has to reach
SHOWN = 3  # operations of a class that lose most
REPEAT = 10  # timed runs of what makes the roof


def main(arguments: list[str] | None = None) -> int:
    root = require_this_checkout(__file__)
    options = latency.parse(arguments, "classes")
    if options.speed != EXACT:
        sys.exit("--speed: classes of operations are timed in exact pictures, leave it out")
    summary: dict[str, Any] = {"bench": "classes"}
    device, roof, stopped = as_device(options.device), {}, True
    watch, cuda = stopwatch(device), device.type == "cuda"
    signal.signal(signal.SIGTERM, stop)
    try:  # whatever ends it, what was timed so far is told
        with current(device), latency.load(options, root) as engine:
            summary |= latency.describe(options, engine)
            with torch.inference_mode(), true_float32():
                roof = measured_roof(REPEAT, device.type)
            time_a_picture(watch, engine.loaded, latency.PROMPT, options.res, options.iters, options.batch)
            stopped = False
    except Stopped:
        pass
    except Exception as error:
        traceback.print_exc()
        summary["error"] = f"{type(error).__name__}: {error}"
    rows = classes({call: times for call, times in watch.calls.items() if call in watch.seconds}, watch.seconds, roof)
    causes, judged = stated(CAUSES, architecture()) if cuda else {}, cuda and not stopped
    short = [row["class"] for row in rows if falls_short(row) and row["class"] not in causes] if judged else []
    if not options.json:
        print(*table(rows, causes), sep="\n", flush=True)
    summary |= {"kinds_of_calls": len(watch.seconds), "seconds": sum(row["seconds"] for row in rows), "roof": roof}
    broken = {one.name: one.broken for one in OPERATORS.values() if one.broken} if HAS_TRITON else {}
    passed = not (short or broken or stopped)
    summary |= {"classes": rows, "causes": causes, "short_of_their_roof": short, "broken": broken}
    print(json.dumps(summary | {"judged": judged, "stopped": stopped, "passed": passed}))
    return 0 if passed else 1


def class_of(call: Call) -> str:
    """The meter's kind and the precision; the VAE's convolutions, which the library does, are no matrix products."""
    return f"{'convolution' if call.name == 'convolution' else call.kind} {call.precision}"


def classes(calls: Mapping[Call, int], seconds: Mapping[Call, float], roof: dict[str, float]) -> list[dict[str, Any]]:
    """A row a class, the longest first; `calls`: how often each comes, `seconds`: what one takes."""
    total = sum(times * seconds[call] for call, times in calls.items())
    found: dict[str, list[dict[str, Any]]] = {}
    for call, times in calls.items():
        best, bound = roofline(call.name, call.precision, call.flop, call.nbytes, roof)
        one = {"name": call.name, "shape": list(call.shape), "stage": call.stage, "times": times, "bound": bound}
        one |= {"seconds": times * seconds[call], "roof_seconds": times * best, "launches": times * call.launches}
        found.setdefault(class_of(call), []).append(one)
    rows = [summed_up(name, members, total) for name, members in found.items()]
    return sorted(rows, key=lambda row: -row["seconds"])


def summed_up(name: str, members: list[dict[str, Any]], total: float) -> dict[str, Any]:
    took, best = (sum(one[field] for one in members) for field in ("seconds", "roof_seconds"))
    by_arithmetic = sum(one["roof_seconds"] for one in members if one["bound"] == "arithmetic")
    loss = sorted(members, key=lambda one: one["roof_seconds"] - one["seconds"])
    return {
        "class": name,
        "seconds": took,
        "roof_seconds": best,
        "share_of_time": took / total if total else 0.0,
        "share_of_roof": best / took if took else 1.0,
        "share_of_roof_by_arithmetic": by_arithmetic / best if best else 0.0,
        "launches": sum(one["launches"] for one in members),
        "calls": sum(one["times"] for one in members),
        "loses_most": loss[:SHOWN],
    }


def falls_short(row: dict[str, Any]) -> bool:
    return row["share_of_time"] > LARGE and row["share_of_roof"] < NEAR


def stated(path: Path, architecture: str) -> dict[str, str]:
    """Class -> why it may fall short on an architecture (sm_89). Raises ValueError for a cause without words."""
    causes = json.loads(path.read_text("utf-8")).get(architecture, {})
    if silent := [name for name, why in causes.items() if not isinstance(why, str) or not why.strip()]:
        raise ValueError(f"{path.name}: {architecture}: no cause is stated for {', '.join(silent)}")
    return causes


def architecture() -> str:
    major, minor = torch.cuda.get_device_capability()
    return f"sm_{10 * major + minor}"


def table(rows: list[dict[str, Any]], causes: dict[str, str]) -> Iterable[str]:
    yield f"{'class':<20} {'ms':>9} {'% of time':>9} {'% of roof':>9} {'launches':>9}"
    for row in rows:
        shares = f"{100 * row['share_of_time']:>9.1f} {100 * row['share_of_roof']:>9.0f}"
        said = f"  {causes.get(row['class'], 'short of its roof')}" if falls_short(row) else ""
        yield f"{row['class']:<20} {1e3 * row['seconds']:>9.1f} {shares} {row['launches']:>9}{said}"
        if falls_short(row):
            for one in row["loses_most"]:
                lost = 1e3 * (one["seconds"] - one["roof_seconds"])
                yield f"    {one['name']} {one['shape']} in {one['stage']}: {lost:.1f} ms lost in {one['times']} calls"


if __name__ == "__main__":
    sys.exit(main())
