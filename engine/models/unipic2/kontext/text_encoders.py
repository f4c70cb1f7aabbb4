"""CLIP's and T5's text encoders, as modules of the package transformers, and what Stable Diffusion 3 takes of them
(arXiv 2403.03206).

Letters: R prompts, L positions, D width of T5.
"""

from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ....errors import UnsupportedDeviceError
from .config import CLIPConfig, T5Config

USED = ("CLIPTextConfig", "CLIPTextModelWithProjection", "T5Config", "T5EncoderModel")


def transformers() -> Any:
    """The package. Raises UnsupportedDeviceError."""
    try:
        with torch.device("cpu"):  # for what it makes as it is imported
            package = import_module("transformers")
            for name in USED:
                getattr(package, name)
    except (ImportError, AttributeError, RuntimeError) as error:  # it imports what it has when that is asked for
        what = f"unipic2-kontext reads prompts with CLIP and T5 of the package transformers ({str(error)[:200]})"
        raise UnsupportedDeviceError(what, "install unipic-run[unipic2]") from None
    return package


def clip(config: CLIPConfig) -> nn.Module:
    package = transformers()
    model = package.CLIPTextModelWithProjection(
        package.CLIPTextConfig(
            vocab_size=config.vocab,
            hidden_size=config.width,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            intermediate_size=config.mlp,
            max_position_embeddings=config.positions,
            projection_dim=config.pooled,
            hidden_act="quick_gelu" if config.quick else "gelu",
            layer_norm_eps=config.eps,
            bos_token_id=config.start,
            eos_token_id=config.end,
            pad_token_id=config.pad,
        )
    )
    model.text_model.embeddings.position_ids = None  # no file has it, so nothing would fill it; `read_clip` gives it
    return model


def t5(config: T5Config) -> nn.Module:
    """The encoder's stack, which has the table of words."""
    package = transformers()
    return package.T5EncoderModel(
        package.T5Config(
            vocab_size=config.vocab,
            d_model=config.width,
            d_kv=config.head_dim,
            d_ff=config.mlp,
            num_layers=config.layers,
            num_heads=config.heads,
            relative_attention_num_buckets=config.buckets,
            relative_attention_max_distance=config.distance,
            layer_norm_epsilon=config.eps,
            feed_forward_proj="gated-gelu",
            use_cache=False,
        )
    ).encoder


def read_clip(model: nn.Module, ids: Tensor) -> tuple[Tensor, Tensor]:
    """ids (R, L) to the states behind the last layer but one (R, L, width), and the pooled vectors (R, pooled)."""
    at = torch.arange(ids.shape[1], device=ids.device)[None]
    found = model(input_ids=ids, position_ids=at, output_hidden_states=True)
    return found.hidden_states[-2], found.text_embeds


def read_t5(model: nn.Module, ids: Tensor) -> Tensor:
    """ids (R, L) to states (R, L, D); pads are read as any other token."""
    return model(input_ids=ids).last_hidden_state


def side_by_side(states: list[Tensor], width: int) -> Tensor:
    """Both CLIPs' states (R, L, ...) as (R, L, D), with zeros in the channels that they do not have."""
    joined = torch.cat(states, dim=-1)
    return F.pad(joined, (0, width - joined.shape[-1]))
