"""What a bench's task needs by the dry run, beside what was measured."""

import math
from typing import Any

import torch
from unipic_run.engine import gpus
from unipic_run.engine.checks import PATCH
from unipic_run.engine.engine import Engine
from unipic_run.engine.layers.attention import Attention
from unipic_run.engine.loaded import Loaded
from unipic_run.engine.noise import PhiloxNoise
from unipic_run.engine.plan import META, Plan, dry_run, shapes
from unipic_run.engine.task import Batch, Task


def plan_of(engine: Engine, kind: str, prompt: str, res: int, steps: int, images: int) -> Plan:
    """The plan of `generate` (kind "generate") or of an edit of a square picture ("edit") with default settings."""
    loaded = engine.loaded
    model = shapes(loaded.family, engine.config, engine.recipe, engine.dtype, Attention(engine.attention))
    sources = (torch.empty(1, 3, res, res, dtype=engine.dtype, device=META),) * (kind == "edit")
    side = res // PATCH
    task = Task(kind, side, side, steps, engine.config.guidance, "constant", 1.0, sources=sources)
    batch = Batch([prompt] * images, [PhiloxNoise(seed) for seed in range(images)])
    return dry_run(Loaded(loaded.family, model, loaded.tokens, META), task, batch)


def report(plan: Plan, rounds: int, milliseconds: dict[str, float], device_name: str, rate: float | None) -> dict:
    """By stage: FLOP, bytes, launches, predicted seconds on a known card, and the share of `rate` (FLOP/s) reached."""
    predicted: dict[str, float | None] = dict.fromkeys(plan.stages)
    if device_name in gpus.DEVICE_NAMES:
        predicted |= plan.seconds(gpus.card(device_name))
    stages: dict[str, Any] = {}
    for name, stage in plan.stages.items():
        took = milliseconds.get(name, math.nan) / 1000
        stages[name] = {
            "flop": stage.flop,
            "nbytes": stage.nbytes,
            "launches": stage.launches,
            "peak_bytes_beside_weights": stage.peak_bytes,
            "predicted_seconds": predicted[name],
            "share_of_roof": stage.flop / rate / took if rate else None,
        }
    return {"stages": stages, "launches_a_round": plan.stages["sample"].launches / rounds, "roof_flop_per_second": rate}
