"""The sizes of the pocket model: UniPic 1.0 in small, on a stride-16 autoencoder, 8x8 tokens at 128x128."""

from ..engine.layers.qwen2 import Qwen2Config
from ..engine.layers.vae import VAEConfig
from ..engine.models.unipic.config import HeadConfig, MarConfig, UniPicConfig
from .scenes import SIDE

STRIDE = 16
GRID = SIDE // STRIDE
# Few channels where the picture is large, for speed on a CPU. Groups of several channels: a group of one would lose the
# channel's mean in the decoder's last GroupNorm, which is where the colour of a plain background would be.
VAE = VAEConfig(base=8, multipliers=(1, 2, 4, 8, 12), latent=16, groups=2)
WIDTH = 192


def pocket_config(vocab: int, image_token: int, eos_token: int, vae_scale: float) -> UniPicConfig:
    """Rounds, head steps and guidance are the defaults of a request that names none."""
    return UniPicConfig(
        llm=Qwen2Config(
            vocab,
            WIDTH,
            layers=6,
            heads=6,
            kv_heads=2,
            head_dim=32,
            mlp=512,
            rope_theta=1e4,
            norm_eps=1e-6,
            max_positions=4096,
        ),
        mar=MarConfig(
            WIDTH, heads=6, encoder_depth=3, decoder_depth=4, mlp=768, buffer=16, grid=GRID, channels=VAE.latent
        ),
        head=HeadConfig(
            256,
            depth=3,
            condition=WIDTH,
            channels=VAE.latent,
            frequencies=128,
            train_steps=1000,
            steps=50,
            max_beta=0.2,
        ),
        vae=VAE,
        vae_scale=vae_scale,
        image_token=image_token,
        eos_token=eos_token,
        repetition_penalty=1.0,
        round_inv_freq=False,
        resolution=SIDE,
        rounds=16,
        guidance=2.0,
    )
