"""Which modules of UniPic 1.0 are stored in fewer bits: the stacks, where nearly all weights and all work are.

In the checkpoint's precision stay the embeddings and position tables, what carries a token in or out of a stack
(`z_proj`, `mar_decoder.embed`, `proj_in`, `proj_out`, the head's inputs and its final layer with its modulation), all
norms, and the VAE. The modulations inside the head's blocks are taken, unlike those of most diffusion transformers:
theirs depend on the time alone and are made once, these depend on every token and are 60 % of the head's work.
"""

from ....quant.recipe import Recipe, Rotation, recipe_of

LLM = tuple(f"llm.layers.*.{name}" for name in ("qkv", "o", "gate_up", "down"))
MAR = tuple(
    f"{stack}.blocks.*.{name}" for stack in ("mar_encoder", "mar_decoder") for name in ("qkv", "proj", "fc1", "fc2")
)
HEAD = tuple(f"head.blocks.*.{name}" for name in ("fc1", "fc2", "modulation"))
MODULES = (*LLM, *MAR, *HEAD)
ROTATED_INPUTS = ("llm.layers.*.down",)  # a SwiGLU makes them, which multiplies outliers

# The language model's residual stream. LayerNorm takes a mean away and adds a bias, so MAR's and the head's stay.
ROTATION = Rotation(
    table="embed",
    writers=("proj_in.2", "llm.layers.*.o", "llm.layers.*.down"),
    readers=(
        ("llm.layers.*.input_norm", "llm.layers.*.qkv"),
        ("llm.layers.*.post_norm", "llm.layers.*.gate_up"),
        ("llm.norm", "proj_out.0"),
    ),
    last="llm.norm",
)


def recipe(scheme: str) -> Recipe:
    """Raises ValueError for a scheme that is none."""
    return recipe_of(scheme, MODULES, ROTATION, ROTATED_INPUTS)
