"""The configuration and the tokenizer of a released UniPic 1.0 folder.

Sizes come from tensor shapes and from the language model's config.json. What shapes cannot tell is RELEASED below, or
a `tiny_config.json` beside the weights. (Released configuration of arXiv 2508.03320.)
"""

import math
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from ...checkpoint.json_files import DOWNLOAD_AGAIN, read_json, read_text
from ...errors import CorruptWeightsError
from . import keys
from .config import CHECKS, VAE_LEVELS, UniPicConfig

SIZES = "tiny_config.json"
RELEASED = {"mar_heads": 16, "buffer": 64, "steps": 100, "vae_scale": 0.2325, "img_size": 1024}
VAE_GROUPS = 32
VAE_WIDTHS = [f"vae.encoder.down.{level}.block.0.conv1.weight" for level in range(VAE_LEVELS)]
Shapes = dict[str, tuple[int, ...]]


def read_config(folder: Path, llm_folder: Path, shape: Shapes, image_token: int, eos_token: int) -> UniPicConfig:
    """The model's configuration; `shape` maps released names (the VAE's under `vae.`) to tensor shapes.

    Raises ValueError, or KeyError, IndexError and TypeError where a tensor is missing or has too few dimensions.
    """
    extra = RELEASED | (read_json(folder / SIZES) if (folder / SIZES).is_file() else {})
    qwen = read_json(llm_folder / "config.json")
    generation = llm_folder / "generation_config.json"
    sampling = {"repetition_penalty": 1.0} | (read_json(generation) if generation.is_file() else {})
    return UniPicConfig.from_json(
        {
            "llm": _llm(qwen, shape),
            "mar": _mar(extra, shape),
            "head": _head(extra, shape),
            "vae": _vae(shape),
            "vae_scale": extra["vae_scale"],
            "image_token": image_token,
            "eos_token": eos_token,
            "repetition_penalty": sampling["repetition_penalty"],
            "round_inv_freq": True,
            "resolution": extra["img_size"],
            "rounds": 32,
            "guidance": 3.0,
        }
    )


def read_layers(llm_folder: Path) -> int:
    """How many layers the language model has. Raises ValueError."""
    return CHECKS.number("llm.layers", read_json(llm_folder / "config.json").get("num_hidden_layers"))


def _llm(qwen: dict[str, Any], shape: Shapes) -> dict[str, Any]:
    vocab, width = shape["llm.model.embed_tokens.weight"]
    heads = CHECKS.number("llm.heads", qwen.get("num_attention_heads"))
    return {
        "vocab": vocab,
        "width": width,
        "layers": qwen.get("num_hidden_layers"),
        "heads": heads,
        "kv_heads": qwen.get("num_key_value_heads"),
        "head_dim": width // heads,
        "mlp": shape["llm.model.layers.0.mlp.gate_proj.weight"][0],
        "rope_theta": qwen.get("rope_theta"),
        "norm_eps": qwen.get("rms_norm_eps"),
        "max_positions": qwen.get("max_position_embeddings"),
    }


def _mar(extra: dict[str, Any], shape: Shapes) -> dict[str, Any]:
    width, channels = shape["mar.z_proj.weight"]
    return {
        "width": width,
        "heads": extra["mar_heads"],
        "encoder_depth": keys.depth(shape, "encoder"),
        "decoder_depth": keys.depth(shape, "decoder"),
        "mlp": shape["mar.encoder_blocks.0.mlp.fc1.weight"][0],
        "buffer": extra["buffer"],
        "grid": math.isqrt(shape["mar.diffusion_pos_embed_learned"][1]),
        "channels": channels,
    }


def _head(extra: dict[str, Any], shape: Shapes) -> dict[str, Any]:
    width, channels = shape["mar.diffloss.net.input_proj.weight"]
    return {
        "width": width,
        "depth": keys.depth(shape, "head"),
        "condition": shape["mar.diffloss.net.cond_embed.weight"][1],
        "channels": channels,
        "frequencies": shape["mar.diffloss.net.time_embed.mlp.0.weight"][1],
        "train_steps": 1000,
        "steps": extra["steps"],
        "max_beta": 0.2,
    }


def _vae(shape: Shapes) -> dict[str, Any]:
    base = shape["vae.encoder.conv_in.weight"][0]
    widths = [shape[name][0] for name in VAE_WIDTHS]
    return {
        "base": base,
        "multipliers": [width // max(base, 1) for width in widths],
        "latent": shape["vae.post_quant_conv.weight"][0],
        "groups": VAE_GROUPS,
    }


def read_tokenizer(path: Path) -> tuple[str, int, int]:
    """(tokenizer JSON with `<image>` added, id of `<image>`: the first free one, id of `<|im_end|>`)."""
    try:
        tokenizer = Tokenizer.from_str(read_text(path))
        tokenizer.add_special_tokens(["<image>"])
        image, eos = tokenizer.token_to_id("<image>"), tokenizer.token_to_id("<|im_end|>")
    except CorruptWeightsError:
        raise
    except Exception as error:  # the library raises bare Exception for a bad file
        raise CorruptWeightsError(f"{path} is not a tokenizer ({str(error)[:200]})", DOWNLOAD_AGAIN) from None
    if image is None or eos is None:
        raise CorruptWeightsError(f"{path} knows no <|im_end|>", DOWNLOAD_AGAIN)
    return tokenizer.to_str(), image, eos
