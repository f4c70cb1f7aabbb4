"""UniPic2-SD3.5M-Kontext's hyper-parameters: three text encoders in front of DeepGen's diffusion transformer."""

from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from ....checkpoint import fields
from ....layers.vae import SD3VAEConfig
from ...deepgen import config as deepgen
from ...deepgen.config import DiTConfig


@dataclass(frozen=True)
class CLIPConfig:
    """A text encoder of CLIP (arXiv 2103.00020); `start`, `end` and `pad` are ids of its tokenizer."""

    vocab: int
    width: int
    layers: int
    heads: int
    mlp: int
    positions: int  # to which every prompt is padded or cut
    pooled: int
    quick: bool  # GELU as x sigmoid(1.702 x)
    eps: float
    start: int
    end: int
    pad: int


@dataclass(frozen=True)
class T5Config:
    """The encoder of a T5 1.1 (arXiv 1910.10683)."""

    vocab: int
    width: int
    layers: int
    heads: int
    head_dim: int
    mlp: int
    buckets: int  # of relative positions, the last for all from `distance` on
    distance: int
    eps: float
    positions: int  # to which every prompt is padded or cut
    end: int
    pad: int


@dataclass(frozen=True)
class KontextConfig:
    clip_l: CLIPConfig
    clip_g: CLIPConfig
    t5: T5Config
    dit: DiTConfig
    vae: SD3VAEConfig
    vae_scale: float
    vae_shift: float
    shift: float  # of the flow-matching schedule
    resolution: int  # default side in pixels
    rounds: int  # default denoising steps
    guidance: float
    round_inv_freq: ClassVar[None] = None  # nothing is rotary here
    repetition_penalty: ClassVar[float] = 1.0  # nothing is answered

    @property
    def image_token(self) -> int:
        """No picture stands in a prompt: the placeholder is the token behind its end."""
        return self.clip_l.end

    @property
    def eos_token(self) -> int:
        return self.clip_l.end

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "KontextConfig":
        """Raises ValueError with the value and the rule that it breaks."""
        return CHECKS.build(cls, data)


CLIPS = ("clip_l", "clip_g")
ENCODERS = (*CLIPS, "t5")
PARTS = {"clip_l": CLIPConfig, "clip_g": CLIPConfig, "t5": T5Config, "dit": DiTConfig, "vae": SD3VAEConfig}
COUNTS = {
    "vocab": 2**22,
    "width": 2**16,
    "layers": 256,
    "heads": 1024,
    "head_dim": 1024,
    "mlp": 2**20,
    "positions": 4096,
    "pooled": 2**16,
    "buckets": 4096,
    "distance": 2**16,
}
BOUNDS = deepgen.BOUNDS | {f"{name}.{field}": (1, most) for name in ENCODERS for field, most in COUNTS.items()}
BOUNDS |= {f"{name}.{field}": (0, 2**22) for name in ENCODERS for field in ("start", "end", "pad")}
BOUNDS |= {f"{name}.eps": (1e-12, 1.0) for name in ENCODERS}
RULES = (
    *(rule for rule in deepgen.RULES if rule[0].startswith(("dit.", "vae.", "resolution"))),
    *((f"{name}.width", "a multiple of", f"{name}.heads") for name in CLIPS),
    *((f"{name}.{token}", "below", f"{name}.vocab") for name in CLIPS for token in ("start", "end", "pad")),
    *((f"t5.{token}", "below", "t5.vocab") for token in ("end", "pad")),
    ("t5.buckets", "a multiple of", 4),  # half of them for either side, half of these for single positions
    ("t5.width", "equal to", "dit.text"),
    ("clip_l.width", "at most", "dit.text"),
    ("clip_g.width", "at most", "dit.text"),
    ("clip_l.positions", "equal to", "clip_g.positions"),
    ("clip_l.pooled", "below", "dit.pooled"),
    ("clip_g.pooled", "below", "dit.pooled"),
)
CHECKS = fields.Checks(
    PARTS,
    BOUNDS,
    RULES,
    lists={"vae.multipliers": (deepgen.VAE_LEVELS, deepgen.VAE_LEVELS)},
    flags=frozenset(f"{name}.quick" for name in CLIPS),
)


# The sizes of the released model.
RELEASED = KontextConfig(
    clip_l=CLIPConfig(
        49408, 768, 12, 12, 3072, positions=77, pooled=768, quick=True, eps=1e-5, start=49406, end=49407, pad=49407
    ),
    clip_g=CLIPConfig(
        49408, 1280, 32, 20, 5120, positions=77, pooled=1280, quick=False, eps=1e-5, start=49406, end=49407, pad=0
    ),
    t5=T5Config(32128, 4096, 24, 64, 64, 10240, buckets=32, distance=128, eps=1e-6, positions=256, end=1, pad=0),
    dit=deepgen.RELEASED.dit,
    vae=deepgen.RELEASED.vae,
    vae_scale=deepgen.RELEASED.vae_scale,
    vae_shift=deepgen.RELEASED.vae_shift,
    shift=deepgen.RELEASED.shift,
    resolution=512,
    rounds=50,
    guidance=3.5,
)
