"""How far DeepGen's shortcuts are from exact pictures, how many blocks they spare, and the time predicted with them.

    python bench/shortcuts_deepgen.py ../shared/goldens/deepgen [--only "block cache 0.3"] [--out FILE.json]
    python bench/shortcuts_deepgen.py deepgen --res 1024 --device cuda

MODEL is a name, a checkpoint, or a folder of recorded runs, of which a checkpoint is put together. Every way makes the
same prompts from the same noise. Latents are told by their relative distance |a - b| / |b|, pictures by the mean
difference of their 8-bit levels: both say how much is changed, neither what it is worth. How far apart pictures of
other prompts and seeds are stands beside them: the distance of what has little in common. Fewer steps are the control.
Seconds are those predicted for DeepGen at 1024x1024 in int8 on an RTX 4090, with the share of blocks that was reused
here: between the plan in which nothing is reused and that in which all is that may be. One JSON line last.
"""

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from unipic_run.bench.checkout import require_this_checkout
from unipic_run.bench.parity_deepgen import DEEPGEN, assemble
from unipic_run.bench.quality import made_by
from unipic_run.engine.checks import PATCH
from unipic_run.engine.engine import Engine
from unipic_run.engine.estimate import estimate
from unipic_run.engine.models.deepgen.block_cache import MOST_REUSED
from unipic_run.engine.noise import PhiloxNoise
from unipic_run.engine.precision import true_float32
from unipic_run.engine.run import to_levels
from unipic_run.engine.sampling import WHOLE_RUN
from unipic_run.engine.schedules import begins_within
from unipic_run.engine.task import Batch, Task

PROMPTS = (
    "a red fox in the snow, oil painting",
    "two dogs and a blue ball on the beach",
    "a street at night after the rain",
    "a bowl of green apples beside a clock",
)
SEEDS = 2  # pictures of each
STEPS = 50
WAYS: dict[str, dict[str, Any]] = {
    "exact": {},
    "guidance 0:0.8": {"cfg_interval": (0.0, 0.8)},
    "guidance 0:0.6": {"cfg_interval": (0.0, 0.6)},
    "guidance 0.2:1": {"cfg_interval": (0.2, 1.0)},
    "guidance 0.4:1": {"cfg_interval": (0.4, 1.0)},
    "block cache 0.2": {"block_cache": 0.2},
    "block cache 0.3": {"block_cache": 0.3},
    "block cache 0.4": {"block_cache": 0.4},
    "block cache 1": {"block_cache": 1.0},
    "28 steps": {"steps": 28},
    "18 steps": {"steps": 18},
    "guidance 0.2:1, block cache 0.4": {"cfg_interval": (0.2, 1.0), "block_cache": 0.4},
    "32 steps, guidance 0.2:1": {"steps": 32, "cfg_interval": (0.2, 1.0)},
    "20 steps, guidance 0.2:1": {"steps": 20, "cfg_interval": (0.2, 1.0)},
    "28 steps, block cache 0.4": {"steps": 28, "block_cache": 0.4},
}
RECORDED = "of the recorded runs: small, random weights"
PREDICTED = {"res": 1024, "quant": "int8", "attention": "int8-qk", "gpu": "rtx4090"}


@dataclass(frozen=True)
class Made:
    latents: Tensor  # (B, channels, h, w)
    levels: Tensor  # (B, H, W, 3) uint8
    reused: float  # share of the passes of rows through the later blocks that did not happen


def main(arguments: list[str] | None = None) -> int:
    require_this_checkout(__file__)
    options = parse(arguments)
    chosen = {name: how for name, how in WAYS.items() if options.only in (None, name) or name == "exact"}
    rows: dict[str, dict[str, Any]] = {}
    with engine_of(options) as engine:
        exact = made(engine, {}, options)
        for name, how in chosen.items():
            found = made(engine, how, options) if how else exact
            rows[name] = how | distance(found, exact) | {"reused": found.reused}
            rows[name]["predicted"] = predicted(how, found.reused)
            print(line(name, rows[name]), file=sys.stderr, flush=True)
        pictures = len(exact.latents)
        summary = {"bench": "shortcuts_deepgen", "pictures": pictures, "res": options.res, "seed": options.seed}
        summary |= made_by(engine) | {"model": RECORDED if is_recorded(options.model) else Path(options.model).name}
    summary["other pictures"] = distance(Made(exact.latents.roll(1, 0), exact.levels.roll(1, 0), 0.0), exact)
    summary |= {"predicted for": {"model": "deepgen", **PREDICTED}, "ways": rows}
    if options.out is not None:
        options.out.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(summary))
    return 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="shortcuts_deepgen", description="How far DeepGen's shortcuts are from exact."
    )
    parser.add_argument("model", metavar="MODEL", help="a name, a checkpoint, or a folder of recorded runs")
    parser.add_argument("--res", type=int, default=128, metavar="PIXELS", help="side of the pictures (default 128)")
    parser.add_argument("--only", choices=WAYS, help="beside exact")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto", choices=["auto", "bf16", "fp16", "fp32"])
    parser.add_argument("--quant", choices=["none", "int8"], help="by default as it is stored")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write the JSON there")
    return parser.parse_args(arguments)


