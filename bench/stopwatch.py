"""A meter that also measures: each kind of call is timed alone, the first time that it comes."""

from collections.abc import Callable, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes
from unipic_run.bench.ops import seconds
from unipic_run.engine.checks import PATCH
from unipic_run.engine.loaded import Loaded
from unipic_run.engine.meter import Call, Meter
from unipic_run.engine.noise import PhiloxNoise
from unipic_run.engine.outcome import CancelToken
from unipic_run.engine.run import Clock, Watch, run_batch
from unipic_run.engine.task import Batch, Task
from unipic_run.kernels import attention

REPEAT, WARM_UP = 3, 1  # of thousands of calls each
Timer = Callable[[Callable[[], Any], Callable[[], Any]], float]  # of what to do, and what to do before


class Stopwatch(Meter):
    """`seconds`: of one call of each kind in `calls`. What a call writes is put back before it is made again."""

    def __init__(self, timer: Timer) -> None:
        super().__init__()
        self.seconds: dict[Call, float] = {}
        self._timer = timer

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs, known = kwargs or {}, len(self.calls)
        writes = [] if self._inside else written(function, args, kwargs)
        before = [x.clone() for x in writes]
        result = super().__torch_dispatch__(function, types, args, kwargs)
        if len(self.calls) > known and (call := next(reversed(self.calls))) not in self.seconds:
            after = [x.clone() for x in writes]
            self.seconds[call] = self._timer(partial(function, *args, **kwargs), partial(fill, writes, before))
            fill(writes, after)
        return result


def written(function: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> list[Tensor]:
    """The arguments that a call writes to."""
    if not function._schema.is_mutable:
        return []
    declared = function._schema.arguments
    given = [*zip(declared, args, strict=False), *((a, kwargs[a.name]) for a in declared if a.name in kwargs)]
    return [x for a, x in given if isinstance(x, Tensor) and a.alias_info is not None and a.alias_info.is_write]


def fill(tensors: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for tensor, value in zip(tensors, values, strict=True):
        tensor.copy_(value)


class Stages(Clock):
    """The pipeline's clock, which tells the meter which stage it is in."""

    def __init__(self, meter: Meter, device: torch.device) -> None:
        super().__init__(device)
        self.meter = meter

    @contextmanager
    def stage(self, name: str):
        self.meter.stage = name
        with super().stage(name):
            yield


@contextmanager
def biases_unseen():
    """torch's causal bias is a tensor class of its own, of which none can be made while a dispatch mode looks on."""
    make = attention.to_the_last_key

    def unseen(*how: Any) -> Tensor:
        with _disable_current_modes():
            return make(*how)

    with patch.object(attention, "to_the_last_key", unseen):
        yield


def stopwatch(device: torch.device) -> Stopwatch:
    return Stopwatch(lambda call, before: seconds(call, REPEAT, before, device.type, WARM_UP))


def time_a_picture(watch: Stopwatch, loaded: Loaded, prompt: str, res: int, steps: int, images: int) -> None:
    """Every kind of call of one batch of square pictures, launched one by one and not from graphs."""
    device, side = loaded.device, res // PATCH
    task = Task("generate", side, side, steps, loaded.config.guidance, "constant", 1.0)
    batch = Batch([prompt] * images, [PhiloxNoise(seed) for seed in range(images)])
    graphs = loaded.model.graphs
    graphs.clear("each call is timed alone")
    try:
        with torch.inference_mode(), biases_unseen(), watch:
            run_batch(loaded, task, batch, None, Stages(watch, device), Watch(lambda event: None, CancelToken(), 0))
    finally:
        graphs.clear()
