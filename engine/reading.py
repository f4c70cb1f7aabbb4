"""Answering questions about one picture, which is read once."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

import torch
from PIL import Image

from .device import memory_peak, out_of_memory
from .errors import BudgetError, UnipicWarning
from .making import tell_caller
from .noise import PhiloxNoise
from .outcome import Answer, CancelToken
from .picture import to_pixels
from .precision import true_float32
from .request import AskRequest
from .room import Room
from .run import Clock
from .text import decode_text


class Reader:
    """The model's view of a picture: a cache that every question continues and every answer is cut back to."""

    def __init__(self, room: Room, image: Image.Image, requests: Sequence[AskRequest], clock: Clock) -> None:
        """Raises UsageError for questions that are too long."""
        loaded = room.loaded
        self.size = loaded.family.question_size(loaded.config, image.size, requests[0].res)
        self.family, self.model, self.tokens = loaded.family, loaded.model, loaded.tokens
        self.room, self.image, self.clock, self.cache = room, image, clock, None
        self.spare = max(
            self.family.check_question(loaded.config, self.tokens, self.size, r.question, r.max_new_tokens)
            for r in requests
        )

    def answer(self, request: AskRequest, cancel: CancelToken) -> Iterator[int]:
        """Token ids as they are decided.

        Where memory runs out, the picture is read again in less of it, and the answer goes on behind what was given.
        """
        given: list[int] = []
        self.clock.forget("answer")  # an answer's time is its own, the picture's is shared
        while True:
            try:
                with out_of_memory("answering"):
                    for token in self._ids(request, cancel, tuple(given)):
                        given.append(token)
                        yield token
                self.clock.say()
                if request.cuts(given):
                    what = f"the answer to {request.question[:60]!r} was cut at {len(given)} tokens"
                    warnings.warn(f"{what}: raise --max-new-tokens (max_new_tokens)", UnipicWarning, stacklevel=1)
                return
            except BudgetError as error:
                self.cache = None
                if not self.room.shrink(error):
                    raise

    @torch.inference_mode()
    def _ids(self, request: AskRequest, cancel: CancelToken, given: tuple[int, ...]) -> Iterator[int]:
        """Those behind the ones that were given, which the model reads again one by one as when it chose them."""
        if self.cache is None:
            cancel.check()
            self._look(cancel)
        config, start = self.model.config, self.cache.length
        ids = decode_text(
            lambda ids: self.family.next_logits(self.model, self.cache, ids),
            self.family.question_ids(self.tokens, request.question),
            eos=config.eos_token,
            limit=request.max_new_tokens,
            penalty=config.repetition_penalty,
            temperature=request.temperature,
            top_p=request.top_p,
            noise=PhiloxNoise(request.seed),
            given=given,
        )
        done = 0
        try:
            while True:
                cancel.check()
                with self.clock.stage("answer"), true_float32():
                    self.room.loaded.placed.enter("answer")
                    token = next(ids, None)
                if token is None:
                    return
                done += 1
                if done > len(given):
                    yield token
        finally:
            self.cache.cut(start)

    @true_float32()
    def _look(self, cancel: CancelToken) -> None:
        loaded = self.room.loaded
        with self.clock.stage("look"):
            loaded.placed.enter("look")
            picture = self.family.question_picture(self.image, self.size)
            pixels = to_pixels(picture, loaded.dtype, cast_first=True).to(loaded.device)
            seen = self.family.look_to_answer(self.model, pixels)
        cancel.check()
        with self.clock.stage("condition"):
            loaded.placed.enter("condition")
            self.cache = self.family.read_image(self.model, self.tokens, seen, spare=self.spare)


def answer_all(
    reader: Reader,
    requests: Sequence[AskRequest],
    cancel: CancelToken,
    describe: Callable[..., dict[str, Any]],
    on_answer: Callable[[Answer], object] | None = None,
) -> list[Answer]:
    """`describe(task, **settings)` makes what an answer tells of its settings; `on_answer` hears each at once."""
    clock, answers = reader.clock, []
    for request in requests:
        ids = tuple(reader.answer(request, cancel))
        settings = describe("ask", **asdict(request))
        answers.append(
            Answer(
                text=reader.tokens.decode(ids),
                ids=ids,
                cut=request.cuts(ids),
                settings=settings,
                timings=clock.seconds,
                peak_bytes=memory_peak(clock.device),
                attention=settings["attention"],
            )
        )
        if on_answer:
            tell_caller(on_answer, answers[-1])
    return answers
