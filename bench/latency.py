"""Milliseconds per stage and round, and peak memory of loading and of each stage, of the three tasks.

    python bench/latency.py --model unipic --random-weights --res 256 --iters 2
    python bench/latency.py --model DIR --res 1024 --tasks gen,ask --repeat 3 [--vram 6 [--ballast]]

--random-weights builds the released architecture (or that of a checkpoint folder) without any weights file. One line
a task, one JSON line last, also when SIGTERM ends it early: then with what there is. Medians over --repeat runs, after
two to warm up when there is more than one; peaks are of all runs. What the first run took longer, and what each
compiled and captured, is told apart: the second run of a shape compiles nothing, the third captures nothing, all
capturing takes at most half a second, and no run replays over 3500 graphs; else, or with a task left, the exit status
is 1. With --plan the JSON also has what the dry run says of
FLOP, bytes and launches and, on a GPU, the share that each stage reached of the rate of a large matrix product in the
same run.
"""

import argparse
import json
import platform
import signal
import statistics
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from unipic_run import __version__
from unipic_run.bench.ballast import drop_ballast
from unipic_run.bench.calls import Stages, summed_up, watched
from unipic_run.bench.checkout import require_this_checkout
from unipic_run.bench.ops import Stopped, product_rate, stop
from unipic_run.bench.planned import plan_of, report
from unipic_run.bench.random_model import random_engine
from unipic_run.bench.stage_memory import StageMemory
from unipic_run.engine.budget import as_vram
from unipic_run.engine.device import as_device, current, dtype_name, memory_peak
from unipic_run.engine.engine import Engine
from unipic_run.engine.errors import UnipicError, UnipicWarning
from unipic_run.engine.outcome import Event
from unipic_run.engine.outline import KINDS
from unipic_run.engine.request import TASKS
from unipic_run.engine.sampling import EXACT, SPEEDS

TOKENIZER = Path("tests/data/unipic-tiny/Qwen2.5-1.5B-Instruct/tokenizer.json")
ROUNDS = 32
PROMPT = "a red fox in deep snow at night"
QUESTION = "What is in the picture?"
UNSETTLED = 1  # exit status where runs compiled or captured too much, or tasks are left


def main(arguments: list[str] | None = None) -> int:
    root = require_this_checkout(__file__)
    options = parse(arguments)
    signal.signal(signal.SIGTERM, stop)
    summary: dict[str, Any] = {"bench": "latency", "tasks": {}, "left": list(options.tasks)}
    status = 0
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:  # whatever ends it, what was measured so far still counts
            measure_all(root, options, summary)
        except Stopped:
            pass
        except UnipicError as error:
            print(f"error: {error}", file=sys.stderr)
            summary["error"], status = str(error), error.exit_code
        except Exception as error:
            traceback.print_exc()
            summary["error"], status = f"{type(error).__name__}: {error}", UNSETTLED
    summary["warnings"] = list(dict.fromkeys(str(warning.message) for warning in told))
    for text in dict.fromkeys(str(w.message) for w in told if not issubclass(w.category, UnipicWarning)):
        complain(text)
    summary["peak_rss_bytes"] = memory_peak(torch.device("cpu"))
    unsettled = [f"{task}: {text}" for task, found in summary["tasks"].items() for text in found["unsettled"]]
    for text in unsettled:
        complain(text)
    status = status or (UNSETTLED if unsettled or summary["left"] else 0)
    print(json.dumps(summary | {"passed": not status}))
    return status


def measure_all(root: Path, options: argparse.Namespace, summary: dict[str, Any]) -> None:
    """Every task, each into the summary as soon as it has a run."""
    device, memory = as_device(options.device), StageMemory(as_device(options.device))
    if options.vram_cap and device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, options.vram_cap * 2**30 / total), device)
    summary["ballast_bytes"] = drop_ballast(device, as_vram(options.vram)) if options.ballast else 0
    start = time.perf_counter()
    with load(options, root) as engine, current(engine.device):
        memory.note("load")
        summary |= describe(options, engine)
        summary["load"] = {"seconds": time.perf_counter() - start, "memory": memory.stages.get("load")}
        for task in options.tasks:
            measure(engine, task, options, memory, summary)
            summary["left"].remove(task)
            if not options.json:
                print(line(task, summary["tasks"][task]), flush=True)


