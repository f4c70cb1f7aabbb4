"""What each shortcut costs in quality and saves in time, on the pocket model, paired with exact pictures.

    python bench/shortcuts.py [--each 100] [--only balanced --only fast] [--out FILE.json] [--minutes 60]

Every way makes the same held-out prompts from the same noise. The loss is the share of pictures that are right, exact
less shortcut, with a 95 % interval by bootstrap over prompts. Seconds are this machine's for the pocket model, as a
ratio of exact's in the same run, and those predicted for UniPic at 1024x1024 in int8 on an RTX 4090. Fewer rounds and
fewer steps alone are the controls. The ways take turns at a few prompts each, so that what else the machine does falls
on all of them, and --out is written after every turn: the same command again goes on from there. One JSON line last.
"""

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from unipic_run.bench.checkout import require_this_checkout
from unipic_run.bench.quality import made_by, weights_of
from unipic_run.engine import families
from unipic_run.engine.engine import Engine
from unipic_run.engine.errors import UsageError
from unipic_run.engine.estimate import estimate
from unipic_run.pocket.exam import Sampling, draw_exam, generations
from unipic_run.pocket.samples import Sample

How = Mapping[str, Any]
WAYS: dict[str, How] = {  # "steps" and "head_steps" as shares of a model's own
    "exact": {},
    "head steps 1:0.1": {"head_steps": (1, 0.1)},
    "head steps 0.5:0.1": {"head_steps": (0.5, 0.1)},
    "head steps 0.2:0.2": {"head_steps": (0.2, 0.2)},
    "head steps 0.1:0.1": {"head_steps": (0.1, 0.1)},
    "head steps 0.1:0.1, ddim": {"head_steps": (0.1, 0.1), "solver": "ddim"},
    "head steps 0.1:0.1, dpm2": {"head_steps": (0.1, 0.1), "solver": "dpm2"},
    "guidance 0:0.8": {"cfg_interval": (0.0, 0.8)},
    "guidance 0:0.6": {"cfg_interval": (0.0, 0.6)},
    "guidance kept to 1.5": {"cfg_cache": 1.5},
    "guidance kept to 2": {"cfg_cache": 2.0},
    "gtr": {"order": "gtr"},
    "balanced": {"speed": "balanced"},
    "fast": {"speed": "fast"},
    "half the rounds": {"steps": 0.5},
    "two fifths of the rounds": {"steps": 0.4},
    "a quarter of the rounds": {"steps": 0.25},
}
PREDICTED = {"quant": "int8", "attention": "int8-qk", "gpu": "rtx4090"}
TURN = 24  # pictures of a way
RESAMPLED = 10_000


def main(arguments: list[str] | None = None) -> int:
    require_this_checkout(__file__)
    options = parse(arguments)
    chosen = {name: how for name, how in WAYS.items() if name == "exact" or not options.only or name in options.only}
    samples = draw_exam(options.each, options.seed).samples
    with Engine.from_pretrained(options.model, device=options.device, dtype=options.dtype) as engine:
        made = {"bench": "shortcuts", "asked": len(samples), "seed": options.seed, **made_by(engine)}
        made["weights"] = weights_of(options.model)
        series = begun(options.out, made, chosen)
        generations(engine, samples[:2], {}, options.seed)  # what comes once is nobody's price
        until = time.monotonic() + 60 * options.minutes
        while series.done < len(samples) and time.monotonic() < until:
            series.turn(engine, samples)
            if options.out is not None:
                options.out.write_text(json.dumps(series.kept(), indent=1) + "\n", encoding="utf-8")
            print(f"{series.done} of {len(samples)} pictures", file=sys.stderr, flush=True)
    summary = series.kept() | {"predicted for": {"model": "unipic", "res": 1024, **PREDICTED}, "ways": series.rows()}
    if options.out is not None:
        options.out.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    print(*(line(name, row) for name, row in summary["ways"].items()), sep="\n", file=sys.stderr)
    print(json.dumps(summary))
    return 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="shortcuts", description="The price of each shortcut, on the pocket model.")
    parser.add_argument("--model", default="pocket", help="pocket, or a folder of the same world (default pocket)")
    parser.add_argument("--each", type=int, default=16, metavar="N", help="prompts a category (default 16)")
    parser.add_argument("--only", choices=WAYS, action="append", help="beside exact; repeatable")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto", choices=["auto", "bf16", "fp16", "fp32"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--minutes", type=float, default=1e6, help="then end, to be continued with --out; category by category"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write the JSON there, and go on from it")
    return parser.parse_args(arguments)


