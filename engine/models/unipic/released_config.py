"""The configuration and the tokenizer of a released UniPic 1.0 folder.

Sizes come from tensor shapes and from the language model's config.json. What shapes cannot tell is RELEASED below, or
a `tiny_config.json` beside the weights. (Released configuration of arXiv 2508.03320.)
"""

import json
import math
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from ...errors import CorruptWeightsError
from ...layers.qwen2 import Qwen2Config
from ...layers.vae import VAEConfig
from . import keys
from .config import HeadConfig, MarConfig, UniPicConfig

SIZES = "tiny_config.json"
RELEASED = {"mar_heads": 16, "buffer": 64, "steps": 100, "vae_scale": 0.2325, "img_size": 1024}
BLOCKS = {"encoder": "mar.encoder_blocks.", "decoder": "mar.decoder_blocks.", "head": "mar.diffloss.net.res_blocks."}
MAX_JSON = 64 * 2**20
_AGAIN = "download the checkpoint again"


def read_config(
    folder: Path, llm_folder: Path, shape: dict[str, tuple[int, ...]], image_token: int, eos_token: int
) -> UniPicConfig:
    """The model's configuration; `shape` maps released names (the VAE's under `vae.`) to tensor shapes."""
    extra = RELEASED | (read_json(folder / SIZES) if (folder / SIZES).is_file() else {})
    qwen = read_json(llm_folder / "config.json")
    generation = llm_folder / "generation_config.json"
    sampling = {"repetition_penalty": 1.0} | (read_json(generation) if generation.is_file() else {})
    heads = read_number(qwen, "num_attention_heads", 1, 1024)
    depth = {stack: keys.depth(shape, prefix) for stack, prefix in BLOCKS.items()}
    vocab, width = shape["llm.model.embed_tokens.weight"]
    channels = shape["mar.z_proj.weight"][1]
    mar_width, mar_heads = shape["mar.z_proj.weight"][0], read_number(extra, "mar_heads", 1, 1024)
    if width % heads or mar_width % mar_heads:
        raise ValueError(f"widths {width}, {mar_width} are no multiples of {heads}, {mar_heads} heads")
    resolution = read_number(extra, "img_size", 16, 16384)
    if resolution % 16:
        raise ValueError(f"img_size {resolution} is no multiple of 16")
    base = shape["vae.encoder.conv_in.weight"][0]
    levels = keys.depth(shape, "vae.encoder.down.")
    multipliers = [shape[f"vae.encoder.down.{level}.block.0.conv1.weight"][0] // base for level in range(levels)]
    return UniPicConfig(
        llm=Qwen2Config(
            vocab=vocab,
            width=width,
            layers=read_number(qwen, "num_hidden_layers", 1, 256),
            heads=heads,
            kv_heads=read_number(qwen, "num_key_value_heads", 1, 1024),
            head_dim=width // heads,
            mlp=shape["llm.model.layers.0.mlp.gate_proj.weight"][0],
            rope_theta=read_number(qwen, "rope_theta", 1.0, 1e12),
            norm_eps=read_number(qwen, "rms_norm_eps", 0.0, 1.0),
            max_positions=read_number(qwen, "max_position_embeddings", 1, 2**24),
        ),
        mar=MarConfig(
            width=mar_width,
            heads=mar_heads,
            encoder_depth=depth["encoder"],
            decoder_depth=depth["decoder"],
            mlp=shape["mar.encoder_blocks.0.mlp.fc1.weight"][0],
            buffer=read_number(extra, "buffer", 1, 4096),
            grid=math.isqrt(shape["mar.diffusion_pos_embed_learned"][1]),
            channels=channels,
        ),
        head=HeadConfig(
            width=shape["mar.diffloss.net.input_proj.weight"][0],
            depth=depth["head"],
            condition=shape["mar.diffloss.net.cond_embed.weight"][1],
            channels=channels,
            frequencies=shape["mar.diffloss.net.time_embed.mlp.0.weight"][1],
            train_steps=1000,
            steps=read_number(extra, "steps", 1, 1000),
            max_beta=0.2,
        ),
        vae=VAEConfig(base=base, multipliers=tuple(multipliers), latent=shape["vae.post_quant_conv.weight"][0]),
        vae_scale=read_number(extra, "vae_scale", 1e-6, 1e6),
        image_token=image_token,
        eos_token=eos_token,
        repetition_penalty=read_number(sampling, "repetition_penalty", 0.01, 100.0),
        round_inv_freq=True,
        resolution=resolution,
        rounds=32,
        guidance=3.0,
    )


def read_number(data: dict[str, Any], name: str, low: Any, high: Any) -> Any:
    """`data[name]`, of the type of `low` and between the bounds: a size nobody could mean must not be built."""
    value = data.get(name)
    kinds = (int, float) if type(low) is float else (int,)
    if type(value) not in kinds or not low <= value <= high:
        raise CorruptWeightsError(f"{name} is {str(value)[:80]}, not a number from {low} to {high}", _AGAIN)
    return type(low)(value)


def read_tokenizer(path: Path) -> tuple[str, int, int]:
    """(tokenizer JSON with `<image>` added, id of `<image>`: the first free one, id of `<|im_end|>`)."""
    try:
        tokenizer = Tokenizer.from_str(_text(path))
        tokenizer.add_special_tokens(["<image>"])
        image, eos = tokenizer.token_to_id("<image>"), tokenizer.token_to_id("<|im_end|>")
    except CorruptWeightsError:
        raise
    except Exception as error:  # the library raises bare Exception for a bad file
        raise CorruptWeightsError(f"{path} is not a tokenizer ({str(error)[:200]})", _AGAIN) from None
    if image is None or eos is None:
        raise CorruptWeightsError(f"{path} knows no <|im_end|>", _AGAIN)
    return tokenizer.to_str(), image, eos


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of bounded size. Raises CorruptWeightsError."""
    try:
        data = json.loads(_text(path))
    except (ValueError, RecursionError) as error:
        raise CorruptWeightsError(f"{path} is not JSON ({error})", _AGAIN) from None
    if not isinstance(data, dict):
        raise CorruptWeightsError(f"{path} is not a JSON object", _AGAIN)
    return data


def _text(path: Path) -> str:
    if path.stat().st_size > MAX_JSON:
        raise CorruptWeightsError(f"{path} has {path.stat().st_size} bytes, more than {MAX_JSON}", _AGAIN)
    try:
        return path.read_text(encoding="utf-8")
    except ValueError:
        raise CorruptWeightsError(f"{path} is not UTF-8 text", _AGAIN) from None