def measure(
    engine: Engine, task: str, options: argparse.Namespace, memory: StageMemory, summary: dict[str, Any]
) -> None:
    """One task; what its finished runs have told is in the summary also when an exception ends them."""
    graphs, calls = engine.loaded.model.graphs, []
    memory.stages.clear()
    try:
        with memory.listening():
            for _ in range(options.warm_up + options.repeat):
                calls.append(watched(partial(run, engine, task, options), graphs.counts))
    finally:
        if calls:
            found = summed_up(calls, options.warm_up) | beside(engine, memory, summary["ballast_bytes"])
            summary["tasks"][task] = found
        summary["graphs"] = vars(graphs.counts) | {"failed": graphs.failed}
    if options.plan and task in KINDS:
        found["plan"] = planned(engine, task, options, found["milliseconds"])


def parse(arguments: list[str] | None, prog: str = "latency") -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog=prog, description="Time and memory of gen, edit and ask.")
    parser.add_argument("--model", default="unipic", help="a short name or a folder (default unipic)")
    parser.add_argument("--random-weights", action="store_true", help="the model's architecture, no weights file")
    parser.add_argument("--res", type=int, default=1024, help="side in pixels (default 1024)")
    parser.add_argument("--iters", "--steps", type=int, help="rounds, or steps (default 32; with --speed the model's)")
    parser.add_argument("--speed", default=EXACT, choices=SPEEDS, help="of pictures; a given --iters wins")
    parser.add_argument("--batch", type=int, default=1, help="images made together (default 1)")
    parser.add_argument("--new-tokens", type=int, default=16, help="length of the answer (default 16)")
    parser.add_argument("--tasks", type=task_list, default=TASKS, help="of gen,edit,ask (default all)")
    parser.add_argument("--repeat", type=int, default=1, help="runs of each task (default 1)")
    parser.add_argument("--warm-up", type=int, help="runs before these (default 2 if there are several, else 0)")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="bf16", choices=["bf16", "fp16", "fp32"])
    parser.add_argument("--attn", default="auto", help="attention backend")
    parser.add_argument("--quant", default="none", choices=["none", "int8"])
    parser.add_argument("--plan", action="store_true", help="also what the dry run says of pictures")
    parser.add_argument("--vram-cap", type=float, metavar="GIB", help="fail instead of reserving more on the GPU")
    parser.add_argument("--vram", metavar="GIB", help="the engine's own budget")
    parser.add_argument("--ballast", action="store_true", help="take what the card has above --vram")
    parser.add_argument("--json", action="store_true", help="print the JSON line only")
    options = parser.parse_args(arguments)
    if options.vram and options.random_weights:
        parser.error("--vram places weights that were loaded: give a folder (bench/vram.py makes one)")
    if options.ballast and not options.vram:
        parser.error("--ballast needs --vram")
    if options.speed == EXACT:
        options.iters = ROUNDS if options.iters is None else options.iters
    elif options.plan:
        parser.error("--plan is of exact pictures: leave --speed out")
    if options.warm_up is None:
        options.warm_up = 2 if options.repeat > 1 else 0  # the first compiles, the second captures what comes again
    return options


def task_list(text: str) -> tuple[str, ...]:
    tasks = tuple(text.split(","))
    if not set(tasks) <= set(TASKS):
        raise argparse.ArgumentTypeError(f"{text}: choose from {','.join(TASKS)}")
    return tasks


def load(options: argparse.Namespace, root: Path) -> Engine:
    if options.random_weights:
        how = (options.device, options.dtype, options.attn, options.quant)
        return random_engine(options.model, root / TOKENIZER, *how)
    how = {"device": options.device, "dtype": options.dtype, "attention": options.attn, "quant": options.quant}
    how |= {"vram": options.vram}
    return Engine.from_pretrained(options.model, **how, say=complain)


def complain(sentence: str) -> None:
    print(sentence, file=sys.stderr)


def describe(options: argparse.Namespace, engine: Engine) -> dict[str, Any]:
    """The settings and versions without which a number means nothing."""
    cuda = engine.device.type == "cuda"
    return {
        "model": engine.name,
        "parameters": sum(p.numel() for p in engine.loaded.model.parameters()),
        "res": options.res,
        "iters": options.iters,
        "speed": options.speed,
        "batch": options.batch,
        "new_tokens": options.new_tokens,
        "repeat": options.repeat,
        "dtype": dtype_name(engine.dtype),
        "quant": engine.quant,
        "attention": engine.attention,
        "device": str(engine.device),
        "device_name": torch.cuda.get_device_name(engine.device) if cuda else platform.machine(),
        "threads": torch.get_num_threads(),
        "vram_cap_gib": options.vram_cap,
        "vram": options.vram,
        "versions": {
            "unipic_run": __version__,
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "python": platform.python_version(),
        },
    }


