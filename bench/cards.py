"""What UniPic 1.0 is predicted to take on cards of 4 to 24 GB: the table of the README.

    python bench/cards.py            prints the table as it is kept in bench/results/predicted-cards.json
    python bench/cards.py --update   predicts anew, rewrites that file and the README's table
    python bench/cards.py --check    predicts anew and compares: exit status 1 where either says something else

Everything comes from the dry run and the fixed rates of engine/gpus.py; nothing is measured, and no GPU is needed.
Where all weights are resident the file also has the seconds without what is beside products (`Cost.beside`).
"""

import argparse
import json
import sys
import tempfile
from dataclasses import replace
from os import environ
from pathlib import Path
from typing import Any

from unipic_run.bench.checkout import require_this_checkout
from unipic_run.engine import gpus
from unipic_run.engine.errors import BudgetError
from unipic_run.engine.estimate import ask_for, told
from unipic_run.engine.plan import BANDED, Plan, seconds_of

CARDS = (  # GiB that may be used, and whose rates
    (4, "rtx3050-6g"),  # no card of 4 GiB is listed: this one, held to it
    (6, "rtx3050-6g"),
    (8, "rtx4060"),
    (12, "rtx3060"),
    (16, "rtx4060ti-16g"),
    (24, "rtx4090"),
)
PRECISIONS = {"bf16": {}, "int8": {"quant": "int8", "attention": "int8-qk"}}
SIZES = (1024, 512)
TOLERANCE = 0.02  # of seconds and of bytes
KEPT = Path("bench/results/predicted-cards.json")
BEGIN, END = "<!-- cards:begin -->", "<!-- cards:end -->"


def main(arguments: list[str] | None = None) -> int:
    root = require_this_checkout(__file__)
    parser = argparse.ArgumentParser(prog="cards", description="The README's table of predictions.")
    parser.add_argument("--update", action="store_true", help="predict anew, rewrite the file and the README")
    parser.add_argument("--check", action="store_true", help="predict anew and compare")
    options = parser.parse_args(arguments)
    path, readme = root / KEPT, root / "README.md"
    kept = json.loads(path.read_text("utf-8"))["rows"] if path.is_file() else []
    found = predicted() if options.update or options.check else kept
    if options.update:
        what = "python bench/cards.py --update: UniPic 1.0, gen, 32 rounds, guidance 3, one image; never measured"
        path.write_text(json.dumps({"predicted_by": what, "rows": found}, indent=1) + "\n", encoding="utf-8")
        text = readme.read_text("utf-8")
        readme.write_text(text.replace(block(text), table(found)), encoding="utf-8")
    print(table(found))
    failures = differences(found, kept) if options.check else []
    if options.check and block(readme.read_text("utf-8")) != table(kept):
        failures.append(f"the README's table is not that of {KEPT}")
    if failures:
        print(*failures, "where that is meant, `python bench/cards.py --update` keeps it", sep="\n", file=sys.stderr)
    print(json.dumps({"bench": "cards", "passed": not failures, "failures": failures, "rows": len(found)}))
    return 1 if failures else 0


def predicted() -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as kept:  # plans that were made before do not count
        environ["UNIPIC_RUN_CACHE"] = kept
        return [row(*card, precision, res) for card in CARDS for precision in PRECISIONS for res in SIZES]


def row(gib: int, gpu: str, precision: str, res: int) -> dict[str, Any]:
    what = {"vram_gib": gib, "gpu": gpu, "precision": precision, "res": res}
    asked = ask_for("unipic", "gen", res=res, gpu=gpu, vram=gib, **PRECISIONS[precision])
    try:
        placement = told(asked)["placement"]
    except BudgetError as error:
        return what | {"plan": error.what, "seconds": None, "peak_bytes": None}
    plan = placement["line"].rpartition("; ")[0]
    found = {"plan": plan, "seconds": round(placement["seconds"], 3), "peak_bytes": placement["peak_bytes"]}
    bare = {"without_beside": round(without_beside(asked.plan(1), asked.card), 3)} if plan == "all resident" else {}
    return what | found | bare


def without_beside(plan: Plan, card: gpus.Card) -> float:
    """Seconds by the fixed rates alone: of each operation its multiplications or its bytes, and launches."""
    return sum(
        times * seconds_of(replace(call, beside=0), card) for call, times in plan.calls.items() if call.stage != BANDED
    )


def differences(now: list[dict[str, Any]], before: list[dict[str, Any]]) -> list[str]:
    """Rows that say something else, as sentences."""
    names = ("vram_gib", "gpu", "precision", "res")
    known = {tuple(row[name] for name in names): row for row in before}
    said = []
    for new in now:
        key = tuple(new[name] for name in names)
        old = known.pop(key, None)
        if old is None or (old["plan"], old["seconds"] is None) != (new["plan"], new["seconds"] is None):
            said.append(f"{key}: {new['plan']}, where {old and old['plan']} is kept")
            continue
        for name in ("seconds", "peak_bytes", "without_beside"):
            if new.get(name) is not None and abs(new[name] - old.get(name, 0)) > TOLERANCE * new[name]:
                said.append(f"{key}: {name} {new[name]}, where {old.get(name)} is kept")
    return [*said, *(f"{key} is kept and no longer predicted" for key in known)]


def table(rows: list[dict[str, Any]]) -> str:
    """A row of Markdown for each card and precision, with the sizes side by side."""
    head = ["card", "precision"] + [f"{res}x{res}: {what}" for res in SIZES for what in ("weights", "s", "GiB")]
    lines = [head, ["---"] * len(head)]
    for gib, gpu in CARDS:
        for precision in PRECISIONS:
            of = {
                row["res"]: row
                for row in rows
                if (row["vram_gib"], row["gpu"], row["precision"]) == (gib, gpu, precision)
            }
            cells = [cell for res in SIZES if res in of for cell in cells_of(of[res])]
            name = shown(gpu, gib) if precision == next(iter(PRECISIONS)) else ""
            lines.append([name, precision, *cells])
    return "\n".join([BEGIN, *(f"| {' | '.join(line)} |" for line in lines), END])


def cells_of(row: dict[str, Any]) -> tuple[str, str, str]:
    if row["seconds"] is None:
        return row["plan"], "", ""
    seconds = row["seconds"]
    return row["plan"], f"{seconds:.{0 if seconds >= 10 else 1}f}", f"{row['peak_bytes'] / gpus.GIB:.1f}"


def shown(gpu: str, gib: int) -> str:
    card = gpus.card(gpu)
    name = card.device_names[0].removeprefix("NVIDIA GeForce ")
    return f"{gib} GB, {name}" if round(card.vram_bytes / gpus.GIB) == gib else f"{gib} GB, {name} with `--vram {gib}`"


def block(text: str) -> str:
    """The README's table with its marks."""
    start, end = text.index(BEGIN), text.index(END) + len(END)
    return text[start:end]


if __name__ == "__main__":
    sys.exit(main())
