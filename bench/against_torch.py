"""Every operator beside the torch path it stands for, by class of calls: what bench/tune.py lists as torch's on a card.

Real shapes only, and only what agrees with its reference; times as in bench/ops.py. A path that waits for the device is
never listed: no graph could capture it, and the host would wait in the middle of a picture.
"""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from unipic_run.bench import ops
from unipic_run.bench.agreement import agreement
from unipic_run.bench.drawn import drawn
from unipic_run.kernels._registry import Check
from unipic_run.kernels._tuned import call_class

WORTH = 0.98  # of the other's time, so that noise lists nothing


def calls_beside_torch(checks: Iterable[Check], names: set[str] | None, repeat: int) -> Iterator[dict[str, Any]]:
    """A row for each operator and class of calls, the times of its cases added; `names`: these operators."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for check in checks:
        if names is not None and check.operator.name not in names:
            continue
        row = measured(check, repeat)
        whole = found.setdefault((row["operator"], row["key"]), row)
        if whole is not row:
            for name in ("seconds", "torch_seconds"):
                whole[name] += row[name]
            whole["problem"] = whole["problem"] or row["problem"]
    for row in found.values():
        print(line(row), flush=True)
        yield row


def measured(check: Check, repeat: int) -> dict[str, Any]:
    check = replace(check, case=replace(check.case, make=partial(drawn, check.case)))
    operator, arguments = check.operator, check.case.make(ops.DEVICE)
    row = {"operator": operator.name, "key": call_class(arguments), "seconds": 0.0, "torch_seconds": 0.0}
    try:
        again = ops.restoring(operator, arguments)
        if not agreement(check, ops.DEVICE, operator.op).holds:
            return row | {"problem": "disagrees with its reference"}
        row["seconds"] = ops.seconds(lambda: operator.op(*arguments), repeat, again)
        if waits(lambda: operator.torch(*arguments)):
            return row | {"problem": "torch's path waits for the device"}
        again()
        row["torch_seconds"] = ops.seconds(lambda: operator.torch(*arguments), repeat, again)
    except Exception as error:  # the others must still be measured
        return row | {"problem": f"{type(error).__name__}: {error}".partition("\n")[0][:200]}
    return row | {"problem": ""}


def waits(function: Any) -> bool:
    torch.cuda.set_sync_debug_mode("error")
    try:
        function()
    except RuntimeError as error:
        if "synchroniz" not in str(error):
            raise
        return True
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return False


def faster(row: dict[str, Any]) -> bool:
    """Whether torch is."""
    return not row["problem"] and row["torch_seconds"] < WORTH * row["seconds"]


def listed(known: dict[str, dict[str, Any]], rows: Iterable[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """What a table says under `torch`, with these rows in place of what it said of them."""
    table = {operator: dict(calls) for operator, calls in known.items()}
    for row in rows:
        calls = table.setdefault(row["operator"], {})
        calls.pop(row["key"], None)
        if faster(row):
            times = {"microseconds": row["seconds"], "torch_microseconds": row["torch_seconds"]}
            calls[row["key"]] = {name: round(1e6 * seconds, 2) for name, seconds in times.items()}
    return {operator: calls for operator, calls in table.items() if calls}


def line(row: dict[str, Any]) -> str:
    name = f"{row['operator']} {row['key']}"
    if row["problem"]:
        return f"{name[:76]:<76} {row['problem']}"
    times = f"{1e6 * row['seconds']:>9.1f} {1e6 * row['torch_seconds']:>9.1f}"
    return f"{name[:76]:<76} {times}{'  torch' * faster(row)}"
