"""What each shortcut costs in quality and saves in time, on the pocket model, paired with exact pictures.

    python bench/shortcuts.py [--each 16] [--only "head steps 50:5"] [--out FILE.json]

Every way makes the same held-out prompts from the same noise. The loss is the share of pictures that are right, exact
less shortcut, with a 95 % interval by bootstrap over prompts. Seconds are this machine's for the pocket model, as a
ratio of exact's in the same run, and those predicted for UniPic at 1024x1024 in int8 on an RTX 4090. Fewer rounds and
fewer steps alone are the controls. One JSON line last.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from unipic_run.bench.checkout import require_this_checkout
from unipic_run.bench.quality import made_by
from unipic_run.engine.engine import Engine
from unipic_run.engine.estimate import estimate
from unipic_run.pocket.exam import Sampling, draw_exam, generations
from unipic_run.pocket.samples import Sample

WAYS: dict[str, dict[str, Any]] = {  # "steps" as a share of the model's rounds
    "exact": {},
    "head steps 50:5": {"head_steps": (50, 5)},
    "head steps 25:5": {"head_steps": (25, 5)},
    "head steps 10:10": {"head_steps": (10, 10)},
    "head steps 10:10, ddim": {"head_steps": (10, 10), "solver": "ddim"},
    "head steps 10:10, dpm2": {"head_steps": (10, 10), "solver": "dpm2"},
    "guidance 0:0.6": {"cfg_interval": (0.0, 0.6)},
    "guidance 0.2:1": {"cfg_interval": (0.2, 1.0)},
    "guidance kept to 1.5": {"cfg_cache": 1.5},
    "guidance kept to 2": {"cfg_cache": 2.0},
    "gtr": {"order": "gtr"},
    "gtr, 50:20, guidance 0:0.6": {"order": "gtr", "head_steps": (50, 20), "cfg_interval": (0.0, 0.6)},
    "half the rounds": {"steps": 0.5},
}
PREDICTED = {"quant": "int8", "attention": "int8-qk", "gpu": "rtx4090"}
ROUNDS = 32  # of the model that it is predicted for
RESAMPLED = 10_000


def main(arguments: list[str] | None = None) -> int:
    require_this_checkout(__file__)
    options = parse(arguments)
    chosen = {name: how for name, how in WAYS.items() if options.only in (None, name) or name == "exact"}
    samples = draw_exam(options.each, options.seed).samples
    rows: dict[str, dict[str, Any]] = {}
    with Engine.from_pretrained(options.model, device=options.device, dtype=options.dtype) as engine:
        generations(engine, samples[:2], {}, options.seed)  # what comes once is nobody's price
        right: dict[str, np.ndarray] = {}
        for name, how in chosen.items():
            right[name], seconds = made(engine, samples, how, options.seed)
            rows[name] = price(right["exact"], right[name]) | {"seconds": seconds} | predicted(how)
            rows[name]["ratio"] = round(seconds / rows["exact"]["seconds"], 3)
            print(line(name, rows[name]), file=sys.stderr, flush=True)
        summary = {"bench": "shortcuts", "pictures": len(samples), "seed": options.seed, **made_by(engine)}
    summary |= {"predicted for": {"model": "unipic", "res": 1024, **PREDICTED}, "ways": rows}
    if options.out is not None:
        options.out.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(summary))
    return 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="shortcuts", description="The price of each shortcut, on the pocket model.")
    parser.add_argument("--model", default="pocket", help="pocket, or a folder of the same world (default pocket)")
    parser.add_argument("--each", type=int, default=16, metavar="N", help="prompts a category (default 16)")
    parser.add_argument("--only", choices=WAYS, help="beside exact")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto", choices=["auto", "bf16", "fp16", "fp32"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write the JSON there")
    return parser.parse_args(arguments)


def made(engine: Engine, samples: Sequence[Sample], how: dict[str, Any], seed: int) -> tuple[np.ndarray, float]:
    """Which pictures are right, and the seconds that all of them took."""
    start = time.perf_counter()
    outcomes = generations(engine, samples, at(how, engine.config.rounds), seed)
    return np.array([not outcome.faults for outcome in outcomes]), round(time.perf_counter() - start, 2)


def at(how: dict[str, Any], rounds: int) -> Sampling:
    """With the share of a model's rounds as their number."""
    return {**how, "steps": round(how["steps"] * rounds)} if "steps" in how else how


def price(exact: np.ndarray, shortcut: np.ndarray, seed: int = 0) -> dict[str, Any]:
    """Share of right pictures, and what is lost of exact's with its 95 % interval over resampled pairs."""
    lost = exact.astype(float) - shortcut
    chosen = np.random.default_rng(seed).integers(len(lost), size=(RESAMPLED, len(lost)))
    low, high = np.quantile(lost[chosen].mean(axis=1), [0.025, 0.975]).tolist()
    return {"right": float(shortcut.mean()), "lost": float(lost.mean()), "low": low, "high": high}


def predicted(how: dict[str, Any]) -> dict[str, float]:
    """Seconds that UniPic would take."""
    options = dict(at(how, ROUNDS))
    told = estimate("unipic", "gen", steps=options.pop("steps", None), shortcuts=options, **PREDICTED)
    return {"predicted": round(sum(stage["seconds"] for stage in told["stages"].values()), 3)}


def line(name: str, row: dict[str, Any]) -> str:
    lost = f"{100 * row['lost']:+5.1f} [{100 * row['low']:+.1f}, {100 * row['high']:+.1f}]"
    return f"{name:<28} right {row['right']:.3f}  lost {lost} points  x{row['ratio']:.2f}  {row['predicted']:.2f} s"


if __name__ == "__main__":
    sys.exit(main())