def beside(engine: Engine, memory: StageMemory, ballast: int) -> dict[str, Any]:
    """Of the runs of a task: the memory that the largest of them took, and where the weights lay."""
    found: dict[str, Any] = {"memory": peaks(engine.device, memory, ballast), "stage_memory": dict(memory.stages)}
    if engine.placing and (placement := engine.placing.placement):
        foreseen = {"line": engine.placing.line, "seconds": placement.seconds}
        found["placement"] = foreseen | {"peak_bytes": placement.peak, "peaks": dict(placement.peaks)}
    return found


def planned(engine: Engine, task: str, options: argparse.Namespace, milliseconds: Stages) -> dict[str, Any]:
    """The dry run of a task beside its times."""
    plan = plan_of(engine, KINDS[task], PROMPT, options.res, options.iters, options.batch)
    cuda = engine.device.type == "cuda"
    with torch.inference_mode():
        rate = product_rate("int8" if engine.quant == "int8" else options.dtype, repeat=5) if cuda else None
    name = torch.cuda.get_device_name(engine.device) if cuda else ""
    return report(plan, options.iters, milliseconds, name, rate)


def peaks(device: torch.device, memory: StageMemory, ballast: int) -> dict[str, int | None]:
    """In bytes, without loading; on the CPU that of the process since it began."""
    if device.type != "cuda":
        return {"rss_bytes": memory_peak(device)}
    free, total = torch.cuda.mem_get_info(device)
    # What is used now, with the CUDA context, and whatever else runs on the card.
    return memory.peak() | {"card_used_bytes": total - free - ballast}


def run(engine: Engine, task: str, options: argparse.Namespace) -> tuple[Stages, list[float]]:
    """One call: milliseconds of each stage, and of each round."""
    ticks: list[float] = []
    sampling = {"steps": options.iters, "speed": options.speed, "n": options.batch, "batch_size": options.batch}
    sampling["seed"] = 1
    if task == "gen":
        result = engine.generate(PROMPT, res=options.res, on_event=rounds_into(ticks), **sampling)
    elif task == "edit":
        picture, on_event = photograph(options.res), rounds_into(ticks)
        result = engine.edit(picture, PROMPT, res=options.res, on_event=on_event, **sampling)
    else:
        result = engine.ask(photograph(options.res), QUESTION, res=options.res, max_new_tokens=options.new_tokens)
    stages = {name: 1000 * seconds for name, seconds in result.timings.items()}
    return stages, [1000 * (after - before) for before, after in pairwise(ticks)]


def rounds_into(ticks: list[float]) -> Callable[[Event], None]:
    """Notes when the conditions are ready and when each round is done; on a GPU a round is heard of one later."""

    def on_event(event: Event) -> None:
        if event.stage != "decode":
            ticks.append(time.perf_counter())

    return on_event


def photograph(res: int) -> Image.Image:
    """A smooth picture with some detail."""
    y, x = np.mgrid[:res, :res] / res
    waves = np.stack([np.sin(9 * x + 5 * y), np.cos(7 * x * y), np.sin(40 * x) * np.cos(30 * y)], axis=-1)
    return Image.fromarray((127.5 + 127.5 * waves).astype(np.uint8))


def line(task: str, report: dict[str, Any]) -> str:
    stages = ", ".join(f"{name} {value:.0f}" for name, value in report["milliseconds"].items())
    peaks = ", ".join(
        f"{name.removesuffix('_bytes')} {value / 2**30:.2f}" for name, value in report["memory"].items() if value
    )
    rounds = report["round_milliseconds"]
    per_round = f"; a round {statistics.median(rounds):.0f}" if rounds else ""
    first = f"; the first run {report['first_extra_milliseconds']:.0f} more" if len(report["calls"]) > 1 else ""
    return f"{task:<5} ms: {stages}{per_round}{first}; GiB: {peaks}"


if __name__ == "__main__":
    sys.exit(main())
