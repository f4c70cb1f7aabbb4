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
SHORTCUTS = ("head_steps", "order", "cfg_interval", "solver", "cfg_cache")  # what makes a picture cheaper, and worse
SAMPLED = ("steps", "guidance", "cfg_schedule", "temperature", "negative", *SHORTCUTS)
WHOLE_RUN = (0.0, 1.0)


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
    order: str = "random"  # in which tokens are revealed, of ORDERS
    cfg_interval: tuple[float, float] = WHOLE_RUN  # shares of the run between which guidance is on
    solver: str = "ddpm"  # of the head's denoising, of SOLVERS
    cfg_cache: float = 1.0  # the growth of the known tokens up to which what guidance is about is kept; 1 keeps nothing
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
        check_number("cfg_cache", self.cfg_cache, 1.0, 1000.0)
        check_number("temperature", self.temperature, 0.0, 100.0)
        check_one_of("cfg_schedule", self.cfg_schedule, CFG_SCHEDULES)
        check_one_of("order", self.order, ORDERS)
        check_one_of("solver", self.solver, SOLVERS)
        self._check_pairs()
        if self.negative:  # an empty one is a wish, too
            check_text("negative prompt", self.negative)

    def _check_pairs(self) -> None:
        """As tuples, whatever sequences they came as."""
        first, end = as_numbers(
            "cfg_interval", self.cfg_interval, 2, "two: the shares at which guidance begins and ends"
        )
        for share in (first, end):
            check_number("cfg_interval", share, 0.0, 1.0)
        if first >= end:
            raise UsageError(f"cfg_interval {first:g} to {end:g} is empty", "use guidance 1 to turn guidance off")
        object.__setattr__(self, "cfg_interval", (float(first), float(end)))
        if self.head_steps is not None:
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
    order: str
    cfg_interval: tuple[float, float]
    solver: str
    cfg_cache: float
    batch_size: int | None
    preview_every: int


def as_sampling(seed: int | None, options: SamplingOptions) -> Sampling:
    """The options as a checked Sampling; without a seed one is drawn."""
    check_known(options, SamplingOptions, "seed")
    seed = secrets.randbits(32) if seed is None else seed
    return Sampling(**{name: as_plain(value) for name, value in {"seed": seed, **options}.items()})
