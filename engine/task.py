"""What the models are handed: a checked request turned into tensors, and the part of it computed at once."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from .noise import Noise
from .sampling import WHOLE_RUN


@dataclass(frozen=True)
class Task:
    """One call of `generate` or `edit`, without files and without PIL.

    `sources`, each (1, 3, H, W) in [-1, 1], are what an edit is given, in order; their sizes may differ from each other
    and from the result's. `cells` (rows, columns) bool marks the tokens to sample when only part of the picture is
    regenerated; the others keep the source's latents.
    """

    kind: str  # "generate", "edit", "inpaint"
    rows: int  # of the result, in cells of PATCH pixels
    columns: int
    steps: int
    guidance: float
    cfg_schedule: str
    temperature: float
    negative: str | None = None
    sources: tuple[Tensor, ...] = ()
    cells: Tensor | None = None
    posterior: str | None = None  # of the sources, one of request.POSTERIORS; None for the family's own
    head_steps: tuple[int, int] | None = None  # this and those below as in sampling.Sampling
    order: str = "random"
    cfg_interval: tuple[float, float] = WHOLE_RUN
    cfg_cache: float = 1.0
    solver: str = "ddpm"
    block_cache: float | None = None


@dataclass(frozen=True)
class Batch:
    """Images computed together: a prompt and a noise source for each.

    `apart`: their guidance rows are computed one after the other, by families that can.
    """

    prompts: Sequence[str]
    noises: Sequence[Noise]
    apart: bool = False
