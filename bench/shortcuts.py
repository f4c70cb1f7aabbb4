"""What each shortcut costs in quality and saves in time, on the pocket model, paired with exact pictures.

    python bench/shortcuts.py [--each 100] [--only balanced --only fast] [--out FILE.json] [--minutes 60]

What a loss is says bench/paired.py. Seconds are this machine's for the pocket model, as a ratio of exact's in the same
run, and those predicted for UniPic at 1024x1024 in int8 on an RTX 4090. Fewer rounds and fewer steps alone are the
controls. The same command again goes on from --out. One JSON line last. Presets are to lose less than MOST: whether
the interval excludes that is told, and where it excludes that they do not, the exit status is 1.
"""

import argparse
import json
import sys
from collections.abc import Mapping
from typing import Any

from unipic_run.bench.checkout import require_this_checkout
from unipic_run.bench.paired import Series, Way, line, parser_of
from unipic_run.bench.quality import made_by, weights_of
from unipic_run.engine import families
from unipic_run.engine.engine import Engine
from unipic_run.engine.estimate import estimate
from unipic_run.engine.sampling import SamplingOptions
from unipic_run.pocket.exam import draw_exam

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
MOST = {"balanced": 0.02, "fast": 0.04}  # of pictures
PREDICTED = {"quant": "int8", "attention": "int8-qk", "gpu": "rtx4090"}


def main(arguments: list[str] | None = None) -> int:
    require_this_checkout(__file__)
    options = parse(arguments)
    chosen = {name: how for name, how in WAYS.items() if name == "exact" or not options.only or name in options.only}
    samples = draw_exam(options.each, options.seed).samples
    with Engine.from_pretrained(options.model, device=options.device, dtype=options.dtype) as engine:
        made = {"bench": "shortcuts", "asked": len(samples), "seed": options.seed, **made_by(engine)}
        made["weights"] = weights_of(options.model)
        rounds, head_steps = engine.config.rounds, engine.config.head.steps
        ways = {name: Way(engine, scaled(how, rounds, head_steps)) for name, how in chosen.items()}
        series = Series(made, list(ways), options.out)
        series.run(ways, samples, options.minutes)
    prices = {name: row | {"predicted": predicted(chosen[name])} for name, row in series.prices().items()}
    for name in MOST.keys() & prices.keys():
        prices[name] |= {"most": MOST[name], "excluded": prices[name]["high"] < MOST[name]}
    lost = [name for name, row in prices.items() if "most" in row and row["low"] > row["most"]]
    summary = series.kept() | {"predicted for": {"model": "unipic", "res": 1024, **PREDICTED}, "ways": prices}
    summary |= {"passed": not lost, "lost more": lost}
    series.write(summary)
    print(*(f"{line(name, row)}  {row['predicted']:.2f} s" for name, row in prices.items()), sep="\n", file=sys.stderr)
    print(json.dumps(summary))
    return 1 if lost else 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = parser_of("shortcuts", "The price of each shortcut, on the pocket model.", WAYS)
    parser.add_argument("--dtype", default="auto", choices=["auto", "bf16", "fp16", "fp32"])
    return parser.parse_args(arguments)


def scaled(how: How, rounds: int, head_steps: int) -> SamplingOptions:
    """With shares of a model's rounds and head steps as numbers."""
    found = dict(how)
    if "steps" in how:
        found["steps"] = round(how["steps"] * rounds)
    if "head_steps" in how:
        found["head_steps"] = tuple(round(share * head_steps) for share in how["head_steps"])
    return found


def predicted(how: How) -> float:
    """Seconds that UniPic would take."""
    config = families.architecture("unipic")[1]
    options = dict(scaled(how, config.rounds, config.head.steps))
    told = estimate("unipic", "gen", steps=options.pop("steps", None), shortcuts=options, **PREDICTED)
    return round(sum(stage["seconds"] for stage in told["stages"].values()), 3)


if __name__ == "__main__":
    sys.exit(main())
