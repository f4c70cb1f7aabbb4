"""Replay a folder of recorded reference runs and compare every tensor.

    python bench/parity.py tests/data/goldens/unipic1 --checkpoint tests/data/unipic-tiny
    python bench/parity.py ../shared/goldens/deepgen
    python bench/parity.py DIR [--device cuda] [--case NAME] [--json]
    python bench/parity.py DIR --quant int8 [--attn int8-qk]

DIR holds `cases/` and, unless --checkpoint names another folder, `checkpoint/`; or else `weights/` and `tokenizer/`, of
which a checkpoint is put together. Cases are told by what their files say,
never by their names. A line a case, one JSON line last; exit status 1 on any miss, and when there is no case. In fewer
bits the error of every tensor stands beside float32's, and only what is far off is a miss (bench/parity_rough.py).
"""

import argparse
import json
import os
import platform
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from unipic_run.bench.checkout import require_this_checkout
from unipic_run.bench.parity_bf16 import replay_bf16
from unipic_run.bench.parity_case import Case, read_cases
from unipic_run.bench.parity_deepgen import DEEPGEN, assemble, replay_deepgen
from unipic_run.bench.parity_deepgen_units import replay_deepgen_units
from unipic_run.bench.parity_ledger import Ledger
from unipic_run.bench.parity_question import replay_question
from unipic_run.bench.parity_rough import How, beside, nothing_to_see, roughly
from unipic_run.bench.parity_runs import replay_images
from unipic_run.bench.parity_unipic2 import RELEASES, replay_kontext, replay_metaquery
from unipic_run.bench.parity_units import (
    replay_mask_schedule,
    replay_preprocess,
    replay_rope,
    replay_tokenizer,
    replay_units,
)
from unipic_run.engine.device import as_device, current
from unipic_run.engine.engine import Engine
from unipic_run.engine.errors import UnipicError
from unipic_run.engine.precision import true_float32

REPLAY: dict[str, Callable[[Engine, Case], Ledger]] = {
    "text2image": replay_images,
    "text2image_batch": replay_images,
    "image_edit": replay_images,
    "image_to_text": replay_question,
    "units": replay_units,
    "preprocess": replay_preprocess,
    "rope": replay_rope,
    "tokenizer": replay_tokenizer,
    "mask_schedule": replay_mask_schedule,
    "deepgen": replay_deepgen,
    "deepgen_units": replay_deepgen_units,
    "unipic2_metaquery": replay_metaquery,
    "unipic2_kontext": replay_kontext,
}
Load = Callable[..., Engine]  # of dtype, quant, attention, release


def main(arguments: list[str] | None = None) -> int:
    require_this_checkout(__file__)
    options = parse(arguments)
    cases = read_cases(options.folder)
    chosen = {name: case for name, case in cases.items() if options.case in (None, name)}
    how = How(options.quant, options.attn)
    if how.rough:
        left = {name: reason for name, case in chosen.items() if (reason := nothing_to_see(case))}
        chosen = {name: roughly(case) for name, case in chosen.items() if name not in left}
    reports: dict[str, Any] = {}
    device = as_device(options.device)
    with one_thread(), current(device), engines(options.folder, options.checkpoint, str(device)) as load:
        if chosen:
            load("fp32")  # a checkpoint that does not load is one error, not one a case
        for name, case in chosen.items():
            reports[name] = {"kind": case.kind} | replay(load, case, cases, how)
            if not options.json:
                print_case(name, reports[name])
    passed = bool(reports) and all(report["passed"] for report in reports.values())
    if not reports:
        print(f"no case{f' {options.case!r}' if options.case else ''} in {options.folder}/cases", file=sys.stderr)
    summary = {"bench": "parity", "folder": str(options.folder), "passed": passed} | environment(options.device)
    if how.rough:
        summary |= {"quant": how.quant, "attention": how.attention, "informative": True, "left_out": left}
    print(json.dumps(summary | {"cases": reports}))
    return 0 if passed else 1


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="parity", description="Replay recorded reference runs and compare them.")
    parser.add_argument("folder", type=Path, metavar="DIR", help="holds cases/, and checkpoint/ or weights/")
    parser.add_argument("--checkpoint", type=Path, help="instead of DIR/checkpoint")
    parser.add_argument("--case", help="replay only this one")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (default cpu)")
    parser.add_argument("--quant", default="none", choices=["none", "int8"], help="the model in fewer bits")
    parser.add_argument("--attn", default="sdpa", choices=["sdpa", "int8-qk"], help="attention backend")
    parser.add_argument("--json", action="store_true", help="print the JSON line only")
    return parser.parse_args(arguments)


