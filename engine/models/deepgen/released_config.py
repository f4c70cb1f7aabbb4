"""The configuration of a released DeepGen 1.0.

Sizes come from tensor shapes and from the components' own config.json; what neither tells is a constant here.
"""

import math
from pathlib import Path
from typing import Any

from ....kernels._product import GROUP
from ...checkpoint import tables
from ...checkpoint.json_files import read_json
from ...checkpoint.parts import Sinusoids
from . import keys
from .config import CHECKS, DeepGenConfig
from .layout import Layout

# Pictures have sides of up to 2048 pixels. The model was trained at 512, and of a table for 6144 pixels, 0.45 GB in
# bfloat16, the middle of 0.05 GB is enough for that.
MOST_ROWS = 128  # of positions
TABLE = {"pos_embed_max_size": 384, "sample_size": 128}  # tokens, latent cells; where the transformer has no config
HEAD_DIM = 64  # of the connector, in all that are released
EPS = 1e-6  # of the connector's and the vision tower's norms
SHIFT = 3.0  # where there is no scheduler folder: Stable Diffusion 3.5 Medium's
TRAIN_STEPS = 1000
TEMPLATES = {  # the only ones that this version knows, see prompts.py
    "INSTRUCTION": "<|im_start|>user\n{input}<|im_end|>\n<|im_start|>assistant\n",
    "GENERATION": "Generate an image: {input}",
}
VISION = {"num_heads": 16, "window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31]}  # of every Qwen2.5-VL
# Released names whose shapes the configuration is read from.
SIZES = (
    "vlm.model.embed_tokens.weight",
    "vlm.model.layers.0.mlp.gate_proj.weight",
    "vlm.visual.patch_embed.proj.weight",
    "vlm.visual.blocks.0.mlp.gate_proj.weight",
    "vlm.visual.merger.mlp.0.weight",
    "vlm.visual.merger.mlp.2.weight",
    "connector.meta_queries",
    *(f"connector.projector_{i}.weight" for i in (1, 2, 3)),
    "connector.layers.0.mlp.fc1.weight",
    "transformer.pos_embed.proj.weight",
    "transformer.context_embedder.weight",
    "transformer.time_text_embed.timestep_embedder.linear_1.weight",
    "transformer.time_text_embed.text_embedder.linear_1.weight",
    "transformer.transformer_blocks.0.attn.norm_q.weight",
    "transformer.transformer_blocks.0.ff.net.0.proj.weight",
)
Shapes = dict[str, tuple[int, ...]]
Json = dict[str, Any]


def read_config(layout: Layout, shape: Shapes, ids: dict[str, int], taps: bool = True) -> DeepGenConfig:
    """`shape` maps released names to shapes, those of SIZES and the positions' among them; `ids`: of special tokens.

    `taps`: whether the connector reads several layers, or what is behind the last one, as UniPic-2 MetaQuery's does.
    Raises ValueError, or IndexError, TypeError and ArithmeticError where something has too few dimensions or no number.
    """
    told = read_small(layout.small())
    check_prompts(told.get("prompts", {}))
    vlm, connector = told["vlm"], told.get("connector", {})
    text = _text(vlm)
    for name, said in (("image_token", vlm.get("image_token_id")), ("vision_start", vlm.get("vision_start_token_id"))):
        if said not in (None, ids[name]):
            raise ValueError(f"{name} is {said} for the language model and {ids[name]} for the tokenizer beside it")
    return DeepGenConfig.from_json(
        {
            "llm": _llm(text, shape),
            "mrope": (text.get("rope_scaling") or text.get("rope_parameters") or {}).get("mrope_section"),
            "vision": _vision(vlm.get("vision_config") or {}, shape),
            "connector": _connector(connector.get("connector_config", connector), shape, taps),
            **painter(told, shape),
            **ids,
            "repetition_penalty": told.get("generation", {}).get("repetition_penalty", 1.0),
            "resolution": 512,
            "rounds": 50,
            "guidance": 4.0,
        }
    )


def read_small(files: dict[str, Path]) -> dict[str, Json]:
    """The JSON files that there are, by use."""
    return {use: read_json(path) for use, path in files.items() if path.suffix == ".json" and path.is_file()}


def painter(told: dict[str, Json], shape: Shapes) -> Json:
    """What is behind the conditions: the diffusion transformer, the autoencoder and the schedule."""
    vae = told["vae"]
    return {
        "dit": _dit(shape),
        "vae": _vae(vae),
        "vae_scale": vae.get("scaling_factor"),
        "vae_shift": vae.get("shift_factor"),
        "shift": _shift(told.get("scheduler")),
    }


def check_prompts(told: Json) -> None:
    """Raises ValueError where the checkpoint was trained with other words around a prompt."""
    for name, known in TEMPLATES.items():
        if told.get(name, known) != known:
            raise ValueError(f"{name} of prompt_template.json is {told[name]!r:.200}, which is not {known!r}")


def aligned(mlp: int) -> int:
    """Columns of a padded MLP: whole groups, which share a scale in 8 bits; 1.1 % more in the released vision tower."""
    return -(-mlp // GROUP) * GROUP


def _text(vlm: Json) -> Json:
    """Settings of the language model, which newer files nest."""
    nested = vlm.get("text_config") or {}
    return vlm | {name: value for name, value in nested.items() if value is not None}


def _llm(text: Json, shape: Shapes) -> Json:
    vocab, width = shape["vlm.model.embed_tokens.weight"]
    heads = CHECKS.number("llm.heads", text.get("num_attention_heads"))
    return {
        "vocab": vocab,
        "width": width,
        "layers": text.get("num_hidden_layers"),
        "heads": heads,
        "kv_heads": text.get("num_key_value_heads"),
        "head_dim": width // heads,
        "mlp": shape["vlm.model.layers.0.mlp.gate_proj.weight"][0],
        "rope_theta": text.get("rope_theta", (text.get("rope_parameters") or {}).get("rope_theta")),
        "norm_eps": text.get("rms_norm_eps"),
        "max_positions": text.get("max_position_embeddings"),
    }


def _vision(told: Json, shape: Shapes) -> Json:
    told = VISION | told
    width, _, temporal, patch, _ = shape["vlm.visual.patch_embed.proj.weight"]
    return {
        "width": width,
        "depth": told.get("depth", tables.depth(shape, keys.VISION_BLOCKS, keys.VISION_BLOCK)),
        "heads": told["num_heads"],
        "mlp": aligned(shape["vlm.visual.blocks.0.mlp.gate_proj.weight"][0]),
        "patch": patch,
        "temporal": temporal,
        "merge": math.isqrt(shape["vlm.visual.merger.mlp.0.weight"][1] // max(width, 1)),
        "window": told["window_size"],
        "full": told["fullatt_block_indexes"],
        "out": shape["vlm.visual.merger.mlp.2.weight"][0],
        "eps": EPS,
    }


def _connector(told: Json, shape: Shapes, tapped: bool) -> Json:
    queries, llm_width = shape["connector.meta_queries"]
    width, stacked = shape["connector.projector_1.weight"]
    taps = stacked // max(llm_width, 1)
    if taps * llm_width != stacked or (taps > 1) != tapped:
        wanted = "several layers" if tapped else "one layer"
        raise ValueError(f"projector_1 reads {stacked} channels, which are not those of {wanted} of {llm_width}")
    return {
        "width": width,
        "depth": told.get("num_hidden_layers", tables.depth(shape, keys.CONNECTOR_BLOCKS, keys.CONNECTOR_BLOCK)),
        "heads": told.get("num_attention_heads", width // HEAD_DIM),
        "mlp": aligned(shape["connector.layers.0.mlp.fc1.weight"][0]),
        "queries": queries,
        "taps": taps if tapped else 0,
        "pooled": shape["connector.projector_2.weight"][0],
        "text": shape["connector.projector_3.weight"][0],
        "norm_eps": EPS,
    }


def _dit(shape: Shapes) -> Json:
    width, channels, patch, _ = shape["transformer.pos_embed.proj.weight"]
    (head_dim,) = shape["transformer.transformer_blocks.0.attn.norm_q.weight"]
    return {
        "depth": tables.depth(shape, keys.DIT_BLOCKS, keys.DIT_BLOCK),
        "heads": width // max(head_dim, 1),
        "head_dim": head_dim,
        "dual": tables.depth(shape, keys.DIT_BLOCKS, keys.DIT_ALONE),
        "patch": patch,
        "channels": channels,
        "text": shape["transformer.context_embedder.weight"][1],
        "pooled": shape["transformer.time_text_embed.text_embedder.linear_1.weight"][1],
        "table": kept_rows(table_side(shape[keys.POSITIONS])),
        "frequencies": shape["transformer.time_text_embed.timestep_embedder.linear_1.weight"][1],
        "mlp": shape["transformer.transformer_blocks.0.ff.net.0.proj.weight"][0],
    }


def positions(config: Path, shape: tuple[int, ...]) -> Sinusoids:
    """The table of a checkpoint that lacks it, by its transformer's `config`, which may not exist either.

    `shape`: of its convolution of patches. Raises ValueError.
    """
    width, _, patch, _ = shape
    told = TABLE | (read_json(config) if config.is_file() else {})
    side, cells = (CHECKS.number("dit.table", told[name]) for name in TABLE)
    if width % 4 or patch < 1 or cells < patch:
        what = f"{width} channels, {cells} latent cells in patches of {patch}"
        raise ValueError(f"{keys.POSITIONS} is missing, and cannot be made of {what}")
    return Sinusoids(keys.POSITIONS, side, cells // patch, width)


def table_side(shape: tuple[int, ...]) -> int:
    """n of a table (1, n n, D) of positions. Raises ValueError."""
    first, rows, _ = shape
    side = math.isqrt(rows)
    if (first, side * side) != (1, rows):
        raise ValueError(f"a table of positions has the shape {[*shape]}, which is not that of a square")
    return side


def kept_rows(side: int) -> int:
    """Rows of the middle that is kept of a square table, which is as far from all its sides.

    So a picture's own middle, which is rounded down, is the same in both.
    """
    return side if side <= MOST_ROWS else MOST_ROWS - (side - MOST_ROWS) % 2


def _vae(told: Json) -> Json:
    widths = [CHECKS.number("vae.base", width) for width in told.get("block_out_channels") or [None]]
    if any(width % widths[0] for width in widths):
        raise ValueError(f"block_out_channels of the VAE are {widths}, which are not multiples of the first")
    return {
        "base": widths[0],
        "multipliers": [width // widths[0] for width in widths],
        "latent": told.get("latent_channels"),
        "groups": told.get("norm_num_groups"),
        "blocks": told.get("layers_per_block"),
    }


def _shift(scheduler: Json | None) -> object:
    if scheduler is None:
        return SHIFT
    steps, dynamic = scheduler.get("num_train_timesteps", TRAIN_STEPS), scheduler.get("use_dynamic_shifting", False)
    if steps != TRAIN_STEPS or dynamic is not False:
        what = f"num_train_timesteps {steps!r:.40} and use_dynamic_shifting {dynamic!r:.40}"
        raise ValueError(f"the scheduler has {what}, which are not {TRAIN_STEPS} and False")
    return scheduler.get("shift")
