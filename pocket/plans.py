"""How long and on what each phase trains."""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class VAEPlan:
    """Phase 1, half an hour on two CPU cores."""

    steps: int = 4500
    batch: int = 16  # crops
    rate: float = 1e-3  # AdamW's
    matrix_rate: float = 0.01  # Muon's
    seed: int = 1


@dataclass(frozen=True)
class Sizes:
    """Of a shard."""

    scenes: int
    edits: int


@dataclass(frozen=True)
class JointPlan:
    steps: int
    seed: int
    hint_weights: tuple[float, float]  # at the first step and at the last, linear between
    words_first: int  # steps with every token masked, before steps with other shares
    copy_weight: float = 0.0
    answer_weight: float = 0.3
    object_weights: tuple[float, float] = (1.0, 1.0)  # of cells that show one, likewise at the first and last step
    pictures: int = 28  # a step
    edits: int = 6  # every other step
    answers: int = 8  # pictures that are asked about, in the steps between
    questions: int = 1  # about each
    rate: float = 1e-3  # AdamW's
    matrix_rate: float = 0.005  # Muon's; at 0.02 the prompt was never used
    decay: float = 0.35
    shard: Sizes = Sizes(scenes=256, edits=160)
    shards: int = 12  # in use at a time, once there are so many
    first_shards: int = 4
    fresh_every: int = 120  # steps between new ones


@dataclass(frozen=True)
class DecoderPlan:
    """Half an hour and less on one CPU core, half of it for drawing."""

    steps: int = 3000
    batch: int = 4  # whole pictures
    redrawn: float = 0.75  # share of them
    rate: float = 5e-4
    matrix_rate: float = 0.004
    seed: int = 6
    shard: Sizes = Sizes(scenes=256, edits=0)
    shards: int = 14


SEEING = JointPlan(  # phase 7, and but for little those that are made from it
    steps=2200,
    seed=7,
    hint_weights=(0.5, 0.0),
    words_first=0,
    copy_weight=1.0,
    pictures=20,
    edits=20,
    answers=8,
    questions=12,
    rate=8e-4,
    matrix_rate=0.004,
    decay=0.8,
    shard=Sizes(scenes=256, edits=256),
)
ASKED = replace(SEEING, steps=2900, seed=9, answer_weight=0.6, object_weights=(3.0, 1.0), questions=24)  # phase 9
MIXED = replace(ASKED, object_weights=(2.0, 1.0), questions=16)  # of the last joint phases

REDRAWN = DecoderPlan(steps=2000, shard=Sizes(scenes=160, edits=96), shards=10)  # of the last decoder phases

# Each goes on from the weights of the one before, with other data. What each took is in docs/pocket.md.
PHASES: tuple[VAEPlan | JointPlan | DecoderPlan, ...] = (
    VAEPlan(),
    JointPlan(steps=1100, seed=2, hint_weights=(1.0, 1.0), words_first=250),
    JointPlan(steps=4900, seed=3, hint_weights=(1.0, 0.0), words_first=0),
    JointPlan(steps=4700, seed=4, hint_weights=(0.5, 0.0), words_first=0),
    DecoderPlan(),
    JointPlan(
        steps=1600,
        seed=5,
        hint_weights=(0.3, 0.0),
        words_first=0,
        copy_weight=1.0,
        pictures=12,
        edits=20,
        answers=8,
        questions=12,
        rate=6e-4,
        matrix_rate=0.003,
        decay=0.7,
    ),
    SEEING,
    DecoderPlan(steps=2000, seed=8, shards=10),
    ASKED,
    DecoderPlan(steps=2000, seed=10, shards=10),
    replace(ASKED, steps=3500, seed=11, pictures=16, edits=28, rate=7e-4, matrix_rate=0.0035, decay=0.85),
    DecoderPlan(steps=2000, seed=12, shards=10),
    replace(MIXED, steps=1100, seed=13, pictures=28, edits=16, rate=6e-4, matrix_rate=0.003, decay=0.9),
    replace(MIXED, steps=2200, seed=14, pictures=24, edits=24, rate=7e-4, matrix_rate=0.0035, decay=0.81),
    replace(REDRAWN, seed=15),
    replace(MIXED, steps=2500, seed=16, pictures=28, edits=24, rate=7e-4, matrix_rate=0.0035, decay=0.81),
    replace(REDRAWN, seed=17),
    replace(MIXED, steps=2200, seed=18, pictures=28, edits=24, rate=7e-4, matrix_rate=0.0035, decay=0.81),
    replace(REDRAWN, seed=19),
    replace(MIXED, steps=2400, seed=20, pictures=36, edits=20, rate=7e-4, matrix_rate=0.0035, decay=0.85),
    replace(REDRAWN, seed=21),
    replace(MIXED, steps=1000, seed=22, pictures=36, edits=16, rate=6e-4, matrix_rate=0.003, decay=0.9),
    replace(REDRAWN, seed=23),
)
