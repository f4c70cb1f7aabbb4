"""UniPic 1.0 hyper-parameters (arXiv 2508.03320), without defaults: a wrong checkpoint cannot half-work."""

from dataclasses import asdict, dataclass
from typing import Any

from ...layers.qwen2 import Qwen2Config
from ...layers.vae import VAEConfig


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
        parts = {"llm": Qwen2Config, "mar": MarConfig, "head": HeadConfig, "vae": VAEConfig}
        vae = {**data["vae"], "multipliers": tuple(data["vae"]["multipliers"])}
        return cls(**{**data, **{name: part(**(vae if name == "vae" else data[name])) for name, part in parts.items()}})
