"""DeepGen 1.0 hyper-parameters, without defaults: a wrong checkpoint cannot half-work.

Qwen2.5-VL (arXiv 2502.13923) reads the prompt, a connector turns its hidden states into conditions, and a multimodal
diffusion transformer (MMDiT, arXiv 2403.03206) denoises. `DeepGenConfig.from_json` is the only door for sizes that come
from a file, and checks them against the tables below.
"""

from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from ...checkpoint import fields
from ...checks import PATCH
from ...layers.qwen2 import Qwen2Config
from ...layers.vae import SD3VAEConfig

ALIGNED = 16  # an MLP's columns are a multiple of it, or rows of a weight would not be aligned in memory
VAE_LEVELS = 4  # each but the last halves the sides


@dataclass(frozen=True)
class VisionConfig:
    """The vision tower and the merger behind it."""

    width: int
    depth: int
    heads: int
    mlp: int  # padded with zeros, which stay zeros: 3420 of the released model
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
    mlp: int  # padded with zeros, which stay zeros: 11946 of the released model
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
    vae: SD3VAEConfig
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
    round_inv_freq: ClassVar[None] = None  # rotary frequencies always stay in float32

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "DeepGenConfig":
        """Raises ValueError with the value and the rule that it breaks."""
        return CHECKS.build(cls, data)


PARTS = {
    "llm": Qwen2Config,
    "vision": VisionConfig,
    "connector": ConnectorConfig,
    "dit": DiTConfig,
    "vae": SD3VAEConfig,
}
BOUNDS = fields.BOUNDS | {
    "mrope": (1, 512),  # each of them
    "vision.width": (1, 2**16),
    "vision.depth": (1, 256),
    "vision.heads": (1, 1024),
    "vision.mlp": (1, 2**20),
    "vision.patch": (1, 256),
    "vision.temporal": (1, 16),
    "vision.merge": (1, 16),
    "vision.window": (1, 4096),
    "vision.full": (0, 255),  # each of them
    "vision.out": (1, 2**16),
    "vision.eps": (1e-12, 1.0),
    "connector.width": (1, 2**16),
    "connector.depth": (1, 256),
    "connector.heads": (1, 1024),
    "connector.mlp": (1, 2**20),
    "connector.queries": (1, 4096),
    "connector.taps": (0, 64),
    "connector.pooled": (1, 2**16),
    "connector.text": (1, 2**16),
    "connector.norm_eps": (1e-12, 1.0),
    "dit.depth": (1, 256),
    "dit.heads": (1, 1024),
    "dit.head_dim": (2, 1024),
    "dit.dual": (0, 256),
    "dit.patch": (1, 16),
    "dit.channels": (1, 1024),
    "dit.text": (1, 2**16),
    "dit.pooled": (1, 2**16),
    "dit.table": (1, 1024),
    "dit.frequencies": (2, 2**16),
    "dit.mlp": (1, 2**20),
    "vae.blocks": (1, 16),
    "vae_shift": (-1e6, 1e6),
    "shift": (1e-3, 1e3),
    "pad_token": (0, 2**22),
    "vision_start": (0, 2**22),
    "vision_end": (0, 2**22),
}
RULES = (
    *fields.RULES,
    ("llm.head_dim", "twice the sum of", "mrope"),
    ("vision.width", "a multiple of", "vision.heads x 4"),  # sine and cosine, of a row and of a column
    ("vision.mlp", "a multiple of", ALIGNED),
    ("vision.patch", "equal to", 14),
    ("vision.temporal", "equal to", 2),
    ("vision.merge", "equal to", 2),
    ("vision.window", "a multiple of", "vision.patch x vision.merge"),
    ("vision.full", "below", "vision.depth"),
    ("vision.out", "equal to", "llm.width"),
    ("connector.width", "a multiple of", "connector.heads"),
    ("connector.mlp", "a multiple of", ALIGNED),
    ("connector.taps", "at most", "llm.layers"),
    ("connector.pooled", "equal to", "dit.pooled"),
    ("connector.text", "equal to", "dit.text"),
    ("dit.dual", "at most", "dit.depth"),
    ("dit.patch", "equal to", PATCH >> (VAE_LEVELS - 1)),
    ("dit.channels", "equal to", "vae.latent"),
    ("dit.frequencies", "a multiple of", 2),
    ("pad_token", "below", "llm.vocab"),
    ("vision_start", "below", "llm.vocab"),
    ("vision_end", "below", "llm.vocab"),
)
CHECKS = fields.Checks(
    PARTS, BOUNDS, RULES, lists={"mrope": (3, 3), "vision.full": (0, 256), "vae.multipliers": (VAE_LEVELS, VAE_LEVELS)}
)


# The sizes of the released DeepGen 1.0.
RELEASED = DeepGenConfig(
    llm=Qwen2Config(151936, 2048, 36, 16, 2, 128, 11008, rope_theta=1e6, norm_eps=1e-6, max_positions=128000),
    mrope=(16, 24, 24),
    vision=VisionConfig(
        width=1280,
        depth=32,
        heads=16,
        mlp=3456,
        patch=14,
        temporal=2,
        merge=2,
        window=112,
        full=(7, 15, 23, 31),
        out=2048,
        eps=1e-6,
    ),
    connector=ConnectorConfig(
        width=2048, depth=6, heads=32, mlp=12032, queries=128, taps=6, pooled=2048, text=4096, norm_eps=1e-6
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
    vae=SD3VAEConfig(128, (1, 2, 4, 4), latent=16, groups=32, blocks=2),
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
