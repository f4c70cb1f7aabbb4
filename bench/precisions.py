"""What 8 bits cost in quality: the pocket model's pictures in int8, paired with those in bf16.

    python bench/precisions.py [--each 100] [--only int8] [--out FILE.json] [--minutes 60]

What a loss is says bench/paired.py. A point is wanted at most: exit status 1 where the interval excludes that. The same
command again goes on from --out. Seconds are this machine's, as a ratio of bf16's in the same run. One JSON line last.
"""

import json
import sys
from contextlib import ExitStack

from unipic_run.bench.checkout import require_this_checkout
from unipic_run.bench.paired import Series, Way, line, parser_of
from unipic_run.bench.quality import made_by, weights_of
from unipic_run.engine.engine import Engine
from unipic_run.pocket.exam import draw_exam

PRECISIONS = {
    "bf16": {"quant": "none"},
    "int8": {"quant": "int8"},
    "int8, int8-qk": {"quant": "int8", "attention": "int8-qk"},  # as in predictions
}
MOST = 0.01  # of pictures


def main(arguments: list[str] | None = None) -> int:
    require_this_checkout(__file__)
    options = parser_of("precisions", "What 8 bits cost, on the pocket model.", PRECISIONS).parse_args(arguments)
    chosen = {name for name in PRECISIONS if name == "bf16" or not options.only or name in options.only}
    samples = draw_exam(options.each, options.seed).samples
    with ExitStack() as stack:
        ways = {}
        for name, how in PRECISIONS.items():
            if name in chosen:
                engine = Engine.from_pretrained(options.model, device=options.device, dtype="bf16", **how)
                ways[name] = Way(stack.enter_context(engine), {})
        made = {"bench": "precisions", "asked": len(samples), "seed": options.seed}
        made |= {**made_by(ways["bf16"].engine), "quant": list(ways), "weights": weights_of(options.model)}
        series = Series(made, list(ways), options.out)
        series.run(ways, samples, options.minutes)
    prices = series.prices()
    lost = [name for name, row in prices.items() if row["low"] > MOST]
    summary = series.kept() | {"ways": prices, "passed": not lost, "lost more": lost}
    series.write(summary)
    print(*(line(name, row) for name, row in prices.items()), sep="\n", file=sys.stderr)
    print(json.dumps(summary))
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main())
