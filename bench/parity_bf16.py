"""Distances of bfloat16 runs: bits cannot agree between two orders of summation, sizes of error can."""

import torch
from torch import Tensor
from unipic_run.bench.parity_case import Case
from unipic_run.bench.parity_ledger import EXACT, Ledger
from unipic_run.bench.parity_runs import PRUNED, make_images, predicted_rows
from unipic_run.engine.engine import Engine
from unipic_run.engine.layers.qwen2 import inverse_frequencies

SLACK = 3.0  # how many times the recorded distance between bfloat16 and float32 ours may be


def replay_bf16(engine: Engine, case: Case, exact: Case) -> Ledger:
    """A `bf16_informative` case: `exact`, whose inputs it shares, rerun in bfloat16 and held against both records."""
    ledger = Ledger(case.tensors)
    _, watch = make_images(engine, exact, exact.batch)
    ours = {"tokens": watch.batches[0].tokens, "image": torch.cat(watch.images)}
    truth = dict(exact.tensors)
    recorded = dict(case.tensors)
    for plan, seen in watch.batches[0].rounds:
        ours |= {f"step{plan.index}.{name}": torch.as_tensor(value) for name, value in seen.items()}
        full = f"step{plan.index}.z"
        if full in recorded:
            truth[full], recorded[full] = predicted_rows(truth[full], plan), predicted_rows(recorded[full], plan)
            ledger.leave(full, PRUNED)
    for name, known in case.settings["difference_from_float32"].items():
        compare_distance(ledger, name, ours[name], truth[name], recorded[name], known)
    if "rope.inv_freq_bf16" in recorded:
        ledger.compare("rope.inv_freq_bf16", _rounded_frequencies(engine), EXACT)
    return ledger


def compare_distance(
    ledger: Ledger, name: str, ours: Tensor, truth: Tensor, recorded: Tensor, known: dict[str, float]
) -> None:
    """Our rms distance from the float32 record `truth` and from the bfloat16 one; `known`: between the two."""
    away, apart = rms(ours, truth), rms(ours, recorded)
    note = f"rms {away:.4f} from the float32 record, {apart:.4f} from the bfloat16 one"
    ledger.limit(name, max(away, apart), SLACK * known["rms"], note)


def rms(a: Tensor, b: Tensor) -> float:
    return (a.double() - b.double()).square().mean().sqrt().item()


def _rounded_frequencies(engine: Engine) -> Tensor:
    return inverse_frequencies(engine.config.llm, engine.device).to(torch.bfloat16)
