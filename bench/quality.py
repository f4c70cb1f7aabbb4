"""The pocket model's score: GenEval's categories on held-out prompts, edits and questions.

    python bench/quality.py [--dtype bf16] [--quant int8] [--iters 8] [--cfg 3]     100 tests a category
    python bench/quality.py --quick                                 about a minute, against the stored baseline

A fixed seed decides what is asked and every picture's noise. Shares come with 95 % Wilson intervals. Writes the worst
failures to a contact sheet; one JSON line last. With --quick the exit status is 1 when a score is below the lower end
of the baseline's interval.
"""

import argparse
import json
import platform
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import NormalDist
from typing import Any

import torch
from unipic_run import __version__
from unipic_run.bench.checkout import require_this_checkout
from unipic_run.engine.arguments import shortcuts
from unipic_run.engine.checkpoint import manifest
from unipic_run.engine.checkpoint.cache import cached
from unipic_run.engine.device import dtype_name
from unipic_run.engine.engine import Engine
from unipic_run.engine.sampling import SamplingOptions
from unipic_run.pocket.exam import CATEGORIES, Outcome, draw_exam, sit_exam
from unipic_run.pocket.samples import SCORED
from unipic_run.pocket.sheet import save_sheet

QUICK, FULL = 6, 100  # tests a category
SHOWN = 40  # failures on the sheet
Z = NormalDist().inv_cdf(0.975)
Score = dict[str, float]  # "right" and "of" counts, "share", and the interval's ends "low" and "high"


def main(arguments: list[str] | None = None) -> int:
    root = require_this_checkout(__file__)
    options = parse(arguments)
    cut = shortcuts(
        options.speed, options.head_steps, options.order, options.cfg_interval, options.cfg_cache, options.solver, None
    )
    baseline = root / "bench" / "baselines" / "quality-quick.json"
    start = time.perf_counter()
    loading = {name: getattr(options, name) for name in ("device", "dtype", "quant", "attention")}
    with Engine.from_pretrained(options.model, **loading, say=complain) as engine:
        how = SamplingOptions(steps=options.iters, guidance=options.cfg, **cut)
        outcomes = sit_exam(engine, draw_exam(options.each, options.seed), how, options.seed)
        summary = describe(options, engine) | cut
    scores = scored(outcomes)
    summary |= {"seconds": round(time.perf_counter() - start, 1), "scores": scores}
    if not options.json:
        print(*(line(name, score) for name, score in scores.items()), sep="\n")
    if options.sheet is not None:
        save_sheet(options.sheet, worst(outcomes))
    if options.update_baseline:
        baseline.parent.mkdir(exist_ok=True)
        baseline.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    failures = []
    if options.quick:
        failures = fallen(scores, json.loads(baseline.read_text(encoding="utf-8"))["scores"])
        print(*failures, sep="\n", file=sys.stderr)
    print(json.dumps(summary | {"failures": failures}))
    return 1 if failures else 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="quality", description="Score of the pocket model on held-out tests.")
    parser.add_argument("--model", default="pocket", help="pocket, or a folder of the same world (default pocket)")
    parser.add_argument("--each", type=int, default=FULL, metavar="N", help=f"tests a category (default {FULL})")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK} tests a category, against the baseline")
    parser.add_argument("--update-baseline", action="store_true", help="with --quick: store this score instead")
    parser.add_argument("--iters", "--steps", type=int, help="rounds (default the model's)")
    parser.add_argument("--cfg", type=float, help="guidance (default the model's)")
    parser.add_argument("--speed", "--preset", help="exact, balanced or fast")
    parser.add_argument("--head-steps", metavar="A:B", help="in the first and in the last round")
    parser.add_argument("--order", help="random or gtr")
    parser.add_argument("--cfg-interval", metavar="A:B", help="shares of the run between which guidance is on")
    parser.add_argument("--cfg-cache", type=float, metavar="X", help="growth of what is known between guided rounds")
    parser.add_argument("--solver", help="of the diffusion head: ddpm, ddim or dpm2")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto", choices=["auto", "bf16", "fp16", "fp32"])
    parser.add_argument("--quant", choices=["none", "int8", "bnb8", "nf4"], help="by default as it is stored")
    parser.add_argument("--attn", dest="attention", default="auto", help="attention backend")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sheet", type=Path, metavar="PNG", help="save the worst failures")
    parser.add_argument("--json", action="store_true", help="print the JSON line only")
    options = parser.parse_args(arguments)
    if options.update_baseline and not options.quick:
        parser.error("--update-baseline needs --quick")
    if options.quick:
        options.each = QUICK
    return options


def complain(sentence: str) -> None:
    print(sentence, file=sys.stderr)


def describe(options: argparse.Namespace, engine: Engine) -> dict[str, Any]:
    """The settings and versions without which a score means nothing."""
    return {
        "bench": "quality",
        "each": options.each,
        "seed": options.seed,
        "iters": options.iters or engine.config.rounds,
        "cfg": engine.config.guidance if options.cfg is None else options.cfg,
        "head_steps": engine.config.head.steps,
        **made_by(engine),
        "weights": weights_of(options.model),
    }


def weights_of(model: str) -> str | None:
    """Digest of the one weights file of a converted model, since models are trained on under their names; else None."""
    folder = cached(model) or Path(model).expanduser()
    files = manifest.read(folder)["files"] if (folder / manifest.NAME).is_file() else {}
    return files["model.safetensors"]["sha256"][:12] if "model.safetensors" in files else None


def made_by(engine: Engine) -> dict[str, Any]:
    """The model as it was loaded, and where."""
    return {
        "model": engine.name,
        "dtype": dtype_name(engine.dtype),
        "quant": engine.quant,
        "attention": engine.attention,
        "device": str(engine.device),
        "versions": {"unipic_run": __version__, "torch": torch.__version__, "python": platform.python_version()},
    }


def scored(outcomes: Sequence[Outcome]) -> dict[str, Score]:
    """Every category's score and, over GenEval's categories together, `generation`."""
    scores = {"generation": _score([o for o in outcomes if o.category in SCORED])}
    return scores | {name: _score([o for o in outcomes if o.category == name]) for name in CATEGORIES}


def _score(outcomes: Sequence[Outcome]) -> Score:
    right, of = sum(not o.faults for o in outcomes), len(outcomes)
    low, high = wilson(right, of)
    return {"right": right, "of": of, "share": right / of, "low": low, "high": high}


def wilson(right: int, of: int) -> tuple[float, float]:
    """The 95 % interval of a share (Wilson 1927)."""
    share, spread = right / of, Z**2 / of
    middle = (share + spread / 2) / (1 + spread)
    half = (spread * share * (1 - share) + spread**2 / 4) ** 0.5 / (1 + spread)
    return max(0.0, middle - half), min(1.0, middle + half)


def fallen(scores: dict[str, Score], baseline: dict[str, Score]) -> list[str]:
    """The scores below the lower ends of the baseline's intervals."""
    return [
        f"{name}: {score['share']:.2f}, the baseline has {known['share']:.2f} and allows {known['low']:.2f}"
        for name, score in scores.items()
        for known in [baseline[name]]
        if score["share"] < known["low"]
    ]


def worst(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """Those with most faults first."""
    failed = [o for o in outcomes if o.faults]
    return sorted(failed, key=lambda o: -len(o.faults))[:SHOWN]


def line(name: str, score: Score) -> str:
    return f"{name:<14} {score['share']:.3f}  [{score['low']:.3f}, {score['high']:.3f}]  {score['right']}/{score['of']}"


if __name__ == "__main__":
    sys.exit(main())
