"""One batch through a family's verbs: condition, sample, decode. Knows no files and no memory budget."""

import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor

from ..kernels._warm_up import WarmUp, warming_up
from .errors import UnipicWarning
from .loaded import Loaded
from .outcome import CancelToken, Event
from .picture import to_images
from .precision import true_float32
from .task import Batch, Task

LAST = "decode"  # after this stage the clock says what was compiled; of an answer, its reader does


class Clock:
    """Seconds per stage of one request, summed over batches; waits for the device where a stage ends."""

    def __init__(self, device: torch.device) -> None:
        self.device, self._taken = device, {}
        self._warm_up, self._compiled, self._waited = WarmUp(announce), 0, 0.0  # of the latter two, what was said

    @property
    def seconds(self) -> dict[str, float]:
        """`compile` and `capture`, where they are, is what of the stages went into kernels and graphs."""
        total: dict[str, float] = {}
        for taken in self._taken.values():
            for part, seconds in taken.items():
                total[part] = total.get(part, 0.0) + seconds
        return total

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        start, before = time.perf_counter(), replace(self._warm_up)
        try:
            with warming_up(self._warm_up):
                yield
        finally:
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            taken = self._taken.setdefault(name, {})
            taken[name] = taken.get(name, 0.0) + time.perf_counter() - start
            for part in ("compile", "capture"):
                if seconds := getattr(self._warm_up, part) - getattr(before, part):
                    taken[part] = taken.get(part, 0.0) + seconds
        if name == LAST:
            self.say()

    def forget(self, name: str) -> None:
        """The seconds of a stage, and what of them went into kernels and graphs."""
        self._taken.pop(name, None)

    def say(self) -> None:
        """What was compiled since this was last asked for."""
        kernels, seconds = self._warm_up.kernels - self._compiled, self._warm_up.compile - self._waited
        self._compiled, self._waited = self._warm_up.kernels, self._warm_up.compile
        if kernels:
            what = f"compiled {kernels} kernel{'s' * (kernels > 1)} in {seconds:.1f} s"
            warnings.warn(f"{what}: later runs find them on the disk", UnipicWarning, stacklevel=1)


def announce() -> None:
    text = "compiling kernels for this GPU, once: the first run takes longer"
    warnings.warn(text, UnipicWarning, stacklevel=1)


class Pacer:
    """At most two rounds in flight: after round s is enqueued, waits for round s-1.

    So progress, previews and cancelling are true to a round, and the host never runs ahead by a whole image.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.events = device, deque()

    def tick(self) -> None:
        if self.device.type != "cuda":
            return
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.device))
        self.events.append(event)
        if len(self.events) > 1:
            self.events.popleft().synchronize()


@dataclass(frozen=True)
class Watch:
    """What the caller hears and may say while a batch runs."""

    observe: Callable[[Event], None]
    cancel: CancelToken
    preview_every: int  # rounds between previews, 0 for none


@dataclass(frozen=True)
class Made:
    """What became of a batch, on the device."""

    levels: Tensor  # (B, H, W, 3) uint8
    finite: Tensor  # () bool, whether all pixels were numbers
    conditions: Any  # which the next batch of the task may reuse


@torch.inference_mode()
@true_float32()
def run_batch(loaded: Loaded, task: Task, batch: Batch, reuse: Any, clock: Clock, watch: Watch) -> Made:
    """One batch; on the meta device too, where it costs nothing and makes nothing."""
    family, model, placed = loaded.family, loaded.model, loaded.placed
    decode = partial(family.decode, model, rows=task.rows, columns=task.columns, bands=placed.bands)
    watch.cancel.check()
    conditions = reuse
    for stage in takewhile(lambda name: name != "sample", family.needs(task.kind)):
        with clock.stage(stage):
            placed.enter(stage)
            conditions = getattr(family, stage)(model, loaded.tokens, task, batch, conditions)
        watch.cancel.check()
    watch.observe(Event("condition"))
    schedule = family.schedule(model.config, task, batch).to(clock.device)
    pacer, total = Pacer(clock.device), len(schedule)
    with clock.stage("sample"):
        placed.enter("sample")
        for done, latents in enumerate(family.sample(model, conditions, task, batch, schedule), 1):
            pacer.tick()
            shown = watch.preview_every and done % watch.preview_every == 0 and done < total
            previews = to_images(to_levels(decode(latents))) if shown else ()
            watch.observe(Event("sample", done, total, previews=tuple(previews)))
            watch.cancel.check()
    with clock.stage("decode"):
        placed.enter("decode")
        pixels = decode(latents)
        return Made(to_levels(pixels), pixels.isfinite().all(), conditions)


def to_levels(pixels: Tensor) -> Tensor:
    """Pixels in [-1, 1], more or less, to uint8 by truncation as the original does it; computed where they are."""
    return (127.5 * pixels.float() + 128).clamp(0, 255).to(torch.uint8)
