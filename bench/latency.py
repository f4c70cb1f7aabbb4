"""Milliseconds per stage and round, and peak memory, of the three tasks.

    python bench/latency.py --model unipic --random-weights --res 256 --iters 2
    python bench/latency.py --model DIR --res 1024 --tasks gen,ask --repeat 3

--random-weights builds the released architecture (or that of a checkpoint folder) without any weights file. One line
a task, one JSON line last. Medians over --repeat runs, after two to warm up when there is more than one. With --plan
the JSON also has what the dry run says of FLOP, bytes and launches and, on a GPU, the share that each stage reached of
the rate of a large matrix product in the same run.
"""

import argparse
import json
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from unipic_run import __version__
from unipic_run.bench.checkout import require_this_checkout
from unipic_run.bench.ops import product_rate
from unipic_run.bench.planned import plan_of, report
from unipic_run.bench.random_model import random_engine
from unipic_run.engine.device import as_device, dtype_name, memory_peak, reset_memory_peak
from unipic_run.engine.engine import Engine
from unipic_run.engine.errors import UnipicWarning
from unipic_run.engine.request import Event

TOKENIZER = Path("tests/data/unipic-tiny/Qwen2.5-1.5B-Instruct/tokenizer.json")
TASKS = ("gen", "edit", "ask")
KINDS = {"gen": "generate", "edit": "edit"}  # of those that make pictures
PROMPT = "a red fox in deep snow at night"
QUESTION = "What is in the picture?"
Stages = dict[str, float]  # milliseconds


def main(arguments: list[str] | None = None) -> int:
    root = require_this_checkout(__file__)
    options = parse(arguments)
    device = as_device(options.device)
    if options.vram_cap and device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, options.vram_cap * 2**30 / total), device)
    with load(options, root) as engine, warnings.catch_warnings():
        warnings.simplefilter("ignore", UnipicWarning)
        summary = describe(options, engine)
        for task in options.tasks:
            found = measure(engine, lambda task=task: run(engine, task, options), options.repeat)
            if options.plan and task in KINDS:
                found["plan"] = planned(engine, task, options, found["milliseconds"])
            summary["tasks"][task] = found
            if not options.json:
                print(line(task, summary["tasks"][task]), flush=True)
        graphs = engine.loaded.model.graphs
        summary["graphs"] = vars(graphs.counts) | {"failed": graphs.failed}
    summary["peak_rss_bytes"] = memory_peak(torch.device("cpu"))
    print(json.dumps(summary))
    return 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="latency", description="Time and memory of gen, edit and ask.")
    parser.add_argument("--model", default="unipic", help="a short name or a folder (default unipic)")
    parser.add_argument("--random-weights", action="store_true", help="the model's architecture, no weights file")
    parser.add_argument("--res", type=int, default=1024, help="side in pixels (default 1024)")
    parser.add_argument("--iters", "--steps", type=int, default=32, help="rounds (default 32)")
    parser.add_argument("--batch", type=int, default=1, help="images made together (default 1)")
    parser.add_argument("--new-tokens", type=int, default=16, help="length of the answer (default 16)")
    parser.add_argument("--tasks", type=task_list, default=TASKS, help="of gen,edit,ask (default all)")
    parser.add_argument("--repeat", type=int, default=1, help="runs of each task (default 1)")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="bf16", choices=["bf16", "fp16", "fp32"])
    parser.add_argument("--attn", default="auto", help="attention backend")
    parser.add_argument("--quant", default="none", choices=["none", "int8"])
    parser.add_argument("--plan", action="store_true", help="also what the dry run says of pictures")
    parser.add_argument("--vram-cap", type=float, metavar="GIB", help="fail instead of reserving more on the GPU")
    parser.add_argument("--json", action="store_true", help="print the JSON line only")
    return parser.parse_args(arguments)


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
    return Engine.from_pretrained(options.model, **how, say=complain)


def complain(sentence: str) -> None:
    print(sentence, file=sys.stderr)


def describe(options: argparse.Namespace, engine: Engine) -> dict[str, Any]:
    """The settings and versions without which a number means nothing."""
    cuda = engine.device.type == "cuda"
    return {
        "bench": "latency",
        "model": engine.name,
        "parameters": sum(p.numel() for p in engine.loaded.model.parameters()),
        "res": options.res,
        "iters": options.iters,
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
        "versions": {
            "unipic_run": __version__,
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "python": platform.python_version(),
        },
        "tasks": {},
    }


def measure(engine: Engine, once: Callable[[], tuple[Stages, list[float]]], repeat: int) -> dict[str, Any]:
    """Medians of `repeat` runs, and the memory that the largest of them took."""
    for _ in range(2 if repeat > 1 else 0):  # the first compiles, the second captures what comes again
        once()
    reset_memory_peak(engine.device)
    runs = []
    for _ in range(repeat):
        start = time.perf_counter()
        stages, rounds = once()
        runs.append(stages | {"total": 1000 * (time.perf_counter() - start), "rounds": rounds})
    stages = {name: statistics.median(run[name] for run in runs) for name in runs[0] if name != "rounds"}
    rounds = [statistics.median(times) for times in zip(*(run["rounds"] for run in runs), strict=True)]
    return {"milliseconds": stages, "round_milliseconds": rounds, "memory": memory(engine.device)}


def planned(engine: Engine, task: str, options: argparse.Namespace, milliseconds: Stages) -> dict[str, Any]:
    """The dry run of a task beside its times."""
    plan = plan_of(engine, KINDS[task], PROMPT, options.res, options.iters, options.batch)
    cuda = engine.device.type == "cuda"
    with torch.inference_mode():
        rate = product_rate("int8" if engine.quant == "int8" else options.dtype, repeat=5) if cuda else None
    name = torch.cuda.get_device_name(engine.device) if cuda else ""
    return report(plan, options.iters, milliseconds, name, rate)


def memory(device: torch.device) -> dict[str, int | None]:
    """Peaks in bytes; on the CPU that of the process since it began."""
    if device.type != "cuda":
        return {"rss_bytes": memory_peak(device)}
    free, total = torch.cuda.mem_get_info(device)
    return {
        "allocated_bytes": torch.cuda.max_memory_allocated(device),
        "reserved_bytes": torch.cuda.max_memory_reserved(device),
        "card_used_bytes": total - free,  # with the CUDA context, and whatever else runs on the card
    }


def run(engine: Engine, task: str, options: argparse.Namespace) -> tuple[Stages, list[float]]:
    """One call: milliseconds of each stage, and of each round."""
    ticks: list[float] = []
    sampling = {"steps": options.iters, "n": options.batch, "batch_size": options.batch, "seed": 1}
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
    return f"{task:<5} ms: {stages}{per_round}; GiB: {peaks}"


if __name__ == "__main__":
    sys.exit(main())
