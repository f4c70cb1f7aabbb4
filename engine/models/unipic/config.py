"""UniPic 1.0 hyper-parameters (arXiv 2508.03320), without defaults: a wrong checkpoint cannot half-work.

`UniPicConfig.from_json` is the only door for sizes that come from a file, and checks them against the tables below.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any

from ...checkpoint import fields
from ...checks import PATCH
from ...layers.qwen2 import Qwen2Config
from ...layers.vae import VAEConfig

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
        return CHECKS.build(cls, data)


PARTS = {"llm": Qwen2Config, "mar": MarConfig, "head": HeadConfig, "vae": VAEConfig}
BOUNDS = fields.BOUNDS | {
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
}
RULES = (
    *fields.RULES,
    ("mar.width", "a multiple of", "mar.heads"),
    ("head.condition", "equal to", "mar.width"),
    ("head.channels", "equal to", "mar.channels"),
    ("head.frequencies", "a multiple of", 2),
    ("head.steps", "at most", "head.train_steps"),
    ("vae.latent", "equal to", "mar.channels"),
)
CHECKS = fields.Checks(
    PARTS, BOUNDS, RULES, lists={"vae.multipliers": (VAE_LEVELS, VAE_LEVELS)}, flags=frozenset({"round_inv_freq"})
)

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
