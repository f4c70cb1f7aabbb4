"""Gathers what the parts of bench/gpu_check.sh left into one file, `<card>-<date>.json`.

    python bench/gpu_summary.py PARTS.tsv OUT

PARTS.tsv has a line `name, exit status, seconds` for each part; its output is in OUT/name.log.
"""

import json
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from unipic_run.bench.checkout import require_this_checkout
from unipic_run.bench.vram import slug
from unipic_run.bench.vram_watch import last_json

TAIL = 4000  # characters of a log that are kept when it holds no JSON or its part failed


def main(arguments: list[str]) -> int:
    require_this_checkout(__file__)
    table, out = Path(arguments[0]), Path(arguments[1])
    rows = [line.split("\t") for line in table.read_text("utf-8").splitlines()]
    parts = {name: part(out / f"{name}.log", int(status), int(seconds)) for name, status, seconds in rows}
    now, card = datetime.now(UTC), torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    path = out / f"{slug(card)}-{now:%Y-%m-%d}.json"
    summary = {
        "bench": "gpu_check",
        "date": now.isoformat(timespec="seconds"),
        "device_name": card,
        "torch": torch.__version__,
        "passed": all(found["status"] == 0 for found in parts.values()),
        "parts": parts,
    }
    path.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    print(path)
    return 0


def part(log: Path, status: int, seconds: int) -> dict[str, Any]:
    text = log.read_text("utf-8", errors="replace")
    result = last_json(text)
    found = {"status": status, "seconds": seconds, "result": result}
    return found if result is not None and status == 0 else found | {"tail": text[-TAIL:]}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
