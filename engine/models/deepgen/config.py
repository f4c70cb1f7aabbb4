"""DeepGen 1.0 hyper-parameters, without defaults: a wrong checkpoint cannot half-work.

Qwen2.5-VL (arXiv 2502.13923) reads the prompt, a connector turns its hidden states into conditions, and a multimodal
diffusion transformer (MMDiT, arXiv 2403.03206) denoises. `DeepGenConfig.from_json` is the only door for sizes that come
from a file, and checks them against the tables below.
"""

from dataclasses import asdict, dataclass
from typing import Any

from ...layers.qwen2 import Qwen2Config
from ...layers.vae import VAEConfig


@dataclass(frozen=True)
class VisionConfig:
    """The vision tower and the merger behind it."""

    width: int
    depth: int
    heads: int
    mlp: int
    patch: int  # side in pixels
    temporal: int  # frames a patch; a picture fills them with copies
    merge: int  # side of the square of patches that becomes one token
    window: int  # side in pixels
    full: tuple[int, ...]  # blocks that attend to the whole picture, not only inside a window
    out: int  # width of a token
    eps: float


@dataclass(frozen=True)
class ConnectorConfig:
    """Queries behind the prompt, and the encoder of the language model's hidden states."""

    width: int
    depth: int
    heads: int
    mlp: int  # a multiple of 16: padded with zeros, which GELU keeps
    queries: int
    taps: int  # hidden states side by side; 0: the last one, after the final norm, at the queries only
    pooled: int
    text: int
    norm_eps: float


@dataclass(frozen=True)
class DiTConfig:
    depth: int
    heads: int
    head_dim: int
    dual: int  # blocks, the first ones, in which the image also attends to itself alone
    patch: int  # side in latent cells
    channels: int  # of a latent cell
    text: int  # width of the text stream's input
    pooled: int
    table: int  # side of the position table, in tokens
    frequencies: int  # width of the timestep sinusoid
    mlp: int


@dataclass(frozen=True)
class DeepGenConfig:
    llm: Qwen2Config
    mrope: tuple[int, int, int]  # rotary frequencies that turn by the frame, the row and the column
    vision: VisionConfig
    connector: ConnectorConfig
    dit: DiTConfig
    vae: VAEConfig
    vae_scale: float
    vae_shift: float
    shift: float  # of the flow-matching schedule
    image_token: int  # ids of <|image_pad|>, <|endoftext|>, <|im_end|>, <|vision_start|>, <|vision_end|>
    pad_token: int
    eos_token: int
    vision_start: int
    vision_end: int
    repetition_penalty: float
    resolution: int  # default side in pixels
    rounds: int  # default denoising steps
    guidance: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


# The sizes of the released DeepGen 1.0.
RELEASED = DeepGenConfig(
    llm=Qwen2Config(151936, 2048, 36, 16, 2, 128, 11008, rope_theta=1e6, norm_eps=1e-6, max_positions=128000),
    mrope=(16, 24, 24),
    vision=VisionConfig(
        width=1280,
        depth=32,
        heads=16,
        mlp=3420,
        patch=14,
        temporal=2,
        merge=2,
        window=112,
        full=(7, 15, 23, 31),
        out=2048,
        eps=1e-6,
    ),
    connector=ConnectorConfig(
        width=2048, depth=6, heads=32, mlp=11952, queries=128, taps=6, pooled=2048, text=4096, norm_eps=1e-6
    ),
    dit=DiTConfig(
        depth=24,
        heads=24,
        head_dim=64,
        dual=13,
        patch=2,
        channels=16,
        text=4096,
        pooled=2048,
        table=128,
        frequencies=256,
        mlp=6144,
    ),
    vae=VAEConfig(128, (1, 2, 4, 4), latent=16, groups=32),
    vae_scale=1.5305,
    vae_shift=0.0609,
    shift=3.0,
    image_token=151655,
    pad_token=151643,
    eos_token=151645,
    vision_start=151652,
    vision_end=151653,
    repetition_penalty=1.05,
    resolution=512,
    rounds=50,
    guidance=4.0,
)
