"""What a model family offers the engine: the module `models/<family>/model.py`, checked against this by a test.

A family makes pictures in stages: those that `needs` names in front of `sample`, the last of which is `condition`, then
`sample` and `decode`. Each of the former is a function of that name, with the signature of `condition`, and takes what
the one before has returned; the first gets what an earlier batch of the task has left, or None.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol, Self

import torch
from PIL.Image import Image
from torch import Tensor, nn

from .layers.attention import Attention
from .task import Batch, Task
from .tokens import Tokens

Size = tuple[int, int]  # (width, height) in pixels


class Config(Protocol):
    """What the engine reads of a family's configuration, a frozen dataclass."""

    image_token: int  # id of IMAGE
    eos_token: int
    repetition_penalty: float
    resolution: int  # side in pixels of a picture of the trained area, and of one whose size is not given
    rounds: int  # steps by default
    guidance: float
    round_inv_freq: bool | None  # whether `exact_rope` has something to switch off; None: it never has


class Schedule(Protocol):
    """All steps of a batch, known before the first; `sample` yields once a step."""

    def __len__(self) -> int: ...
    def to(self, device: torch.device) -> Self: ...


class Verbs(Protocol):
    """`model` is what the family's `build` returned, filled. It has `config`, and `graphs` of its weights."""

    IMAGE: str  # the placeholder of image features in a prompt
    kinds: Sequence[str]  # what it can do, of generate, edit, inpaint, ask
    fits: Sequence[str]  # ways to fit an edit's source, of request.FITS; the first is the default
    shortcuts: Sequence[str]  # of sampling.SHORTCUTS, those it takes
    posteriors: Sequence[str]  # ways to take a source's latents, of request.POSTERIORS; the first is the default
    most_sources: int  # pictures that an edit may be given
    parts_guidance: bool  # whether `sample` heeds Batch.apart
    tuned: Sequence[str]  # parts that were changed to make pictures: a folder may hold what they were, for answers
    lookups: Mapping[str, Sequence[str]]  # stage -> tables among its parts of which it only looks up rows
    stacks: Sequence[str]  # parts whose layers run one after the other, once a pass
    repeated: Sequence[tuple[str, str]]  # (modules, method) whose cost depends on nothing but shapes; * is any number

    def build(self, config: Any, attend: Attention | None = None) -> nn.Module: ...
    def needs(self, kind: str) -> Mapping[str, Sequence[str]]:
        """Stage -> the parts that it runs, in the order of the stages; of a question look, condition and answer."""

    def speeds(self, config: Any) -> Mapping[str, Mapping[str, Any]]:
        """What a speed of sampling.SPEEDS stands for: fields of a Task, in this checkpoint's own numbers."""

    # Pictures.
    def condition(self, model: Any, tokens: Tokens, task: Task, batch: Batch, reuse: Any = None) -> Any: ...
    def schedule(self, config: Any, task: Task, batch: Batch) -> Schedule: ...
    def sample(self, model: Any, conditions: Any, task: Task, batch: Batch, schedule: Any) -> Iterator[Tensor]:
        """After every step, latents that show the picture as far as it is known; the last are the result."""

    def decode(self, model: Any, latents: Tensor, rows: int, columns: int, bands: bool = False) -> Tensor:
        """(B, H, W, 3) in about [-1, 1]."""

    def latents(self, config: Any, images: int, rows: int, columns: int) -> tuple[int, ...]:
        """The shape of what `sample` yields."""

    # Questions, of a family that has the kind: one cache with the picture, continued by a question and its answer.
    def look_to_answer(self, model: Any, pixels: Tensor) -> Any:
        """The stage `look` of a question: what the language model reads of the picture."""

    def read_image(self, model: Any, tokens: Tokens, seen: Any, spare: int = 0) -> Any:
        """The stage `condition`: a cache of it, with room for `spare` positions. It may take the memory of the last."""

    def question_ids(self, tokens: Tokens, question: str) -> list[int]: ...
    def next_logits(self, model: Any, cache: Any, ids: Sequence[int]) -> Tensor:
        """Appends ids; (vocab) float32 of what follows, which the next call may overwrite."""

    def question_size(self, config: Any, size: Size, res: int) -> Size: ...
    def question_picture(self, image: Image, size: Size) -> Image: ...
    def check_question(self, config: Any, tokens: Tokens, size: Size, question: str, limit: int) -> int: ...

    # Sizes and limits, and what is reported.
    def fitted_size(self, size: Size, fit: str, res: int) -> Size: ...
    def max_image_tokens(self, config: Any) -> int: ...
    def check_prompts(self, config: Any, tokens: Tokens, task: Task, prompts: Sequence[str]) -> None: ...
    def attention_backend(self, model: Any) -> str: ...