@contextmanager
def engines(recorded: Path, checkpoint: Path | None, device: str) -> Iterator[Load]:
    """Engines by dtype, quant, attention and which release of those recorded, each loaded when first asked for;
    converts into a temporary cache.
    """
    before = os.environ.get("UNIPIC_RUN_CACHE")
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="unipic-parity-"))

        @cache
        def load(dtype: str, quant: str | None = None, attention: str = "sdpa", release: str = "deepgen") -> Engine:
            how = {"dtype": dtype, "quant": quant, "attention": attention}
            return stack.enter_context(Engine.from_pretrained(found(release), device=device, **how))

        @cache
        def found(release: str) -> Path:
            if checkpoint or not (recorded / "weights").is_dir():
                return checkpoint or recorded / "checkpoint"
            return assemble(recorded, Path(folder) / release, RELEASES.get(release, DEEPGEN))

        os.environ["UNIPIC_RUN_CACHE"] = folder
        try:
            yield load
        finally:
            os.environ.pop("UNIPIC_RUN_CACHE")
            if before is not None:
                os.environ["UNIPIC_RUN_CACHE"] = before


@contextmanager
def one_thread() -> Iterator[None]:
    """Recorded models are tiny: a second thread costs more than it saves, and the recordings used one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def replay(load: Load, case: Case, cases: dict[str, Case], how: How) -> dict[str, Any]:
    """A case's report. Whatever goes wrong in it is a failure of this case, and the others still run."""
    try:
        with torch.inference_mode(), true_float32():
            if case.kind == "bf16_informative":
                return replay_bf16(load("bf16"), case, cases[case.settings["inputs_from"]]).report()
            if case.kind not in REPLAY:
                raise ValueError(f"cases of kind {case.kind!r} are not known")
            which = {"release": case.kind if case.kind in RELEASES else "deepgen"}
            report = REPLAY[case.kind](load("fp32", **which), case).report()
            if not how.rough:
                return report
            return beside(REPLAY[case.kind](load("fp32", how.quant, how.attention, **which), case).report(), report)
    except Exception as error:
        traceback.print_exc()
        return Ledger({}).report() | {"failures": [f"{type(error).__name__}: {error}"]}


def print_case(name: str, report: dict[str, Any]) -> None:
    """One line, then what failed and what was not computed, by reason."""
    worst = max(report["tensors"].items(), key=lambda item: strain(item[1]), default=None)
    said = "nothing compared"
    if worst:
        error = worst[1]["error"]
        said = f"worst {worst[0]} {'inf' if error is None else f'{error:.1e}'} of {worst[1]['tolerance']:.0e}"
        if worst[1].get("float32") is not None:
            said += f" (float32 {worst[1]['float32']:.1e})"
    counts = f"{report['compared']} compared, {len(report['not_computed'])} not computed or in part"
    print(f"{'ok  ' if report['passed'] else 'MISS'} {name:<16} {said}; {counts}")
    for failure in report["failures"]:
        print(f"     missed: {failure} {report['tensors'].get(failure, '')}")
    reasons: dict[str, list[str]] = {}
    for tensor, reason in report["not_computed"].items():
        reasons.setdefault(reason, []).append(tensor)
    for reason, tensors in reasons.items():
        print(f"     not computed: {', '.join(tensors)} ({reason})")


def strain(check: dict[str, Any]) -> float:
    """How much of the tolerance is used up."""
    if check["tolerance"] is None:
        return -1.0
    if check["error"] is None:
        return float("inf")
    return check["error"] / (check["tolerance"] or 1e-30)


def environment(device: str) -> dict[str, Any]:
    """What a result must say to be worth keeping."""
    place = as_device(device)
    name = torch.cuda.get_device_name(place) if place.type == "cuda" else platform.processor() or platform.machine()
    return {"device": str(place), "device_name": name, "dtype": "fp32", "torch": torch.__version__}


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UnipicError as error:
        sys.exit(str(error))
