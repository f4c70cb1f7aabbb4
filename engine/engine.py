"""The engine as a library user sees it: load once, then generate, edit and ask.

One call at a time: a lock makes threads wait for each other, and a streamed answer holds it until it ends.
"""

import gc
import os
import secrets
import warnings
import weakref
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, Unpack, overload

import torch
from PIL import Image
from torch import nn

from .. import __version__
from ..quant.recipe import NONE, Recipe
from . import families, hub, weights
from .checkpoint.manifest import Progress
from .device import as_device, as_dtype, current, dtype_name, memory_peak, out_of_memory, reset_memory_peak
from .errors import UnipicWarning, UsageError
from .layers.attention import resolve
from .loaded import Loaded
from .lock import CallLock
from .making import GPU_BATCH, Job, Room, jobs_of, make_images
from .noise import Noise
from .picture import open_image, open_mask
from .placing import Placing, as_vram, budget_on
from .prepare import Defaults, Finish, edit_task, generate_task, note_doubts
from .reading import Reader
from .request import (
    PATCH,
    Answer,
    AskOptions,
    AskRequest,
    CancelToken,
    EditRequest,
    Event,
    GenerateRequest,
    Result,
    Sampling,
    SamplingOptions,
    as_margins,
    as_prompts,
    as_sampling,
    as_size,
)
from .run import Clock
from .task import Task
from .tokens import Tokens
from .verbs import Verbs

ImageSource = Image.Image | str | os.PathLike[str] | bytes  # bytes: an encoded file