def is_recorded(model: str) -> bool:
    return (Path(model) / "weights").is_dir()


@contextmanager
def engine_of(options: argparse.Namespace) -> Iterator[Engine]:
    how = {"device": options.device, "dtype": options.dtype, "quant": options.quant}
    with tempfile.TemporaryDirectory(prefix="unipic-shortcuts-") as folder:
        model = options.model
        if is_recorded(model):
            model = assemble(Path(model), Path(folder) / "recorded", DEEPGEN)
        with Engine.from_pretrained(model, **how) as engine:
            yield engine


@torch.inference_mode()
@true_float32()
def made(engine: Engine, how: dict[str, Any], options: argparse.Namespace) -> Made:
    """All pictures as one batch, in which none depends on another."""
    loaded, side = engine.loaded, options.res // PATCH
    family, model = loaded.family, loaded.model
    steps = how.get("steps", STEPS)
    rest = {name: value for name, value in how.items() if name != "steps"}
    task = Task("generate", side, side, steps, engine.config.guidance, "constant", 1.0, **rest)
    batch = Batch(PROMPTS * SEEDS, [PhiloxNoise(options.seed + i) for i in range(len(PROMPTS) * SEEDS)])
    conditions, passed = None, []
    for stage in takewhile(lambda name: name != "sample", family.needs(task.kind)):
        conditions = getattr(family, stage)(model, loaded.tokens, task, batch, conditions)
    schedule = family.schedule(model.config, task, batch).to(engine.device)
    hook = model.dit.blocks[-1].register_forward_hook(lambda block, given, _: passed.append(len(given[0])))
    *_, latents = family.sample(model, conditions, task, batch, schedule)
    hook.remove()
    levels = to_levels(family.decode(model, latents, side, side))
    possible = len(batch.prompts) * (steps + guided(steps, task.cfg_interval))
    return Made(latents.float(), levels, 1 - sum(passed) / possible)


def guided(steps: int, interval: tuple[float, float]) -> int:
    """How many of the steps have guidance."""
    return sum(begins_within(interval, step, steps) for step in range(steps))


def distance(found: Made, exact: Made) -> dict[str, float]:
    """Means over pictures, and the farthest one."""
    off = (found.latents - exact.latents).flatten(1).norm(dim=1) / exact.latents.flatten(1).norm(dim=1)
    levels = (found.levels.float() - exact.levels.float()).abs().mean().item()
    return {"latents": round(off.mean().item(), 4), "farthest": round(off.max().item(), 4), "levels": round(levels, 2)}


def predicted(how: dict[str, Any], reused: float) -> float:
    """Seconds of DeepGen, where that share of its rows' passes through the later blocks is reused."""
    steps, interval = how.get("steps", STEPS), how.get("cfg_interval", WHOLE_RUN)
    if "block_cache" not in how:
        return round(planned(steps, interval, None), 3)
    nothing, all_that_may = (planned(steps, interval, threshold) for threshold in (0.5, 1.0))
    return round(nothing - (nothing - all_that_may) * reused / most(steps, interval), 3)


def most(steps: int, interval: tuple[float, float]) -> float:
    """The largest share there is, of a picture's two rows."""
    ran = [steps, guided(steps, interval)]
    return 1 - sum(math.ceil(count / (1 + MOST_REUSED)) for count in ran) / sum(ran)


@cache
def planned(steps: int, interval: tuple[float, float], block_cache: float | None) -> float:
    shortcuts = {"cfg_interval": interval, "block_cache": block_cache}
    told = estimate("deepgen", "gen", steps=steps, shortcuts=shortcuts, **PREDICTED)
    return sum(stage["seconds"] for stage in told["stages"].values())


def line(name: str, row: dict[str, Any]) -> str:
    far = f"latents {row['latents']:.3f} (at most {row['farthest']:.3f})  levels {row['levels']:5.1f}"
    return f"{name:<42} {far}  reused {row['reused']:.2f}  {row['predicted']:.2f} s"


if __name__ == "__main__":
    sys.exit(main())
