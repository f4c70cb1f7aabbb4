"""Tensor names of a released DeepGen 1.0 -> ours, as data; `{p}` as in engine/checkpoint/tables.py.

A released name has its component in front: `vlm.`, `connector.`, `transformer.` or `vae.`. Behind that it is the name
in Hugging Face's or diffusers' file of that component. UniPic-2's `conditioner` folder has the connector's names, a
plain Qwen2.5-VL the language model's. `lmm.` is a low-rank update of the language model, from the training code.
"""

from collections.abc import Iterable

from ....quant.recipe import expand
from ...checkpoint import tables
from ...checkpoint.tables import QWEN2_LAYER, Rows, Table
from ...layers.vae import SD3VAEConfig
from .config import DeepGenConfig, DiTConfig

VISION_BLOCK: Table = {
    "norm1.weight": "norm1.weight",
    "qkv.{p}": "attn.qkv.{p}",
    "proj.{p}": "attn.proj.{p}",
    "norm2.weight": "norm2.weight",
    "gate_up.{p}": ("mlp.gate_proj.{p}", "mlp.up_proj.{p}"),
    "down.{p}": "mlp.down_proj.{p}",
}
CONNECTOR_BLOCK: Table = {
    "norm1.{p}": "layer_norm1.{p}",
    "qkv.{p}": tuple(f"self_attn.{x}_proj.{{p}}" for x in "qkv"),
    "proj.{p}": "self_attn.out_proj.{p}",
    "norm2.{p}": "layer_norm2.{p}",
    "fc1.{p}": "mlp.fc1.{p}",
    "fc2.{p}": "mlp.fc2.{p}",
}
DIT_BLOCK: Table = {
    "image.qkv.{p}": tuple(f"attn.to_{x}.{{p}}" for x in "qkv"),
    "image.q_norm.weight": "attn.norm_q.weight",
    "image.k_norm.weight": "attn.norm_k.weight",
    "image.proj.{p}": "attn.to_out.0.{p}",
    "image.fc1.{p}": "ff.net.0.proj.{p}",
    "image.fc2.{p}": "ff.net.2.{p}",
    "text.qkv.{p}": tuple(f"attn.add_{x}_proj.{{p}}" for x in "qkv"),
    "text.q_norm.weight": "attn.norm_added_q.weight",
    "text.k_norm.weight": "attn.norm_added_k.weight",
}
DIT_TEXT: Table = {  # of all blocks but the last
    "text.proj.{p}": "attn.to_add_out.{p}",
    "text.fc1.{p}": "ff_context.net.0.proj.{p}",
    "text.fc2.{p}": "ff_context.net.2.{p}",
}
DIT_ALONE: Table = {  # of the first `dual` blocks
    "alone.qkv.{p}": tuple(f"attn2.to_{x}.{{p}}" for x in "qkv"),
    "alone.q_norm.weight": "attn2.norm_q.weight",
    "alone.k_norm.weight": "attn2.norm_k.weight",
    "alone.proj.{p}": "attn2.to_out.0.{p}",
}
MODULATION_BLOCK: Table = {"image.{p}": "norm1.linear.{p}", "text.{p}": "norm1_context.linear.{p}"}
VAE_BLOCK: Table = {f"{name}.{{p}}": f"{name}.{{p}}" for name in ("norm1", "conv1", "norm2", "conv2")}
VAE_MIDDLE: Table = {
    "norm.{p}": "group_norm.{p}",
    "q.{p}": "to_q.{p}",
    "k.{p}": "to_k.{p}",
    "v.{p}": "to_v.{p}",
    "proj_out.{p}": "to_out.0.{p}",
}
VAE_ENDS: Table = {
    "conv_in.{p}": "conv_in.{p}",
    "norm_out.{p}": "conv_norm_out.{p}",
    "conv_out.{p}": "conv_out.{p}",
}
ONCE: Table = {
    "embed.weight": "vlm.model.embed_tokens.weight",
    "llm.norm.weight": "vlm.model.norm.weight",
    "vision.patch_embed.weight": "vlm.visual.patch_embed.proj.weight",
    "vision.merger.norm.weight": "vlm.visual.merger.ln_q.weight",
    "vision.merger.fc1.{p}": "vlm.visual.merger.mlp.0.{p}",
    "vision.merger.fc2.{p}": "vlm.visual.merger.mlp.2.{p}",
    "connector.queries": "connector.meta_queries",
    "connector.projector_1.{p}": "connector.projector_1.{p}",
    "connector.projector_2.{p}": "connector.projector_2.{p}",
    "connector.projector_3.{p}": "connector.projector_3.{p}",
}
POSITIONS = "transformer.pos_embed.pos_embed"  # which some checkpoints lack, as it was never trained
DIT_ONCE: Table = {
    "dit.pos_table": POSITIONS,
    "dit.patch_embed.{p}": "transformer.pos_embed.proj.{p}",
    "dit.context_embed.{p}": "transformer.context_embedder.{p}",
    "dit.out.{p}": "transformer.proj_out.{p}",
    "modulation.time_embed.0.{p}": "transformer.time_text_embed.timestep_embedder.linear_1.{p}",
    "modulation.time_embed.2.{p}": "transformer.time_text_embed.timestep_embedder.linear_2.{p}",
    "modulation.text_embed.0.{p}": "transformer.time_text_embed.text_embedder.linear_1.{p}",
    "modulation.text_embed.2.{p}": "transformer.time_text_embed.text_embedder.linear_2.{p}",
    "modulation.final.{p}": "transformer.norm_out.linear.{p}",
}
# Where the indices of repeated blocks stand.
VISION_BLOCKS, CONNECTOR_BLOCKS = "vlm.visual.blocks.", "connector.layers."
DIT_BLOCKS = "transformer.transformer_blocks."

