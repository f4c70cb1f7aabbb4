"""Plans that are kept in the cache folder for the next time, as long as the code that made them stays the same."""

import hashlib
import json
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import torch

from .checkpoint.cache import cache_root
from .checkpoint.manifest import write_file
from .foreseen import Held
from .meter import Call
from .plan import Plan, Stage

ROOT = Path(__file__).resolve().parents[1]
MOST = 200  # plans that are kept, each up to some 150 kB
SOURCES = ("engine/**/*.py", "kernels/**/*.py", "kernels/**/*.json", "quant/**/*.py")  # on which a plan depends


def kept(shape: dict[str, Any], make: Callable[[], Plan]) -> Plan:
    """The plan that was kept for this shape of request; else it is made and kept."""
    path = path_of(shape)
    with suppress(OSError, ValueError, TypeError, LookupError, AttributeError):
        return from_json(json.loads(path.read_text("utf-8")))
    text = json.dumps(to_json(make()))
    with suppress(OSError):  # a cache that cannot be written is no reason to fail
        write_file(path, text)
        for old in sorted(path.parent.glob("*.json"), key=lambda one: one.stat().st_mtime)[:-MOST]:
            old.unlink(missing_ok=True)  # most likely of other code
    return from_json(json.loads(text))  # the same as the next time, to the last bit


def is_kept(shape: dict[str, Any]) -> bool:
    return path_of(shape).is_file()


def path_of(shape: dict[str, Any]) -> Path:
    told = json.dumps([digest_of(ROOT), torch.__version__, shape], sort_keys=True)
    return cache_root() / "plans" / f"{hashlib.sha256(told.encode()).hexdigest()[:32]}.json"


@cache
def digest_of(root: Path) -> str:
    """Of the package's own code; some milliseconds, once a process."""
    found = hashlib.sha256()
    for path in sorted(path for pattern in SOURCES for path in root.glob(pattern)):
        found.update(path.relative_to(root).as_posix().encode())
        found.update(hashlib.sha256(path.read_bytes()).digest())
    return found.hexdigest()


def to_json(plan: Plan) -> dict[str, Any]:
    """All but its history and the names and shapes of operations; those that cost the same are counted together."""
    rows: Counter[tuple[Any, ...]] = Counter()
    for call, times in plan.calls.items():
        costs = call.flop, call.nbytes, call.launches, call.beside, call.programs
        rows[call.stage, call.kind, call.precision, *costs] += times
    return {
        "stages": {name: asdict(stage) for name, stage in plan.stages.items()},
        "calls": [[*row, times] for row, times in rows.items()],
        "between_rounds": plan.between_rounds,
        "before_decode": plan.before_decode,
        "graphs": {what: asdict(held) for what, held in plan.graphs.items()},
    }


def from_json(data: dict[str, Any]) -> Plan:
    """What `to_json` has told. Raises TypeError, ValueError, AttributeError or LookupError for anything else."""
    calls: Counter[Call] = Counter()
    for stage, kind, precision, *costs, times in data["calls"]:
        calls[Call(stage, kind, precision, "", (), *costs)] = times
    return Plan(
        stages={name: Stage(**stage) for name, stage in data["stages"].items()},
        calls=calls,
        between_rounds=data["between_rounds"],
        before_decode=data["before_decode"],
        graphs={what: Held(**held) for what, held in data["graphs"].items()},
    )
