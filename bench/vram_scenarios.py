"""What bench/vram.py measures or simulates, and the memory that each scenario must keep to.

Published is the peak of what tensors take, weights and activations. The card that is given to a scenario has as much
more as CUDA itself and the allocator's gaps are taken to need, unless the scenario names a card.
"""

from dataclasses import dataclass, replace
from typing import Any

from unipic_run.engine import gpus
from unipic_run.engine.budget import overhead


@dataclass(frozen=True)
class Scenario:
    name: str
    task: str  # gen, edit or ask
    published: float | None  # GiB of tensors, None where nothing is
    quant: str = "none"
    attention: str = "auto"
    images: int = 1  # at once
    res: int = 1024
    rounds: int = 32
    dtype: str = "bf16"
    model: str = "unipic"
    vram: float | None = None  # GiB of the card that may be used, its CUDA context included
    at_most: tuple[str, float] | None = None  # so many times as long as another scenario, by prediction

    @property
    def card(self) -> float | None:
        """GiB of the card that it is given."""
        if self.vram or not self.published:
            return self.vram
        return overhead(gpus.card("rtx4090")).needed(int(self.published * gpus.GIB))


def _int8(name: str, task: str, published: float | None, **how: Any) -> Scenario:
    return Scenario(name, task, published, quant="int8", attention="int8-qk", **how)


DEEPGEN = {"model": "deepgen", "rounds": 50}


SCENARIOS = {
    scenario.name: scenario
    for scenario in (
        Scenario("gen-bf16", "gen", 5.5),
        _int8("gen-int8", "gen", 3.2),
        _int8("gen-int8-tight", "gen", 1.5, vram=2.0, at_most=("gen-int8", 2.0)),
        _int8("gen-int8-batch4", "gen", 5.0, images=4),
        _int8("edit-int8", "edit", 3.8),
        _int8("ask-int8", "ask", 3.0),
        _int8("ask-int8-512", "ask", 2.5, res=512),
        Scenario("deepgen-gen-bf16", "gen", 5.8, **DEEPGEN),
        _int8("deepgen-gen-int8", "gen", 3.1, **DEEPGEN),
        _int8("deepgen-gen-int8-512", "gen", 3.0, res=512, **DEEPGEN),
        _int8("deepgen-gen-int8-tight", "gen", None, vram=3.0, **DEEPGEN),
        _int8("deepgen-gen-int8-least", "gen", None, vram=1.75, **DEEPGEN),
        _int8("deepgen-edit-int8", "edit", 3.8, **DEEPGEN),
        _int8("deepgen-ask-int8-512", "ask", 4.0, res=512, **DEEPGEN),
    )
}


def changed(scenario: Scenario, **how: Any) -> Scenario:
    """The scenario with what is not None in `how`; it then has a name of its own, and nothing is published of it."""
    how = {name: value for name, value in how.items() if value is not None}
    if not how:
        return scenario
    said = ",".join(str(value).rstrip("/").rpartition("/")[2] for value in how.values())
    return replace(scenario, name=f"{scenario.name}@{said}", published=None, at_most=None, vram=scenario.card, **how)
