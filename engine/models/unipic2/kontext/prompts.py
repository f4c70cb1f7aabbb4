"""Prompts of UniPic2-SD3.5M-Kontext, which are used as typed, and their tokens: every encoder has its own tokenizer."""

from collections.abc import Sequence

from ....task import Task
from ....tokens import Tokens
from ...deepgen.prompts import avoided
from .config import CLIPConfig, KontextConfig, T5Config

IMAGE = "<|endoftext|>"  # no picture stands in a prompt: see KontextConfig.image_token
TOKENIZERS = {"clip_l": "", "clip_g": "2", "t5": "3"}  # as engine/tokens.py numbers them


def texts_of(task: Task, prompts: Sequence[str]) -> list[tuple[str, str]]:
    """Of each picture its prompt, and what is to be avoided."""
    return [(prompt, avoided(task)) for prompt in prompts]


def ids_of(tokens: Tokens, config: KontextConfig, encoder: str, text: str) -> list[int]:
    """As many as the encoder has positions: what is too long loses its end, what is shorter is padded."""
    how: CLIPConfig | T5Config = getattr(config, encoder)
    first = [how.start] if isinstance(how, CLIPConfig) else []
    ids = tokens.encode(text, TOKENIZERS[encoder])[: how.positions - len(first) - 1]
    ids = [*first, *ids, how.end]
    return ids + [how.pad] * (how.positions - len(ids))
