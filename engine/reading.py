"""Answering questions about one picture, which is read once."""

from collections.abc import Iterator, Sequence

import torch
from PIL import Image

from .loaded import Loaded
from .noise import PhiloxNoise
from .precision import true_float32
from .prepare import ask_pixels
from .request import PATCH, AskRequest, CancelToken
from .run import Clock
from .text import decode_text


class Reader:
    """The model's view of a picture: a cache that every question continues and every answer is cut back to."""

    @torch.inference_mode()
    @true_float32()
    def __init__(self, loaded: Loaded, image: Image.Image, requests: Sequence[AskRequest], clock: Clock) -> None:
        self.family, self.model, self.tokens, self.clock = loaded.family, loaded.model, loaded.tokens, clock
        side = requests[0].res // PATCH
        room = [
            self.family.check_question(loaded.config, self.tokens, side * side, r.question, r.max_new_tokens)
            for r in requests
        ]
        self.placed = loaded.placed
        with clock.stage("condition"):
            self.placed.enter("condition")
            pixels = ask_pixels(image, requests[0].res, loaded.device, loaded.dtype)
            self.cache = self.family.look_to_answer(self.model, self.tokens, pixels, side, side, spare=max(room))

    @torch.inference_mode()
    def answer(self, request: AskRequest, cancel: CancelToken) -> Iterator[int]:
        """Token ids as they are decided."""
        config, start = self.model.config, self.cache.length
        self.clock.seconds.pop("answer", None)  # an answer's time is its own, the picture's is shared
        ids = decode_text(
            lambda ids: self.family.next_logits(self.model, self.cache, ids),
            self.family.question_ids(self.tokens, request.question),
            eos=config.eos_token,
            limit=request.max_new_tokens,
            penalty=config.repetition_penalty,
            temperature=request.temperature,
            top_p=request.top_p,
            noise=PhiloxNoise(request.seed),
        )
        try:
            while True:
                cancel.check()
                with self.clock.stage("answer"), true_float32():
                    self.placed.enter("answer")
                    token = next(ids, None)
                if token is None:
                    return
                yield token
        finally:
            self.cache.cut(start)
