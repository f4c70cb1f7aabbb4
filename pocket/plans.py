"""How long and on what each phase trains."""

from dataclasses import dataclass


@dataclass(frozen=True)
class VAEPlan:
    """Phase 1, less than two hours on two CPU cores."""

    steps: int = 9000
    batch: int = 4  # crops
    rate: float = 2e-3  # AdamW's
    matrix_rate: float = 0.02  # Muon's
    seed: int = 1


@dataclass(frozen=True)
class Sizes:
    """Of a shard."""

    scenes: int
    edits: int


@dataclass(frozen=True)
class JointPlan:
    """Phase 2, two sittings of two hours and a quarter on two CPU cores."""

    steps: int = 12000
    pictures: int = 40  # a step
    edits: int = 6
    answers: int = 8
    rate: float = 1e-3  # AdamW's
    matrix_rate: float = 0.02  # Muon's
    decay: float = 0.3
    shard: Sizes = Sizes(scenes=384, edits=96)
    shards: int = 32  # in use at a time, once there are so many
    first_shards: int = 2
    fresh_every: int = 250  # steps between new ones
    seed: int = 2
