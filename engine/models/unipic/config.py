"""UniPic 1.0 hyper-parameters (arXiv 2508.03320), without defaults: a wrong checkpoint cannot half-work.

`UniPicConfig.from_json` is the only door for sizes that come from a file, and checks them against the tables below.
"""

import math
import operator
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from typing import Any

from ...layers.qwen2 import Qwen2Config
from ...layers.vae import VAEConfig
from ...request import MAX_SIDE, PATCH

VAE_LEVELS = int(math.log2(PATCH)) + 1  # each but the last halves the sides


@dataclass(frozen=True)
class MarConfig:
    """The masked autoregressive encoder and decoder."""

    width: int
    heads: int
    encoder_depth: int
    decoder_depth: int
    mlp: int
    buffer: int  # rows in front of the image tokens
    grid: int  # side of the trained position grid, in tokens
    channels: int  # of a latent token


@dataclass(frozen=True)
class HeadConfig:
    """The diffusion head and its sampler (arXiv 2406.11838)."""

    width: int
    depth: int
    condition: int  # width of z
    channels: int
    frequencies: int  # width of the timestep sinusoid
    train_steps: int
    steps: int  # after respacing
    max_beta: float


@dataclass(frozen=True)
class UniPicConfig:
    llm: Qwen2Config
    mar: MarConfig
    head: HeadConfig
    vae: VAEConfig
    vae_scale: float
    image_token: int  # id of `<image>`
    eos_token: int
    repetition_penalty: float
    round_inv_freq: bool  # round rotary frequencies to bfloat16 in bfloat16, as the released scripts do
    resolution: int  # default side in pixels
    rounds: int
    guidance: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "UniPicConfig":
        """Raises ValueError with the value and the rule that it breaks."""
        config = _built(cls, data, "")
        for path, rule, other in RULES:
            left, right = _at(config, path), other if type(other) is int else _at(config, str(other))
            if not _HOLDS[rule](left, right):
                raise ValueError(
                    f"{path} is {left}, which is not {rule} {'' if right == other else f'{other}, '}{right}"
                )
        return config


PARTS = {"llm": Qwen2Config, "mar": MarConfig, "head": HeadConfig, "vae": VAEConfig}
# Smallest and largest value that anybody could mean; where they are floats, whole numbers are fine too.
BOUNDS: dict[str, tuple[float, float]] = {
    "llm.vocab": (1, 2**22),
    "llm.width": (1, 2**16),
    "llm.layers": (1, 256),
    "llm.heads": (1, 1024),
    "llm.kv_heads": (1, 1024),
    "llm.head_dim": (2, 1024),
    "llm.mlp": (1, 2**20),
    "llm.rope_theta": (1.0, 1e12),
    "llm.norm_eps": (1e-12, 1.0),
    "llm.max_positions": (1, 2**24),
    "mar.width": (1, 2**16),
    "mar.heads": (1, 1024),
    "mar.encoder_depth": (1, 256),
    "mar.decoder_depth": (1, 256),
    "mar.mlp": (1, 2**20),
    "mar.buffer": (1, 4096),
    "mar.grid": (1, 1024),
    "mar.channels": (1, 1024),
    "head.width": (1, 2**16),
    "head.depth": (1, 256),
    "head.condition": (1, 2**16),
    "head.channels": (1, 1024),
    "head.frequencies": (2, 2**16),
    "head.train_steps": (1, 10**4),
    "head.steps": (1, 10**4),
    "head.max_beta": (1e-4, 0.999),
    "vae.base": (1, 4096),
    "vae.multipliers": (1, 64),  # each of them
    "vae.latent": (1, 1024),
    "vae.groups": (1, 1024),
    "vae_scale": (1e-6, 1e6),
    "image_token": (0, 2**22),
    "eos_token": (0, 2**22),
    "repetition_penalty": (0.01, 100.0),
    "resolution": (PATCH, MAX_SIDE),
    "rounds": (1, 10**4),
    "guidance": (0.0, 1000.0),
}
# What must hold between two of them, or between one and a constant; `x` multiplies.
RULES: tuple[tuple[str, str, str | int], ...] = (
    ("llm.width", "equal to", "llm.heads x llm.head_dim"),
    ("llm.heads", "a multiple of", "llm.kv_heads"),
    ("llm.head_dim", "a multiple of", 2),
    ("mar.width", "a multiple of", "mar.heads"),
    ("head.condition", "equal to", "mar.width"),
    ("head.channels", "equal to", "mar.channels"),
    ("head.frequencies", "a multiple of", 2),
    ("head.steps", "at most", "head.train_steps"),
    ("vae.latent", "equal to", "mar.channels"),
    ("vae.base", "a multiple of", "vae.groups"),
    ("image_token", "below", "llm.vocab"),
    ("eos_token", "below", "llm.vocab"),
    ("resolution", "a multiple of", PATCH),
)
_HOLDS: dict[str, Callable[[int, int], bool]] = {
    "equal to": operator.eq,
    "a multiple of": lambda a, b: a % b == 0,
    "at most": operator.le,
    "below": operator.lt,
}


def number(path: str, value: object) -> Any:
    """`value`, once it is a number that the field `path` can have. Raises ValueError."""
    low, high = BOUNDS[path]
    kind, kinds = ("a number", (int, float)) if type(low) is float else ("a whole number", (int,))
    if type(value) not in kinds or not low <= value <= high:
        raise ValueError(f"{path} is {value!r:.80}, which is not {kind} from {low} to {high}")
    return type(low)(value)


def _built(kind: type, data: object, path: str) -> Any:
    """The dataclass `kind` from a JSON object of exactly its fields."""
    names = [field.name for field in fields(kind)]
    if type(data) is not dict or set(data) != set(names):
        given = sorted(map(str, data)) if type(data) is dict else data
        raise ValueError(f"{path.rstrip('.') or 'config'} has {given!r:.200}, which are not the fields {names}")
    return kind(**{name: _value(path + name, data[name]) for name in names})


def _value(path: str, value: Any) -> Any:
    if path in PARTS:
        return _built(PARTS[path], value, f"{path}.")
    if path == "vae.multipliers":
        if type(value) not in (list, tuple) or len(value) != VAE_LEVELS:
            raise ValueError(f"{path} is {value!r:.80}, which is not a list of {VAE_LEVELS} numbers")
        return tuple(number(path, each) for each in value)
    if path == "round_inv_freq":
        if type(value) is not bool:
            raise ValueError(f"{path} is {value!r:.80}, which is not true or false")
        return value
    return number(path, value)


def _at(config: UniPicConfig, path: str) -> int:
    """The field `path`, or the product of several."""
    return math.prod(operator.attrgetter(factor)(config) for factor in path.split(" x "))


# The sizes of the released UniPic 1.0 (arXiv 2508.03320).
RELEASED = UniPicConfig(
    llm=Qwen2Config(151936, 1536, 28, 12, 2, 128, 8960, rope_theta=1e6, norm_eps=1e-6, max_positions=32768),
    mar=MarConfig(1280, 16, encoder_depth=20, decoder_depth=20, mlp=5120, buffer=64, grid=32, channels=16),
    head=HeadConfig(1536, 12, condition=1280, channels=16, frequencies=256, train_steps=1000, steps=100, max_beta=0.2),
    vae=VAEConfig(128, (1, 1, 2, 2, 4), latent=16, groups=32),
    vae_scale=0.2325,
    image_token=151665,
    eos_token=151645,
    repetition_penalty=1.1,
    round_inv_freq=True,
    resolution=1024,
    rounds=32,
    guidance=3.0,
)
