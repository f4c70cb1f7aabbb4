"""Peak memory of each stage on a card, read from torch's allocator where the engine's clock says that a stage ends.

    memory = StageMemory(device)
    with memory.listening():
        engine.generate(...)
    memory.stages["sample"]["allocated_bytes"], memory.peak()

What happens between two stages, such as weights that arrive, counts towards the second.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from unipic_run.engine.run import Clock

Peak = dict[str, int]  # allocated_bytes, reserved_bytes


class StageMemory:
    """`stages` by name, in the order in which they first ended; without a CUDA device there are none."""

    def __init__(self, device: torch.device, allocator: Any = torch.cuda) -> None:
        """`allocator` has the functions that torch.cuda has for this."""
        self.device, self.allocator = device, allocator
        self.stages: dict[str, Peak] = {}

    def note(self, stage: str) -> None:
        """The most since the last note was in this stage."""
        if self.device.type != "cuda":
            return
        found = {
            "allocated_bytes": self.allocator.max_memory_allocated(self.device),
            "reserved_bytes": self.allocator.max_memory_reserved(self.device),
        }
        before = self.stages.get(stage, found)
        self.stages[stage] = {name: max(value, before[name]) for name, value in found.items()}
        self.allocator.reset_peak_memory_stats(self.device)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Inside, every stage that ends is noted."""
        stage, note = Clock.stage, self.note

        @contextmanager
        def heard(clock: Clock, name: str) -> Iterator[None]:
            with stage(clock, name):
                yield
            note(name)

        Clock.stage = heard
        try:
            yield
        finally:
            Clock.stage = stage

    def peak(self) -> Peak:
        """Of all stages."""
        found = list(self.stages.values())
        return {name: max(peak[name] for peak in found) for name in (found[0] if found else ())}