# Of ours: what is not stored as it was released, besides being joined.
CENTRED = "dit.pos_table"  # (1, n n, D) becomes (m, m, D), the middle of n x n
FLAT = ("dit.patch_embed.weight", "vision.patch_embed.weight")  # convolutions of patches become matrices
CONVOLUTIONS = tuple(  # matrices become convolutions of one pixel
    f"vae_{half}.mid.attn_1.{name}.weight" for half in ("encoder", "decoder") for name in ("q", "k", "v", "proj_out")
)
PADDED_ROWS = tuple(
    f"{name}.{p}" for name in ("vision.blocks.*.gate_up", "connector.encoder.*.fc1") for p in ("weight", "bias")
)
PADDED_COLUMNS = ("vision.blocks.*.down.weight", "connector.encoder.*.fc2.weight")
# Of ours: what a low-rank update in the native file changes, all of them. That of the output layer is of no use.
UPDATED = (
    "embed.weight",
    *(f"llm.layers.*.{name}.weight" for name in ("qkv", "o", "gate_up", "down")),
    *(f"vision.blocks.*.{name}.weight" for name in ("qkv", "proj", "gate_up", "down")),
    *(f"vision.merger.{name}.weight" for name in ("fc1", "fc2")),
)
TUNED = tuple(dict.fromkeys(name.partition(".")[0] for name in UPDATED))  # the parts with such
# The output layer is tied to the embedding, and pictures need neither.
IGNORED = ("vlm.lm_head.weight", "lmm.lm_head.lora_A.default.weight", "lmm.lm_head.lora_B.default.weight")
# Prefixes that the files of some versions of transformers have -> those of the others.
SPELLINGS = {"model.language_model.": "model.", "model.visual.": "visual."}


def table(config: DeepGenConfig) -> Rows:
    """Our name -> released names."""
    made = tables.rows(ONCE)
    for i in range(config.llm.layers):
        made |= tables.rows(QWEN2_LAYER, f"llm.layers.{i}.", f"vlm.model.layers.{i}.")
    for i in range(config.vision.depth):
        made |= tables.rows(VISION_BLOCK, f"vision.blocks.{i}.", f"{VISION_BLOCKS}{i}.")
    for i in range(config.connector.depth):
        made |= tables.rows(CONNECTOR_BLOCK, f"connector.encoder.{i}.", f"{CONNECTOR_BLOCKS}{i}.")
    return made | painter(config.dit, config.vae)


