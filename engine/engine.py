"""The engine as a library user sees it: load once, then generate, edit and ask. One call at a time."""

import os
import secrets
from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal, Unpack, overload

import torch
from PIL import Image

from .checkpoint.manifest import Progress
from .checks import as_plain
from .errors import UsageError
from .loading import load
from .lock import Stream
from .noise import Noise
from .outcome import Answer, CancelToken, Event, Result
from .picture import open_image, open_images, open_mask
from .prepare import edit_task, generate_task
from .request import (
    AskOptions,
    AskRequest,
    EditRequest,
    GenerateRequest,
    LargestOptions,
    as_margins,
    as_prompts,
    as_size,
    as_token,
    check_res,
)
from .sampling import SamplingOptions, as_sampling
from .worker import Worker

ImageSource = Image.Image | str | os.PathLike[str] | bytes  # bytes: an encoded file


class Engine(Worker):
    """A loaded model. `Engine.from_pretrained` is the usual way to get one; use it as a context manager."""

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
        drop_idle: bool = False,
        largest: LargestOptions | None = None,
        exact_rope: bool = False,
        revision: str | None = None,
        offline: bool = False,
        on_progress: Progress | None = None,
        say: Callable[[str], None] | None = None,
    ) -> "Engine":
        """Load a short name, a folder or a hub id.

        device: auto, cpu, cuda, cuda:N. dtype: auto (bfloat16 on CUDA, float32 on the CPU), bf16, fp16, fp32. quant:
        none, int8, bnb8, nf4 (the last two through bitsandbytes), or auto: the first of none, int8 and nf4 in which the
        largest request fits the GPU without layers that come one by one; by default as the checkpoint is stored.
        largest: what auto is to be ready for, a dictionary with any of task (gen, edit, ask), res or size of the
        picture, n (pictures computed together), steps, previews and sources (pictures that an edit is given); by
        default one picture of the trained size.
        attention: auto, sdpa, int8-qk, flash-attn, xformers. vram: GiB of the GPU that may be used, its CUDA context
        included, or auto: what is free now, less a margin; weights that do not fit come when they are needed.
        drop_idle: under that bound, which it needs, parts that do not fit and that a kind of request does not need are
        not kept in the host's memory after it, but read from disk again when one needs them. exact_rope: keep rotary
        frequencies in float32, which the released scripts round to bfloat16.
        Raises UsageError, ModelMissingError, CorruptWeightsError, UnsupportedDeviceError, BudgetError, OutputError (a
        cache that cannot be written).
        `on_progress(doing, done, total)` counts bytes, `say` gets a sentence before anything slow and about each auto.
        """
        return load(
            cls,
            model,
            device=device,
            dtype=dtype,
            quant=quant,
            attention=attention,
            vram=vram,
            drop_idle=drop_idle,
            largest=largest,
            exact_rope=exact_rope,
            revision=revision,
            offline=offline,
            on_progress=on_progress,
            say=say,
        )

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

        Other keywords are the fields of `Sampling`: n, steps, guidance, cfg_schedule, temperature, negative, speed and
        the shortcuts (head_steps, order, cfg_interval, cfg_cache, solver, block_cache), batch_size, preview_every.
        Without a seed one is drawn and reported. A list of prompts gives prompts x n images, copy i of each with
        seed + i. `noise` replaces the seeds' randomness, one source an image: then settings have no seed and `seeds`
        is empty. Whatever `on_event` raises ends the call and comes out of it as it is.
        Raises UsageError, BudgetError, UnsupportedDeviceError, Cancelled.
        """
        shape = as_size(res, size, self.config.resolution)
        request = GenerateRequest(as_prompts(prompt), shape, as_sampling(seed, sampling))
        make_task = partial(generate_task, request, self.defaults)
        return self._images(request, make_task, noise, on_event, as_token(cancel), {})

    def edit(
        self,
        image: ImageSource,
        prompt: str | Sequence[str],
        *,
        mask: ImageSource | None = None,
        outpaint: tuple[int, int, int, int] | None = None,
        fit: str | None = None,
        posterior: str | None = None,
        references: Sequence[ImageSource] | ImageSource | None = None,
        size: tuple[int, int] | None = None,
        res: int | None = None,
        seed: int | None = None,
        on_event: Callable[[Event], None] | None = None,
        cancel: CancelToken | None = None,
        noise: Sequence[Noise] | None = None,
        **sampling: Unpack[SamplingOptions],
    ) -> Result:
        """Image and instruction to image; keywords as in `generate`.

        Without a mask the picture keeps its aspect at an area of about res squared (`fit` "keep"), or is cropped to a
        square (`fit` "crop"), or has a longer side of res ("longest"); a model knows some of these, and its default is
        "keep" with UniPic 1.0 and DeepGen, "longest" with UniPic-2. Further pictures, for models that take several, are
        `references`: the result then is a square of side res unless it is given a `size` (width, height). `posterior`:
        "sample" draws a source's latents from the image's seed, "mean" takes the mean of what may be drawn; a model
        knows one or both, and its default is the way of its training.
        With `mask` (white = regenerate) or `outpaint` (left, top, right, bottom pixels) the prompt describes the whole
        picture, the size stays the source's unless `fit` is given, and unmasked pixels stay exactly as they are.
        Raises what `generate` does, and ImageError for pictures that cannot be read.
        """
        picture = open_image(image)
        request = EditRequest(
            image=picture,
            prompts=as_prompts(prompt),
            sampling=as_sampling(seed, sampling),
            res=self.config.resolution if res is None else as_plain(res),
            mask=None if mask is None else open_mask(mask, picture.size),
            outpaint=as_margins(outpaint),
            fit=fit,
            posterior=posterior,
            references=open_images(references),
            size=None if size is None else as_size(None, size, 0),
        )
        check_res(res, fit, request.masked)
        make_task = partial(edit_task, request, self.family, self.config, self.defaults, self.device, self.dtype)
        margins = request.outpaint and list(request.outpaint)
        how = {"fit": fit, "outpaint": margins, "masked": mask is not None or None}
        how |= {"references": len(request.references) or None, "posterior": posterior}
        return self._images(request, make_task, noise, on_event, as_token(cancel), how)

    @overload
    def ask(self, image: ImageSource, question: str, *, stream: Literal[True], **how: Unpack[AskOptions]) -> Stream: ...
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
        on_answer: Callable[[Answer], object] | None = None,
    ) -> Answer | list[Answer] | Stream:
        """Image and question to text: an `Answer`, or with `stream` its pieces as they come; `close()` ends them early.

        A list of questions gives a list of answers, and `on_answer` hears each at once; the picture is read only once.
        Temperature 0 is greedy.
        Where a language model was tuned to make pictures and the folder has it as it was before, that one answers.
        Raises what `edit` does, a stream UsageError also where its engine is closed before its end.
        """
        token, picture = as_token(cancel), open_image(image)
        side = self.config.resolution if res is None else res
        how = tuple(map(as_plain, (side, max_new_tokens, temperature, top_p)))
        requests = [
            AskRequest(text, *how, secrets.randbits(32) if seed is None else as_plain(seed))
            for text in as_prompts(question)
        ]
        if not requests:
            raise UsageError("no question given", "ask something")
        if stream:
            if len(requests) != 1:
                raise UsageError(f"{len(requests)} questions cannot be streamed", "stream one question at a time")
            if on_answer:
                raise UsageError("on_answer with stream", "read the stream, or leave stream out")
            answer = Stream(self._stream(picture, requests[0], token))
            self._streams.add(answer)
            return answer
        answers = self._answers(picture, requests, token, on_answer)
        return answers[0] if isinstance(question, str) else answers
