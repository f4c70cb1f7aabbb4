"""All images of one call, batch by batch: which prompt and seed each has, and what the caller hears meanwhile."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import wraps
from typing import Any, ParamSpec, TypeVar

from PIL import Image

from .device import TAKE_LESS, dtype_name, out_of_memory
from .errors import BudgetError, UnsupportedDeviceError, UsageError
from .noise import Noise, PhiloxNoise
from .outcome import CancelToken, Event
from .picture import to_images
from .prepare import Finish
from .room import Room
from .run import Clock, Watch, run_batch
from .sampling import MAX_SEED, Sampling
from .task import Batch, Task

P, T = ParamSpec("P"), TypeVar("T")


class CallersError(Exception):
    """Carries what the caller's own function raised, its cause, past those who would take it for the engine's failure.

    To be `unwrapped` where nobody handles errors any more.
    """


def tell_caller(listener: Callable[[T], object], what: T) -> None:
    """Raises CallersError for whatever the listener raises."""
    try:
        listener(what)
    except Exception as error:
        raise CallersError from error


def unwrapped(function: Callable[P, T]) -> Callable[P, T]:
    """The function, out of which comes what a CallersError carries, as it was raised."""

    @wraps(function)
    def call(*given: P.args, **named: P.kwargs) -> T:
        try:
            return function(*given, **named)
        except CallersError as carried:
            raised = [carried.__cause__]
        raise raised.pop()  # out here it keeps its context, and popped it is in no frame of its own trace

    return call


@dataclass(frozen=True)
class Job:
    """One image to make."""

    prompt: str
    seed: int | None  # None where the caller gave the noise
    noise: Noise


def jobs_of(prompts: Sequence[str], sampling: Sampling, noises: Sequence[Noise] | None) -> list[Job]:
    """n copies of each prompt; copy i of every prompt takes seed + i, so it does not matter what else is asked for."""
    asked = [(prompt, (sampling.seed + copy) & MAX_SEED) for prompt in prompts for copy in range(sampling.n)]
    if noises is None:
        return [Job(prompt, seed, PhiloxNoise(seed)) for prompt, seed in asked]
    if not isinstance(noises, Sequence) or not all(hasattr(noise, "key") for noise in noises):
        raise UsageError("noise is no list of noise sources", "give an engine.noise.Noise for each image, or a seed")
    if len(noises) != len(asked):
        raise UsageError(f"{len(noises)} noise sources for {len(asked)} images", "give one for each image")
    return [Job(prompt, None, noise) for (prompt, _), noise in zip(asked, noises, strict=True)]


def make_images(
    room: Room,
    task: Task,
    jobs: Sequence[Job],
    preview_every: int,
    clock: Clock,
    cancel: CancelToken,
    finish: Finish,
    describe: Callable[[Job, Image.Image], dict[str, Any]],
    on_event: Callable[[Event], None] | None,
) -> list[Image.Image]:
    """Images in the order of the jobs. A batch that runs out of memory is made again, in less of it.

    Raises CallersError for whatever `on_event` raises.
    """
    images: list[Image.Image] = []
    seen: set[tuple[int, int]] = set()
    made = reuse = None
    while len(images) < len(jobs):
        loaded, first = room.loaded, len(images)
        part = jobs[first : first + room.at_once]

        def tell(event: Event, part: Sequence[Job] = part, first: int = first) -> None:
            if on_event:
                shown = {(first + index, event.round) for index in range(len(event.previews))}
                again = shown <= seen  # those of a batch that ran out of memory behind them
                previews, images = () if again else tuple(finish(image) for image in event.previews), event.images
                seen.update(shown)
                pictures = previews or images
                settings = tuple(describe(*pair) for pair in zip(part, pictures, strict=bool(pictures)))
                heard = replace(event, done=first, total=len(jobs), previews=previews, settings=settings)
                tell_caller(on_event, heard)

        batch = Batch([job.prompt for job in part], [job.noise for job in part], loaded.placed.apart)
        try:
            with out_of_memory("making images", f"make smaller pictures, or {TAKE_LESS}"):
                made = run_batch(loaded, task, batch, reuse, clock, Watch(tell, cancel, preview_every))
        except BudgetError as error:
            made = reuse = None  # what an earlier batch has left
            if not room.shrink(error):
                raise
            continue
        if not made.finite:
            what = f"the picture has values that are not numbers in {dtype_name(loaded.dtype)}"
            raise UnsupportedDeviceError(what, "use dtype bf16 or fp32")
        reuse = made.conditions
        done = [finish(image) for image in to_images(made.levels)]
        tell(Event("decode", images=tuple(done)))
        images += done
    return images