class Series:
    """The pictures of every way so far: which are right, as a text of 0 and 1, and the seconds they took."""

    def __init__(self, made: dict[str, Any], ways: Mapping[str, How]) -> None:
        self.made, self.ways = made, ways
        self.right, self.seconds = dict.fromkeys(ways, ""), dict.fromkeys(ways, 0.0)

    @property
    def done(self) -> int:
        return len(self.right["exact"])

    def turn(self, engine: Engine, samples: Sequence[Sample]) -> None:
        """The next few pictures in all ways."""
        at, seed = self.done, self.made["seed"]
        for name, how in self.ways.items():
            start = time.perf_counter()
            asked = scaled(how, engine.config.rounds, engine.config.head.steps)
            outcomes = generations(engine, samples[at : at + TURN], asked, seed + at)
            self.seconds[name] += time.perf_counter() - start
            self.right[name] += "".join("01"[not outcome.faults] for outcome in outcomes)

    def kept(self) -> dict[str, Any]:
        return {**self.made, "pictures": self.done, "right": self.right, "seconds": self.seconds}

    def rows(self) -> dict[str, dict[str, Any]]:
        """The price of every way; none before the first picture."""
        exact = bits(self.right["exact"])
        return {
            name: price(exact, bits(self.right[name]))
            | {"ratio": round(self.seconds[name] / self.seconds["exact"], 3), "predicted": predicted(how)}
            for name, how in self.ways.items()
            if self.done
        }


def begun(out: Path | None, made: dict[str, Any], ways: Mapping[str, How]) -> Series:
    """What an earlier sitting left in `out`, or nothing. Raises UsageError when that was of something else."""
    series = Series(made, ways)
    if out is not None and out.exists():
        kept = json.loads(out.read_text(encoding="utf-8"))
        if {**kept, **made} != kept or set(kept["right"]) != set(ways):
            raise UsageError(f"{out} holds other ways, or was made otherwise", "give another --out, or delete it")
        series.right, series.seconds = ({name: kept[what][name] for name in ways} for what in ("right", "seconds"))
    return series


def bits(right: str) -> np.ndarray:
    return np.array([sign == "1" for sign in right])


def scaled(how: How, rounds: int, head_steps: int) -> Sampling:
    """With shares of a model's rounds and head steps as numbers."""
    found = dict(how)
    if "steps" in how:
        found["steps"] = round(how["steps"] * rounds)
    if "head_steps" in how:
        found["head_steps"] = tuple(round(share * head_steps) for share in how["head_steps"])
    return found


def price(exact: np.ndarray, shortcut: np.ndarray, seed: int = 0) -> dict[str, Any]:
    """Share of right pictures, and what is lost of exact's with its 95 % interval over resampled pairs."""
    lost = exact.astype(float) - shortcut
    chosen = np.random.default_rng(seed).integers(len(lost), size=(RESAMPLED, len(lost)))
    low, high = np.quantile(lost[chosen].mean(axis=1), [0.025, 0.975]).tolist()
    return {"right": float(shortcut.mean()), "lost": float(lost.mean()), "low": low, "high": high}


def predicted(how: How) -> float:
    """Seconds that UniPic would take."""
    config = families.architecture("unipic")[1]
    options = dict(scaled(how, config.rounds, config.head.steps))
    told = estimate("unipic", "gen", steps=options.pop("steps", None), shortcuts=options, **PREDICTED)
    return round(sum(stage["seconds"] for stage in told["stages"].values()), 3)


def line(name: str, row: Mapping[str, Any]) -> str:
    lost = f"{100 * row['lost']:+5.1f} [{100 * row['low']:+.1f}, {100 * row['high']:+.1f}]"
    return f"{name:<28} right {row['right']:.3f}  lost {lost} points  x{row['ratio']:.2f}  {row['predicted']:.2f} s"


if __name__ == "__main__":
    sys.exit(main())
