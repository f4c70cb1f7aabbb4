"""The sizes of the released UniPic2-MetaQuery. It has DeepGen's hyper-parameters; no layers are tapped."""

from dataclasses import replace

from ....layers.qwen2 import Qwen2Config
from ...deepgen import config as deepgen
from ...deepgen.config import ConnectorConfig, DeepGenConfig

GUIDANCE = 3.5
RELEASED = replace(
    deepgen.RELEASED,
    llm=Qwen2Config(152064, 3584, 28, 28, 4, 128, 18944, rope_theta=1e6, norm_eps=1e-6, max_positions=128000),
    vision=replace(deepgen.RELEASED.vision, out=3584),
    connector=ConnectorConfig(
        width=1536, depth=24, heads=24, mlp=8960, queries=256, taps=0, pooled=2048, text=4096, norm_eps=1e-6
    ),
    guidance=GUIDANCE,
)

__all__ = ["GUIDANCE", "RELEASED", "DeepGenConfig"]