def painter(dit: DiTConfig, vae: SD3VAEConfig) -> Rows:
    """What is behind the conditions: the diffusion transformer, its modulations and the autoencoder."""
    made = tables.rows(DIT_ONCE)
    for i in range(dit.depth):
        text = DIT_TEXT if i < dit.depth - 1 else {}
        alone = DIT_ALONE if i < dit.dual else {}
        made |= tables.rows({**DIT_BLOCK, **text, **alone}, f"dit.blocks.{i}.", f"{DIT_BLOCKS}{i}.")
        made |= tables.rows(MODULATION_BLOCK, f"modulation.blocks.{i}.", f"{DIT_BLOCKS}{i}.")
    return made | vae_encoder(vae) | vae_decoder(vae)


def vae_encoder(config: SD3VAEConfig) -> Rows:
    made = _vae_frame("encoder")
    width, last = config.base, len(config.widths) - 1
    for level, wide in enumerate(config.widths):
        ours, theirs = f"vae_encoder.down.{level}.", f"vae.encoder.down_blocks.{level}."
        made |= _vae_level(ours, theirs, config.blocks, wide != width)
        if level < last:
            made |= tables.rows({"downsample.conv.{p}": "downsamplers.0.conv.{p}"}, ours, theirs)
        width = wide
    return made


def vae_decoder(config: SD3VAEConfig) -> Rows:
    """diffusers counts a decoder's levels from the smallest map on, we from the largest."""
    made = _vae_frame("decoder")
    width, last = config.widths[-1], len(config.widths) - 1
    for level, wide in reversed([*enumerate(config.widths)]):
        ours, theirs = f"vae_decoder.up.{level}.", f"vae.decoder.up_blocks.{last - level}."
        made |= _vae_level(ours, theirs, config.blocks + 1, wide != width)
        if level:
            made |= tables.rows({"upsample.conv.{p}": "upsamplers.0.conv.{p}"}, ours, theirs)
        width = wide
    return made


def _vae_frame(half: str) -> Rows:
    ours, theirs = f"vae_{half}.", f"vae.{half}."
    made = tables.rows(VAE_ENDS, ours, theirs)
    for i in (0, 1):
        made |= tables.rows(VAE_BLOCK, f"{ours}mid.block_{i + 1}.", f"{theirs}mid_block.resnets.{i}.")
    return made | tables.rows(VAE_MIDDLE, f"{ours}mid.attn_1.", f"{theirs}mid_block.attentions.0.")


def _vae_level(ours: str, theirs: str, blocks: int, widened: bool) -> Rows:
    made: Rows = {}
    for i in range(blocks):
        shortcut = {"nin_shortcut.{p}": "conv_shortcut.{p}"} if widened and i == 0 else {}
        made |= tables.rows({**VAE_BLOCK, **shortcut}, f"{ours}block.{i}.", f"{theirs}resnets.{i}.")
    return made


def expanded(patterns: Iterable[str], names: Iterable[str]) -> set[str]:
    """The names that any of the patterns stands for."""
    names = [*names]
    return {name for pattern in patterns for name in expand(pattern, names)}


def spelled(component: str, name: str) -> str:
    """The released name of a tensor that a component's file calls `name`."""
    if component == "connector":
        while name.startswith("connector."):  # its encoder's names, or all, or with the component's before that
            name = name.removeprefix("connector.")
    for other, usual in SPELLINGS.items() if component in ("vlm", "lmm") else ():
        if name.startswith(other):
            name = usual + name.removeprefix(other)
    return f"{component}.{name}"


def native(name: str) -> str | None:
    """The released name of a tensor of the native file; None if it is of no component there."""
    component, _, rest = name.partition(".")
    if component in ("transformer", "lmm"):
        return spelled(component, rest)
    if component in ("connector", "meta_queries", "projector_1", "projector_2", "projector_3"):
        return spelled("connector", name)
    return None


def update(weight: str) -> tuple[str, str]:
    """Released names of A and B, which update the weight of this released name (arXiv 2106.09685)."""
    module = weight.replace("vlm.", "lmm.", 1).removesuffix(".weight")
    kind, end = ("lora_embedding_", "") if module.endswith(".embed_tokens") else ("lora_", ".weight")
    return f"{module}.{kind}A.default{end}", f"{module}.{kind}B.default{end}"
