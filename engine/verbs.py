"""What a model family offers the engine: the module `models/<family>/model.py`, checked against this by a test."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor, nn

from .layers.attention import Attention
from .schedules import Rounds
from .task import Batch, Task
from .tokens import Tokens


class Verbs(Protocol):
    """`config` is the family's configuration, `model` what its `build` returned, filled."""

    IMAGE: str  # the placeholder of image features in a prompt
    needs: Mapping[str, Sequence[str]]  # stage -> the parts of the model it runs
    lookups: Mapping[str, Sequence[str]]  # stage -> tables among them of which it only looks up rows
    stacks: Sequence[str]  # parts whose layers run one after the other, once a pass
    repeated: Sequence[tuple[str, str]]  # (modules, method) whose cost depends on nothing but shapes; * is any number

    def build(self, config: Any, attend: Attention | None = None) -> nn.Module: ...

    # Pictures.
    def condition(self, model: Any, tokens: Tokens, task: Task, batch: Batch, reuse: Any = None) -> Any: ...
    def sample(self, model: Any, conditions: Any, task: Task, batch: Batch, rounds: Rounds) -> Iterator[Tensor]: ...
    def decode(self, model: Any, tokens: Tensor, rows: int, columns: int, bands: bool = False) -> Tensor: ...

    # Questions: one cache that holds the picture, continued by a question and its answer.
    def look_to_answer(
        self, model: Any, tokens: Tokens, pixels: Tensor, rows: int, columns: int, spare: int
    ) -> Any: ...
    def question_ids(self, tokens: Tokens, question: str) -> list[int]: ...
    def next_logits(self, model: Any, cache: Any, ids: Sequence[int]) -> Tensor: ...

    # Limits, and what is reported.
    def max_image_tokens(self, config: Any) -> int: ...
    def check_prompts(self, config: Any, tokens: Tokens, task: Task, prompts: Sequence[str]) -> None: ...
    def check_question(self, config: Any, tokens: Tokens, picture: int, question: str, limit: int) -> int: ...
    def attention_backend(self, model: Any) -> str: ...
