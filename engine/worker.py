"""A loaded model at work on checked requests, one at a time, within its budget.

A lock makes threads wait for each other, and a streamed answer holds it until it ends.
"""

import gc
import time
import warnings
import weakref
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Self

import torch
from PIL import Image
from torch import nn

from .. import __version__
from ..quant.recipe import NONE, Recipe
from .checks import check_function
from .device import current, dtype_name, memory_peak, out_of_memory, reset_memory_peak
from .errors import UnipicWarning
from .loaded import Loaded
from .lock import CLOSED, CallLock, Closed, Stream
from .making import Job, jobs_of, make_images, unwrapped
from .noise import Noise
from .outcome import Answer, CancelToken, Event, Result
from .placing import Placing
from .prepare import Finish, check_kind, check_shortcuts, defaults_of, note_doubts
from .reading import Reader, answer_all
from .request import GPU_BATCH, AskRequest, EditRequest, GenerateRequest
from .room import Room
from .run import Clock
from .sampling import SAMPLED, Sampling
from .source import UNVERIFIED, Source
from .task import Task
from .tokens import Tokens
from .verbs import Verbs


class Worker:
    """What an Engine is beside its public calls; use it as a context manager."""

    def __init__(
        self,
        family: Verbs,
        model: nn.Module,
        tokens: Tokens,
        name: str,
        recipe: Recipe = NONE,
        device: torch.device | None = None,
        budget: int | None = None,
        say: Callable[[str], None] | None = None,
        source: Source | None = None,
        drop_idle: bool = False,
        release: Callable[[], object] = lambda: None,
    ) -> None:
        """`model` = family.build(config), filled, with the recipe's layers; its parameters say which precision is used.

        `device`: where it computes, by default where it is. `budget`: bytes that its weights and activations may take
        there; what does not fit waits in the host's memory, and `say` hears where everything lies. `source`: what reads
        parts anew; with `drop_idle`, which needs it, parts that a kind of request does not need do not wait there.
        `release` is called once, when the engine is closed or forgotten.
        """
        place = device or next(model.parameters()).device
        self.loaded: Loaded | None = Loaded(family, model, tokens, place)
        self.source, reread = source, source.reread if drop_idle else None
        self.placing = None if budget is None else Placing(self.loaded, recipe, budget, say or str, reread)
        self.name, self.config, self.recipe, self.quant = name, self.loaded.config, recipe, recipe.scheme
        self.device, self.dtype = self.loaded.device, self.loaded.dtype
        self.family, self.attention = family, family.attention_backend(model)
        self.defaults = defaults_of(family, self.config)
        self.lock = CallLock()
        self._release = weakref.finalize(self, release)
        self._release.atexit = False
        self._streams: weakref.WeakSet[Stream] = weakref.WeakSet()
        self._closing = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Free everything, ending streamed answers that are still open. A closed engine refuses work.

        Raises UsageError in the middle of a call of the same thread, and then leaves all as it is.
        """
        if not any(stream.is_held for stream in list(self._streams)):  # else that one has the lock, and can be ended
            self.lock.check()
        self._closing = True
        try:
            self._end_streams()
            self._free()
        except BaseException:
            self._closing = False
            raise

    def _end_streams(self) -> None:
        """Those that other threads are in end at their next piece."""
        left = list(self._streams)
        while left := [stream for stream in left if not stream.cut()]:
            time.sleep(0.01)

    def _free(self) -> None:
        with self.lock:
            if self.loaded is not None:
                self.loaded.model.graphs.clear()  # which hold the model that holds them
            self.loaded = self.placing = self.source = None
            if self.device.type == "cuda":
                gc.collect()  # a mover and the model it has hooks in hold each other
                torch.cuda.empty_cache()
            self._release()

    @unwrapped
    def _images(
        self,
        request: GenerateRequest | EditRequest,
        make_task: Callable[[], tuple[Task, Finish]],
        noise: Sequence[Noise] | None,
        on_event: Callable[[Event], None] | None,
        cancel: CancelToken,
        how: dict[str, Any],
    ) -> Result:
        check_function("on_event", on_event)
        jobs = jobs_of(request.prompts, request.sampling, noise)
        with self._working("making images") as loaded:
            task, finish = make_task()
            check_shortcuts(task, loaded.family)
            loaded.family.check_prompts(self.config, loaded.tokens, task, request.prompts)
            note_doubts(task, self.config.resolution)
            return self._made(loaded, request.sampling, task, finish, jobs, on_event, cancel, how)

    def _made(
        self,
        loaded: Loaded,
        sampling: Sampling,
        task: Task,
        finish: Finish,
        jobs: Sequence[Job],
        on_event: Callable[[Event], None] | None,
        cancel: CancelToken,
        how: dict[str, Any],
    ) -> Result:
        clock, previews = Clock(self.device), sampling.preview_every
        how = {name: getattr(task, name) for name in SAMPLED} | {"speed": sampling.speed} | how

        def describe(job: Job, image: Image.Image) -> dict[str, Any]:
            size = f"{image.width}x{image.height}"
            return self.settings_of(task.kind, prompt=job.prompt, seed=job.seed, size=size, **how)

        at_once = sampling.batch_size or (GPU_BATCH if self.device.type == "cuda" else 1)
        room = Room(loaded, min(at_once, len(jobs)))
        if self.placing:
            prompts = [job.prompt for job in jobs]
            room = Room(*self.placing.pictures(task, prompts, room.at_once, bool(previews)), self._less)
        images = make_images(room, task, jobs, previews, clock, cancel, finish, describe, on_event)
        return Result(
            images=tuple(images),
            seeds=tuple(job.seed for job in jobs if job.seed is not None),
            settings=tuple(describe(job, image) for job, image in zip(jobs, images, strict=True)),
            timings=clock.seconds,
            peak_bytes=memory_peak(self.device),
            attention=self.attention,
        )

    @unwrapped
    def _answers(
        self,
        picture: Image.Image,
        requests: Sequence[AskRequest],
        cancel: CancelToken,
        on_answer: Callable[[Answer], object] | None,
    ) -> list[Answer]:
        check_function("on_answer", on_answer)
        with self._working("answering", answering=True) as loaded:
            return answer_all(self._reader(loaded, picture, requests), requests, cancel, self.settings_of, on_answer)

    def _stream(self, picture: Image.Image, request: AskRequest, cancel: CancelToken) -> Generator[str]:
        # The lock is taken when reading begins; it goes when the generator ends, is closed, or is collected.
        with self._working("answering", answering=True) as loaded:
            text = loaded.tokens.stream()
            for token in self._reader(loaded, picture, [request]).answer(request, cancel):
                if self._closing:
                    raise Closed(*CLOSED)
                if piece := text.push(token):
                    yield piece
                    self.lock.adopt()  # whoever resumed it
            if piece := text.rest():
                yield piece

    def _reader(self, loaded: Loaded, picture: Image.Image, requests: Sequence[AskRequest]) -> Reader:
        check_kind("ask", loaded.family)
        if loaded.family.tuned and not (self.source and self.source.untuned):
            warnings.warn(UNVERIFIED, UnipicWarning, stacklevel=3)
        room = Room(loaded)
        if self.placing:
            longest = max((r.question for r in requests), key=lambda text: len(loaded.tokens.encode(text)))
            limit = max(r.max_new_tokens for r in requests)
            size = loaded.family.question_size(self.config, picture.size, requests[0].res)
            room = Room(self.placing.answers(size, longest, limit), less=self._less)
        return Reader(room, picture, requests, Clock(self.device))

    def _less(self) -> tuple[Loaded, int]:
        """The model placed in less memory than was not enough, and a word about it."""
        found = self.placing.less()
        warnings.warn(f"out of memory: going on with {self.placing.line}", UnipicWarning, stacklevel=4)
        return found

    @contextmanager
    def _working(self, doing: str, answering: bool = False) -> Iterator[Loaded]:
        """Alone on the engine, counting memory, and failing as a UnipicError when memory runs out."""
        with self.lock, out_of_memory(doing), current(self.device):
            if self.loaded is None or self._closing:
                raise Closed(*CLOSED)
            reset_memory_peak(self.device)
            with self.placing.running() if self.placing else nullcontext():
                self._fill(answering)
                yield self.loaded

    def _fill(self, answering: bool) -> None:
        """Exchange the weights of parts that have others than answers, or pictures, want."""
        if self.source and (stale := self.source.stale(answering)):
            if self.placing:
                self.placing.forget(stale)
            else:
                self.loaded.model.graphs.clear()
            self.source.fill(answering)

    def settings_of(self, task: str, **what: Any) -> dict[str, Any]:
        """What a PNG and `--json` tell about an image or an answer; fields that were not set are left out."""
        known = {
            "version": __version__,
            "task": task,
            "model": self.name,
            **what,
            "dtype": dtype_name(self.dtype),
            "quant": None if self.quant == "none" else self.quant,
            "exact_rope": True if self.config.round_inv_freq is False else None,
            "device": self.device.type,
            "attention": self.attention,
        }
        return {name: value for name, value in known.items() if value is not None}
