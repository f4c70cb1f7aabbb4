"""All images of one call, batch by batch: which prompt and seed each has, and what the caller hears meanwhile."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from PIL import Image

from .errors import UsageError
from .loaded import Loaded
from .noise import Noise, PhiloxNoise
from .picture import to_images
from .prepare import Finish
from .request import MAX_SEED, CancelToken, Event, Sampling
from .run import Clock, Watch, run_batch
from .task import Batch, Task

GPU_BATCH = 4  # images computed together on a GPU when nothing is said


@dataclass(frozen=True)
class Job:
    """One image to make."""

    prompt: str
    seed: int
    noise: Noise


Describe = Callable[[Job, Image.Image], dict[str, Any]]  # the settings of a job's picture


def jobs_of(prompts: Sequence[str], sampling: Sampling, noises: Sequence[Noise] | None) -> list[Job]:
    """n copies of each prompt; copy i of every prompt takes seed + i, so it does not matter what else is asked for."""
    asked = [(prompt, (sampling.seed + copy) & MAX_SEED) for prompt in prompts for copy in range(sampling.n)]
    if noises is None:
        noises = [PhiloxNoise(seed) for _, seed in asked]
    if len(noises) != len(asked):
        raise UsageError(f"{len(noises)} noise sources for {len(asked)} images", "give one for each image")
    return [Job(prompt, seed, noise) for (prompt, seed), noise in zip(asked, noises, strict=True)]


def make_images(
    loaded: Loaded,
    task: Task,
    finish: Finish,
    jobs: Sequence[Job],
    describe: Describe,
    sampling: Sampling,
    clock: Clock,
    cancel: CancelToken,
    on_event: Callable[[Event], None] | None,
) -> list[Image.Image]:
    """Images in the order of the jobs. On the CPU one at a time, so that an image never depends on its neighbours."""
    at_once = sampling.batch_size or (GPU_BATCH if clock.device.type == "cuda" else 1)
    images, reuse = [], None
    for first in range(0, len(jobs), at_once):
        part = jobs[first : first + at_once]
        observe = partial(_tell, on_event, finish, describe, part, first, len(jobs))
        batch = Batch([job.prompt for job in part], [job.noise for job in part])
        pixels, reuse = run_batch(loaded, task, batch, reuse, clock, Watch(observe, cancel, sampling.preview_every))
        done = to_images(pixels)
        observe(Event("decode", images=tuple(done)))
        images += [finish(image) for image in done]
    return images


def _tell(
    on_event: Callable[[Event], None] | None,
    finish: Finish,
    describe: Describe,
    part: Sequence[Job],
    done: int,
    total: int,
    event: Event,
) -> None:
    """Hand an event of one batch to the caller, its pictures finished and described."""
    if on_event is None:
        return
    previews = tuple(finish(image) for image in event.previews)
    images = tuple(finish(image) for image in event.images)
    settings = tuple(describe(job, image) for job, image in zip(part, previews or images, strict=False))
    on_event(replace(event, done=done, total=total, previews=previews, images=images, settings=settings))
