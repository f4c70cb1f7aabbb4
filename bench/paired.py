"""Held-out pictures of the pocket model made in several ways from the same noise, and what each way loses.

The loss is the share of pictures that are right, of the first way less another, with a 95 % interval by bootstrap over
prompts. The ways take turns at a few prompts each, so that what else the machine does falls on all of them, and what is
done is written after every turn, so that another sitting goes on from there.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from unipic_run.engine.engine import Engine
from unipic_run.engine.errors import UsageError
from unipic_run.engine.sampling import SamplingOptions
from unipic_run.pocket.exam import generations
from unipic_run.pocket.samples import Sample

TURN = 24  # pictures of a way
RESAMPLED = 10_000


@dataclass(frozen=True)
class Way:
    engine: Engine
    how: SamplingOptions


def parser_of(prog: str, description: str, names: Iterable[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=prog, description=description)
    parser.add_argument("--model", default="pocket", help="pocket, or a folder of the same world (default pocket)")
    parser.add_argument("--each", type=int, default=16, metavar="N", help="prompts a category (default 16)")
    parser.add_argument("--only", choices=list(names), action="append", help="beside the first way; repeatable")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--minutes", type=float, default=1e6, help="then end, to be continued with --out; category by category"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write the JSON there, and go on from it")
    return parser


class Series:
    """The pictures of every way so far: which are right, as a text of 0 and 1, and the seconds they took."""

    def __init__(self, made: dict[str, Any], names: Sequence[str], out: Path | None) -> None:
        """`made` says of what, and goes into the file `out`. Raises UsageError when that has something else."""
        self.made, self.out, self.first = made, out, names[0]
        self.right, self.seconds = dict.fromkeys(names, ""), dict.fromkeys(names, 0.0)
        if out is not None and out.exists():
            kept = json.loads(out.read_text(encoding="utf-8"))
            if {**kept, **made} != kept or set(kept["right"]) != set(names):
                raise UsageError(f"{out} holds other ways, or was made otherwise", "give another --out, or delete it")
            self.right, self.seconds = ({name: kept[what][name] for name in names} for what in ("right", "seconds"))

    @property
    def done(self) -> int:
        return len(self.right[self.first])

    def run(self, ways: Mapping[str, Way], samples: Sequence[Sample], minutes: float) -> None:
        """Until all samples are done, or so many minutes are over."""
        seed = self.made["seed"]
        for engine in {id(way.engine): way.engine for way in ways.values()}.values():
            generations(engine, samples[:2], {}, seed)  # what comes once is nobody's price
        until = time.monotonic() + 60 * minutes
        while self.done < len(samples) and time.monotonic() < until:
            self.turn(ways, samples)
            self.write(self.kept())
            print(f"{self.done} of {len(samples)} pictures", file=sys.stderr, flush=True)

    def turn(self, ways: Mapping[str, Way], samples: Sequence[Sample]) -> None:
        """The next few pictures in all ways."""
        at = self.done
        for name, way in ways.items():
            start = time.perf_counter()
            outcomes = generations(way.engine, samples[at : at + TURN], way.how, self.made["seed"] + at)
            self.seconds[name] += time.perf_counter() - start
            self.right[name] += "".join("01"[not outcome.faults] for outcome in outcomes)

    def kept(self) -> dict[str, Any]:
        return {**self.made, "pictures": self.done, "right": self.right, "seconds": self.seconds}

    def write(self, told: Mapping[str, Any]) -> None:
        if self.out is not None:
            self.out.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")

    def prices(self) -> dict[str, dict[str, Any]]:
        """Of every way, and `ratio` of its seconds to the first's; none before the first picture."""
        first = bits(self.right[self.first])
        return {
            name: price(first, bits(right)) | {"ratio": round(self.seconds[name] / self.seconds[self.first], 3)}
            for name, right in self.right.items()
            if self.done
        }


def bits(right: str) -> np.ndarray:
    return np.array([sign == "1" for sign in right])


def price(first: np.ndarray, other: np.ndarray, seed: int = 0) -> dict[str, Any]:
    """Share of right pictures, and what is lost of the first's with its 95 % interval over resampled pairs."""
    lost = first.astype(float) - other
    chosen = np.random.default_rng(seed).integers(len(lost), size=(RESAMPLED, len(lost)))
    low, high = np.quantile(lost[chosen].mean(axis=1), [0.025, 0.975]).tolist()
    return {"right": float(other.mean()), "lost": float(lost.mean()), "low": low, "high": high}


def line(name: str, row: Mapping[str, Any]) -> str:
    lost = f"{100 * row['lost']:+5.1f} [{100 * row['low']:+.1f}, {100 * row['high']:+.1f}]"
    return f"{name:<28} right {row['right']:.3f}  lost {lost} points  x{row['ratio']:.2f}"
