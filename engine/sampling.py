"""How images are sampled, and which of it makes them cheaper; shared by `generate` and `edit`."""

import secrets
from dataclasses import dataclass
from typing import TypedDict

from .checks import as_numbers, as_plain, check_known, check_number, check_one_of, check_text, check_whole
from .errors import UsageError

MAX_SEED = 2**64 - 1
MAX_IMAGES = 1024  # of one call: prompts x n
CFG_SCHEDULES = ("constant", "linear")
ORDERS = ("random", "gtr")  # of revealing tokens, of which a model has some
SOLVERS = ("ddpm", "ddim", "dpm2")  # of the diffusion head; only the first draws noise in its steps
# What makes a picture cheaper, and worse; a model knows some.
SHORTCUTS = ("head_steps", "order", "cfg_interval", "cfg_cache", "solver", "block_cache")
SAMPLED = ("steps", "guidance", "cfg_schedule", "temperature", "negative", *SHORTCUTS)
WHOLE_RUN = (0.0, 1.0)
EXACT = "exact"
SPEEDS = (EXACT, "balanced", "fast")  # the latter are sets of shortcuts, each model's own
SPED = ("steps", "head_steps", "order", "cfg_cache")  # what such sets are of


@dataclass(frozen=True)
class Sampling:
    """How images are sampled; shared by `generate` and `edit`."""

    seed: int
    n: int = 1
    steps: int | None = None  # rounds
    guidance: float | None = None  # 1.0 turns guidance off
    cfg_schedule: str = "constant"
    temperature: float = 1.0  # scales the noise of the head's steps, and its start with a solver that draws none
    negative: str | None = None  # replaces the unconditional prompt
    head_steps: tuple[int, int] | None = None  # the diffusion head's in the first and the last round, linear between
    order: str | None = None  # in which tokens are revealed, of ORDERS; random by default
    cfg_interval: tuple[float, float] | None = None  # shares of the run between which guidance is on
    cfg_cache: float | None = None  # growth of the known tokens up to which what guidance adds is kept; 1 keeps nothing
    solver: str | None = None  # of the head's denoising, of SOLVERS; ddpm by default
    block_cache: float | None = None  # relative change of the first block below which the others are not run
    speed: str = EXACT  # of SPEEDS; decides what is not said otherwise
    batch_size: int | None = None  # images computed together; None: one on the CPU, up to four on a GPU
    preview_every: int = 0  # rounds between previews, 0 for none

    def __post_init__(self) -> None:
        check_whole("seed", self.seed, 0, MAX_SEED)
        check_whole("n", self.n, 1, MAX_IMAGES)
        check_whole("preview_every", self.preview_every, 0, 10**6)
        if self.steps is not None:
            check_whole("steps", self.steps, 1, 10**4)
        if self.batch_size is not None:
            check_whole("batch_size", self.batch_size, 1, MAX_IMAGES)
        if self.guidance is not None:
            check_number("guidance", self.guidance, 0.0, 1000.0)
            object.__setattr__(self, "guidance", float(self.guidance))
        check_number("temperature", self.temperature, 0.0, 100.0)
        object.__setattr__(self, "temperature", float(self.temperature))
        check_one_of("cfg_schedule", self.cfg_schedule, CFG_SCHEDULES)
        check_one_of("speed", self.speed, SPEEDS)
        self._check_shortcuts()
        if self.negative not in (None, ""):  # an empty one is a wish, too
            check_text("negative prompt", self.negative)

    def _check_shortcuts(self) -> None:
        for name, known in (("order", ORDERS), ("solver", SOLVERS)):
            if (chosen := getattr(self, name)) is not None:
                check_one_of(name, chosen, known)
        for name, low, high in (("cfg_cache", 1.0, 1000.0), ("block_cache", 0.0, 1.0)):
            if (number := getattr(self, name)) is not None:
                check_number(name, number, low, high)
        self._check_interval()
        self._check_head_steps()

    def _check_interval(self) -> None:
        """As a tuple, whatever sequence it came as."""
        if self.cfg_interval is None:
            return
        first, end = as_numbers(
            "cfg_interval", self.cfg_interval, 2, "two: the shares at which guidance begins and ends"
        )
        for share in (first, end):
            check_number("cfg_interval", share, 0.0, 1.0)
        if first >= end:
            raise UsageError(f"cfg_interval {first:g} to {end:g} is empty", "use guidance 1 to turn guidance off")
        object.__setattr__(self, "cfg_interval", (float(first), float(end)))

    def _check_head_steps(self) -> None:
        """Likewise."""
        if self.head_steps is None:
            return
        pair = as_numbers("head_steps", self.head_steps, 2, "two: steps in the first and in the last round")
        for steps in pair:
            check_whole("head_steps", steps, 2, 1000)
        object.__setattr__(self, "head_steps", pair)


class SamplingOptions(TypedDict, total=False):
    """The keywords `generate` and `edit` share: the fields of `Sampling` but the seed."""

    n: int
    steps: int | None
    guidance: float | None
    cfg_schedule: str
    temperature: float
    negative: str | None
    head_steps: tuple[int, int] | None
    order: str | None
    cfg_interval: tuple[float, float] | None
    cfg_cache: float | None
    solver: str | None
    block_cache: float | None
    speed: str
    batch_size: int | None
    preview_every: int


def as_sampling(seed: int | None, options: SamplingOptions) -> Sampling:
    """The options as a checked Sampling; without a seed one is drawn."""
    check_known(options, SamplingOptions, "seed")
    seed = secrets.randbits(32) if seed is None else seed
    return Sampling(**{name: as_plain(value) for name, value in {"seed": seed, **options}.items()})
