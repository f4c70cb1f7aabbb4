"""Released UniPic 1.0 tensor names -> ours, as data.

`{i}` is a block index and `{p}` stands for both weight and bias. Several released names on the right are fused: joined
along dimension 0, in the order given. (Checkpoint of arXiv 2508.03320.)
"""

from collections.abc import Iterable

BOTH = ("weight", "bias")

LLM_LAYER = {
    "llm.layers.{i}.input_norm.weight": ("llm.model.layers.{i}.input_layernorm.weight",),
    "llm.layers.{i}.qkv.{p}": tuple(f"llm.model.layers.{{i}}.self_attn.{x}_proj.{{p}}" for x in "qkv"),
    "llm.layers.{i}.o.weight": ("llm.model.layers.{i}.self_attn.o_proj.weight",),
    "llm.layers.{i}.post_norm.weight": ("llm.model.layers.{i}.post_attention_layernorm.weight",),
    "llm.layers.{i}.gate_up.weight": tuple(f"llm.model.layers.{{i}}.mlp.{x}_proj.weight" for x in ("gate", "up")),
    "llm.layers.{i}.down.weight": ("llm.model.layers.{i}.mlp.down_proj.weight",),
}
VIT_BLOCK = {
    "norm1": "norm1",
    "qkv": "attn.qkv",
    "proj": "attn.proj",
    "norm2": "norm2",
    "fc1": "mlp.fc1",
    "fc2": "mlp.fc2",
}
HEAD_BLOCK = {"norm": "in_ln", "fc1": "mlp.0", "fc2": "mlp.2", "modulation": "adaLN_modulation.1"}
ONCE = {
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
# Where the indices of repeated blocks stand.
BLOCKS = {
    "llm": "llm.model.layers.",
    "encoder": "mar.encoder_blocks.",
    "decoder": "mar.decoder_blocks.",
    "head": "mar.diffloss.net.res_blocks.",
}
# The unused vision tower, the class table, and the output layer, which is tied to the embedding.
IGNORED_PREFIXES = ("siglip2.", "siglip2_proj.")
IGNORED = ("mar.class_emb.weight", "llm.lm_head.weight")


def table(llm_layers: int, encoder_blocks: int, decoder_blocks: int, head_blocks: int) -> dict[str, tuple[str, ...]]:
    """Our name -> released names in `pytorch_model.bin`, for these depths. The VAE follows `vae_name` instead."""
    rows: dict[str, tuple[str, ...]] = {}
    _add(rows, {ours: (theirs,) for ours, theirs in ONCE.items()})
    for i in range(llm_layers):
        _add(rows, LLM_LAYER, i)
    for stack, depth in (("encoder", encoder_blocks), ("decoder", decoder_blocks)):
        block = {
            f"mar_{stack}.blocks.{{i}}.{o}.{{p}}": (f"mar.{stack}_blocks.{{i}}.{t}.{{p}}",)
            for o, t in VIT_BLOCK.items()
        }
        for i in range(depth):
            _add(rows, block, i)
    block = {
        f"head.blocks.{{i}}.{o}.{{p}}": (f"mar.diffloss.net.res_blocks.{{i}}.{t}.{{p}}",) for o, t in HEAD_BLOCK.items()
    }
    for i in range(head_blocks):
        _add(rows, block, i)
    return rows


def vae_name(released: str) -> str | None:
    """Our name of a tensor of `kl16.ckpt`; None if it is not one of the VAE's."""
    return next((o + released[len(t) :] for o, t in VAE.items() if released.startswith(t)), None)


def is_ignored(released: str) -> bool:
    return released in IGNORED or released.startswith(IGNORED_PREFIXES)


def depth(names: Iterable[str], stack: str) -> int:
    """How many blocks of a stack the names speak of: the highest index of a tensor that a block has, plus one."""
    prefix = BLOCKS[stack]
    one = [name for parts in table(1, 1, 1, 1).values() for name in parts]
    known = {name.removeprefix(f"{prefix}0.") for name in one if name.startswith(prefix)}
    found = [name.removeprefix(prefix).partition(".") for name in names if name.startswith(prefix)]
    indices = [i for i, _, rest in found if rest in known and i.isascii() and i.isdigit() and len(i) < 4]
    return 1 + max(map(int, indices), default=-1)


def _add(rows: dict[str, tuple[str, ...]], patterns: dict[str, tuple[str, ...]], i: int = 0) -> None:
    for ours, theirs in patterns.items():
        for p in BOTH if "{p}" in ours else ("",):
            rows[ours.format(i=i, p=p)] = tuple(name.format(i=i, p=p) for name in theirs)
