"""A request of which only the size is known: what a dry run is given in place of a real one."""

import math
from typing import Any

import torch

from .checks import PATCH
from .plan import META
from .request import Largest
from .task import Task
from .verbs import Verbs

PROMPT = "a photograph of a red fox in deep snow at night, seen from the side, with northern lights above the trees"
LIMIT = 64  # tokens of an answer
KINDS = {"gen": "generate", "edit": "edit"}


def size_of(largest: Largest, config: Any) -> tuple[int, int]:
    """(width, height) in pixels."""
    return largest.size or (config.resolution, config.resolution)


def task_of(largest: Largest, family: Verbs, config: Any, dtype: torch.dtype) -> Task | None:
    """On the meta device; None for a question. The family fits an edit's sources as it does by default."""
    if largest.task == "ask":
        return None
    (width, height), sources = size_of(largest, config), ()
    if largest.task == "edit":
        width, height = family.fitted_size((width, height), family.fits[0], math.isqrt(width * height))
        source = torch.empty(1, 3, height, width, dtype=dtype, device=META)
        sources = (source,) * min(largest.sources, family.most_sources)
    steps = config.rounds if largest.steps is None else largest.steps
    how = (steps, config.guidance, "constant", 1.0)
    return Task(KINDS[largest.task], height // PATCH, width // PATCH, *how, sources=sources)