class Engine:
    """A loaded model. `Engine.from_pretrained` is the usual way to get one; use it as a context manager."""

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
    ) -> None:
        """`model` = family.build(config), filled, with the recipe's layers; its parameters say which precision is used.

        `device`: where it computes, by default where it is. `budget`: bytes that its weights and activations may take
        there; what does not fit waits in the host's memory, and `say` hears where everything lies.
        """
        place = device or next(model.parameters()).device
        self.loaded: Loaded | None = Loaded(family, model, tokens, place)
        self.placing = None if budget is None else Placing(self.loaded, recipe, budget, say or str)
        self.name, self.config, self.quant = name, self.loaded.config, recipe.scheme
        self.device, self.dtype = self.loaded.device, self.loaded.dtype
        self.attention, self.max_image_tokens = family.attention_backend(model), family.max_image_tokens(self.config)
        self.defaults = Defaults(self.config.rounds, self.config.guidance)
        self.lock = CallLock()
        self._streams: weakref.WeakSet[Generator[str]] = weakref.WeakSet()

    @classmethod
    def from_pretrained(
        cls,
        model: str | os.PathLike[str] = "unipic",
        *,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "auto",
        quant: str | None = None,
        attention: str = "auto",
        vram: float | str | None = None,
        exact_rope: bool = False,
        revision: str | None = None,
        offline: bool = False,
        on_progress: Progress | None = None,
        say: Callable[[str], None] | None = None,
    ) -> "Engine":
        """Load a short name, a folder or a hub id.

        device: auto, cpu, cuda, cuda:N. dtype: auto (bfloat16 on CUDA, float32 on the CPU), bf16, fp16, fp32.
        quant: none, int8, bnb8, nf4 (the last two through bitsandbytes); by default as the checkpoint is stored.
        attention: auto, sdpa, int8-qk, flash-attn, xformers. vram: GiB of the GPU that may be used, its CUDA context
        included; weights that do not fit come when they are needed. exact_rope: keep rotary frequencies in float32,
        which the released scripts round to bfloat16. Raises UsageError, ModelMissingError, CorruptWeightsError,
        UnsupportedDeviceError, BudgetError. `on_progress(doing, done, total)` counts bytes, `say` gets a sentence
        before anything slow.
        """
        place = as_device(device)
        precision = as_dtype(dtype, place)
        scheme = weights.as_scheme(quant)
        attend = resolve(attention, place, precision)
        if vram is not None and scheme in ("bnb8", "nf4"):
            raise UsageError(
                f"quant {scheme} and vram: weights of bitsandbytes cannot be moved", "use int8, or no vram"
            )
        budget = None if vram is None else budget_on(place, as_vram(vram))
        folder = hub.resolve(model, revision=revision, offline=offline, on_progress=on_progress, say=say)
        row, config = families.read(folder)
        family = families.model(row.name)
        if exact_rope:
            config = replace(config, round_inv_freq=False)
        recipe = families.recipe(row.name, scheme or weights.stored_scheme(folder))
        with out_of_memory("loading the model"), current(place):
            build = partial(family.build, config, attend)
            first = place if budget is None else torch.device("cpu")  # from where they go to their places
            module = weights.assemble(build, recipe, folder, first, precision, on_progress)
        tokens = Tokens(folder / "tokenizer.json", family.IMAGE, config.image_token)
        # A folder is named without its path: names end up in pictures that are passed on.
        named = model in families.short_names() or not Path(model).expanduser().is_dir()
        name = os.fspath(model) if named else folder.name
        return cls(family, module.eval().requires_grad_(False), tokens, name, recipe, place, budget, say)

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Free everything, ending streamed answers that are still open. A closed engine refuses work."""
        for stream in list(self._streams):
            with suppress(ValueError):  # another thread is just reading it: wait for its next piece below
                stream.close()
        with self.lock:
            if self.loaded is not None:
                self.loaded.model.graphs.clear()  # which hold the model that holds them
            bounded, self.loaded, self.placing = self.placing is not None, None, None
            if self.device.type == "cuda":
                gc.collect()  # a mover and the model it has hooks in hold each other
                torch.cuda.empty_cache()
                if bounded:
                    torch.cuda.set_per_process_memory_fraction(1.0, self.device)

    def generate(
        self,
        prompt: str | Sequence[str],
        *,
        res: int | None = None,
        size: tuple[int, int] | None = None,
        seed: int | None = None,
        on_event: Callable[[Event], None] | None = None,
        cancel: CancelToken | None = None,
        noise: Sequence[Noise] | None = None,
        **sampling: Unpack[SamplingOptions],
    ) -> Result:
        """Text to image. `res` is the side of a square, `size` (width, height); multiples of 16.

        Other keywords are the fields of `Sampling`: n, steps, guidance, cfg_schedule, temperature, negative,
        batch_size, preview_every. Without a seed one is drawn and reported. A list of prompts gives
        prompts x n images, copy i of each with seed + i. `noise` replaces the seeds' randomness, one source an image.
        """
        shape = as_size(res, size, self.config.resolution)
        request = GenerateRequest(as_prompts(prompt), shape, as_sampling(seed, sampling))
        return self._images(request, partial(generate_task, request, self.defaults), noise, on_event, cancel, {})

    def edit(
        self,
        image: ImageSource,
        prompt: str | Sequence[str],
        *,
        mask: ImageSource | None = None,
        outpaint: tuple[int, int, int, int] | None = None,
        fit: str | None = None,
        res: int | None = None,
        seed: int | None = None,
        on_event: Callable[[Event], None] | None = None,
        cancel: CancelToken | None = None,
        noise: Sequence[Noise] | None = None,
        **sampling: Unpack[SamplingOptions],
    ) -> Result:
        """Image and instruction to image; keywords as in `generate`.

        Without a mask the picture keeps its aspect at an area of about res squared (`fit` "keep"), or is
        cropped to a square (`fit` "crop", the original's way). With `mask` (white = regenerate) or `outpaint`
        (left, top, right, bottom pixels) the prompt describes the whole picture, the size stays the source's unless
        `fit` is given, and unmasked pixels stay exactly as they are.
        """
        picture = open_image(image)
        if res is not None and fit is None and (mask is not None or outpaint is not None):
            raise UsageError(f"res {res} has no effect: a masked edit keeps the picture's size", "add fit keep or crop")
        request = EditRequest(
            image=picture,
            prompts=as_prompts(prompt),
            sampling=as_sampling(seed, sampling),
            res=self.config.resolution if res is None else res,
            mask=None if mask is None else open_mask(mask, picture.size),
            outpaint=as_margins(outpaint),
            fit=fit,
        )
        make_task = partial(edit_task, request, self.defaults, self.max_image_tokens, self.device, self.dtype)
        how = {"fit": fit, "outpaint": outpaint and list(outpaint), "masked": mask is not None or None}
        return self._images(request, make_task, noise, on_event, cancel, how)

    @overload
    def ask(
        self, image: ImageSource, question: str, *, stream: Literal[True], **how: Unpack[AskOptions]
    ) -> Iterator[str]: ...
    @overload
    def ask(self, image: ImageSource, question: str, **how: Unpack[AskOptions]) -> Answer: ...
    @overload
    def ask(self, image: ImageSource, question: Sequence[str], **how: Unpack[AskOptions]) -> list[Answer]: ...

    def ask(
        self,
        image: ImageSource,
        question: str | Sequence[str],
        *,
        res: int | None = None,
        max_new_tokens: int = 1024,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
        stream: bool = False,
        cancel: CancelToken | None = None,
    ) -> Answer | list[Answer] | Iterator[str]:
        """Image and question to text: an `Answer`, or with `stream` its pieces as they come.

        A list of questions gives a list of answers; the picture is then read only once. Temperature 0 is greedy.
        """
        side, picture = self.config.resolution if res is None else res, open_image(image)
        requests = [
            AskRequest(text, side, max_new_tokens, temperature, top_p, secrets.randbits(32) if seed is None else seed)
            for text in as_prompts(question)
        ]
        if not requests:
            raise UsageError("no question given", "ask something")
        if stream:
            if len(requests) != 1:
                raise UsageError(f"{len(requests)} questions cannot be streamed", "stream one question at a time")
            answer = self._stream(picture, requests[0], cancel or CancelToken())
            self._streams.add(answer)
            return answer
        answers = self._answers(picture, requests, cancel or CancelToken())
        return answers[0] if isinstance(question, str) else answers

    def _answers(self, picture: Image.Image, requests: Sequence[AskRequest], cancel: CancelToken) -> list[Answer]:
        with self._working("answering") as loaded:
            clock, answers = Clock(self.device), []
            loaded = self._to_answer(loaded, requests)
            reader = Reader(loaded, picture, requests, clock)
            for request in requests:
                ids = tuple(reader.answer(request, cancel))
                answers.append(
                    Answer(
                        text=loaded.tokens.decode(ids),
                        ids=ids,
                        settings=self._settings("ask", **asdict(request)),
                        timings=dict(clock.seconds),
                        peak_bytes=memory_peak(self.device),
                        attention=self.attention,
                    )
                )
            return answers

    def _stream(self, picture: Image.Image, request: AskRequest, cancel: CancelToken) -> Generator[str]:
        # The lock is taken when reading begins; it goes when the generator ends, is closed, or is collected.
        with self._working("answering") as loaded:
            reader = Reader(self._to_answer(loaded, [request]), picture, [request], Clock(self.device))
            text = loaded.tokens.stream()
            for token in reader.answer(request, cancel):
                if piece := text.push(token):
                    yield piece
                    self.lock.adopt()  # whoever resumed it
            if piece := text.rest():
                yield piece

    def _images(
        self,
        request: GenerateRequest | EditRequest,
        make_task: Callable[[], tuple[Task, Finish]],
        noise: Sequence[Noise] | None,
        on_event: Callable[[Event], None] | None,
        cancel: CancelToken | None,
        how: dict[str, Any],
    ) -> Result:
        jobs, clock = jobs_of(request.prompts, request.sampling, noise), Clock(self.device)
        with self._working("making images") as loaded:
            task, finish = make_task()
            loaded.family.check_prompts(self.config, loaded.tokens, task, request.prompts)
            note_doubts(task, self.config.resolution)
            sampled = ("steps", "guidance", "cfg_schedule", "temperature", "negative")
            how = {name: getattr(task, name) for name in sampled} | how

            def describe(job: Job, image: Image.Image) -> dict[str, Any]:
                size = f"{image.width}x{image.height}"
                return self._settings(task.kind, prompt=job.prompt, seed=job.seed, size=size, **how)

            sampling, room, less = request.sampling, (loaded, self._at_once(request.sampling)), None
            if self.placing:
                prompts, previews = [job.prompt for job in jobs], bool(sampling.preview_every)
                room, less = self.placing.pictures(task, prompts, room[1], previews), self._less
            how_seen = (cancel or CancelToken(), finish, describe, on_event)
            images = make_images(room, less, task, jobs, sampling.preview_every, clock, *how_seen)
            return Result(
                images=tuple(images),
                seeds=tuple(job.seed for job in jobs),
                settings=tuple(describe(job, image) for job, image in zip(jobs, images, strict=True)),
                timings=clock.seconds,
                peak_bytes=memory_peak(self.device),
                attention=self.attention,
            )

    def _to_answer(self, loaded: Loaded, requests: Sequence[AskRequest]) -> Loaded:
        """The model as it lies for questions about one picture."""
        if self.placing is None:
            return loaded
        longest = max((request.question for request in requests), key=len)
        return self.placing.answers(requests[0].res // PATCH, longest, max(r.max_new_tokens for r in requests))

    def _at_once(self, sampling: Sampling) -> int:
        return sampling.batch_size or (GPU_BATCH if self.device.type == "cuda" else 1)

    def _less(self) -> Room:
        """The model placed in less memory than was not enough, and a word about it."""
        room = self.placing.less()
        warnings.warn(f"out of memory: going on with {self.placing.line}", UnipicWarning, stacklevel=4)
        return room

    @contextmanager
    def _working(self, doing: str) -> Iterator[Loaded]:
        """Alone on the engine, counting memory, and failing as a UnipicError when memory runs out."""
        with self.lock, out_of_memory(doing), current(self.device):
            if self.loaded is None:
                raise UsageError("this engine is closed", "load it again with Engine.from_pretrained")
            reset_memory_peak(self.device)
            with self.placing.running() if self.placing else nullcontext():
                yield self.loaded

    def _settings(self, task: str, **what: Any) -> dict[str, Any]:
        """What a PNG and `--json` tell about an image or an answer; fields that were not set are left out."""
        known = {
            "version": __version__,
            "task": task,
            "model": self.name,
            **what,
            "dtype": dtype_name(self.dtype),
            "quant": None if self.quant == "none" else self.quant,
            "exact_rope": None if self.config.round_inv_freq else True,
            "device": self.device.type,
            "attention": self.attention,
        }
        return {name: value for name, value in known.items() if value is not None}
