"""Released UniPic 1.0 tensor names -> ours, as data; `{p}` as in engine/checkpoint/tables.py.

(Checkpoint of arXiv 2508.03320.)
"""

from collections.abc import Iterable

from ...checkpoint import tables
from ...checkpoint.tables import QWEN2_LAYER, Rows, Table

VIT_BLOCK: Table = {
    "norm1.{p}": "norm1.{p}",
    "qkv.{p}": "attn.qkv.{p}",
    "proj.{p}": "attn.proj.{p}",
    "norm2.{p}": "norm2.{p}",
    "fc1.{p}": "mlp.fc1.{p}",
    "fc2.{p}": "mlp.fc2.{p}",
}
HEAD_BLOCK: Table = {
    "norm.{p}": "in_ln.{p}",
    "fc1.{p}": "mlp.0.{p}",
    "fc2.{p}": "mlp.2.{p}",
    "modulation.{p}": "adaLN_modulation.1.{p}",
}
ONCE: Table = {
    "embed.weight": "llm.model.embed_tokens.weight",
    "llm.norm.weight": "llm.model.norm.weight",
    "mar_encoder.fake_latent": "mar.fake_latent",
    "mar_encoder.z_proj.{p}": "mar.z_proj.{p}",
    "mar_encoder.z_proj_ln.{p}": "mar.z_proj_ln.{p}",
    "mar_encoder.pos_embed": "mar.encoder_pos_embed_learned",
    "mar_encoder.norm.{p}": "mar.encoder_norm.{p}",
    "mar_decoder.embed.{p}": "mar.decoder_embed.{p}",
    "mar_decoder.mask_token": "mar.mask_token",
    "mar_decoder.pos_embed": "mar.decoder_pos_embed_learned",
    "mar_decoder.diffusion_pos_embed": "mar.diffusion_pos_embed_learned",
    "mar_decoder.norm.{p}": "mar.decoder_norm.{p}",
    "head.time_embed.0.{p}": "mar.diffloss.net.time_embed.mlp.0.{p}",
    "head.time_embed.2.{p}": "mar.diffloss.net.time_embed.mlp.2.{p}",
    "head.cond_embed.{p}": "mar.diffloss.net.cond_embed.{p}",
    "head.input_proj.{p}": "mar.diffloss.net.input_proj.{p}",
    "head.final.modulation.{p}": "mar.diffloss.net.final_layer.adaLN_modulation.1.{p}",
    "head.final.linear.{p}": "mar.diffloss.net.final_layer.linear.{p}",
    "proj_in.0.{p}": "proj_in.0.{p}",
    "proj_in.2.{p}": "proj_in.2.{p}",
    "proj_out.0.{p}": "proj_out.0.{p}",
    "proj_out.2.{p}": "proj_out.2.{p}",
}
VAE = {  # our prefix -> the prefix inside kl16.ckpt; the rest of the name is the same
    "vae_encoder.quant_conv.": "quant_conv.",
    "vae_encoder.": "encoder.",
    "vae_decoder.post_quant_conv.": "post_quant_conv.",
    "vae_decoder.": "decoder.",
}
# Our prefix of a stack's blocks, theirs, and what is in a block.
STACKS: dict[str, tuple[str, str, Table]] = {
    "llm": ("llm.layers.", "llm.model.layers.", QWEN2_LAYER),
    "encoder": ("mar_encoder.blocks.", "mar.encoder_blocks.", VIT_BLOCK),
    "decoder": ("mar_decoder.blocks.", "mar.decoder_blocks.", VIT_BLOCK),
    "head": ("head.blocks.", "mar.diffloss.net.res_blocks.", HEAD_BLOCK),
}
# The unused vision tower, the class table, and the output layer, which is tied to the embedding.
IGNORED_PREFIXES = ("siglip2.", "siglip2_proj.")
IGNORED = ("mar.class_emb.weight", "llm.lm_head.weight")


def table(llm_layers: int, encoder_blocks: int, decoder_blocks: int, head_blocks: int) -> Rows:
    """Our name -> released names in `pytorch_model.bin`, for these depths. The VAE follows `vae_name` instead."""
    made = tables.rows(ONCE)
    depths = (llm_layers, encoder_blocks, decoder_blocks, head_blocks)
    for (ours, theirs, block), count in zip(STACKS.values(), depths, strict=True):
        for i in range(count):
            made |= tables.rows(block, f"{ours}{i}.", f"{theirs}{i}.")
    return made


def vae_name(released: str) -> str | None:
    """Our name of a tensor of `kl16.ckpt`; None if it is not one of the VAE's."""
    return next((o + released[len(t) :] for o, t in VAE.items() if released.startswith(t)), None)


def is_ignored(released: str) -> bool:
    return released in IGNORED or released.startswith(IGNORED_PREFIXES)


def depth(names: Iterable[str], stack: str) -> int:
    """How many blocks of a stack the names speak of."""
    _, theirs, block = STACKS[stack]
    return tables.depth(names, theirs, block)
