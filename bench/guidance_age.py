"""How the difference that guidance is about ages while tokens become known: what `--cfg-cache` goes by.

    python bench/guidance_age.py [--pictures 6] [--out FILE.json]

In every round of exact pictures of the pocket model, z without the prompt less z with it is computed for all masked
positions. An error is that of a former round's difference for the tokens that a round predicts, relative to its own; a
round without guidance would be 1 off. They are told by how many times as much is known, for rounds before and behind
the middle of the run. One JSON line last.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar
from unittest.mock import patch

import numpy as np
from torch import Tensor
from unipic_run.bench.checkout import require_this_checkout
from unipic_run.bench.quality import made_by
from unipic_run.engine.engine import Engine
from unipic_run.engine.models.unipic import model as unipic
from unipic_run.engine.models.unipic.sampler import Sampler
from unipic_run.engine.schedules import Round
from unipic_run.kernels.mar_tokens import select_tokens
from unipic_run.pocket.exam import draw_exam

GROWTH = (1.0, 1.25, 1.75, 2.5, 4.0, 8.0)  # between which errors are taken together
Aged = tuple[float, bool, float]  # growth of the known tokens, whether behind the middle, error


class Watched(Sampler):
    """Computes every difference, and remembers how wrong those of former rounds would have been."""

    aged: ClassVar[list[Aged]] = []  # of all pictures

    def understand(self, tokens: Tensor, plan: Round) -> Tensor:
        self.kept, former = None, getattr(self, "former", [])
        z = super().understand(tokens, plan)
        now, known = select_tokens(self.kept.difference, plan.predicted), self.kept.known
        for kept in former:
            error = (select_tokens(kept.difference, plan.predicted) - now).norm() / now.norm()
            if kept.known:
                self.aged.append((known / kept.known, plan.index / plan.of >= 0.5, error.item()))
        self.former = [*former, self.kept]
        return z


def main(arguments: list[str] | None = None) -> int:
    require_this_checkout(__file__)
    parser = argparse.ArgumentParser(prog="guidance_age", description="How what guidance is about ages.")
    parser.add_argument("--pictures", type=int, default=6, metavar="N", help="one a category (default 6)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write the JSON there")
    options = parser.parse_args(arguments)
    prompts = [sample.prompt for sample in draw_exam(1).samples[: options.pictures]]
    Watched.aged.clear()
    with Engine.from_pretrained("pocket", device="cpu") as engine, patch.object(unipic, "Sampler", Watched):
        for seed, prompt in enumerate(prompts):
            engine.generate(prompt, seed=seed, head_steps=(10, 10), cfg_cache=2.0)
        summary = {"bench": "guidance_age", "pictures": len(prompts), **made_by(engine)}
    summary["rows"] = list(rows(Watched.aged))
    for row in summary["rows"]:
        half = "late" if row["late"] else "early"
        print(
            f"{row['from']:g} to {row['to']:g} times, {half:<5} {row['median']:.2f} off  ({row['of']})", file=sys.stderr
        )
    if options.out is not None:
        options.out.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(summary))
    return 0


def rows(aged: list[Aged]) -> Iterator[dict[str, Any]]:
    """The median error of each growth and half of the run that occurred."""
    for low, high in pairwise(GROWTH):
        for late in (False, True):
            errors = [error for growth, behind, error in aged if low <= growth < high and behind is late]
            if errors:
                median = round(float(np.median(errors)), 3)
                yield {"from": low, "to": high, "late": late, "median": median, "of": len(errors)}


if __name__ == "__main__":
    sys.exit(main())
