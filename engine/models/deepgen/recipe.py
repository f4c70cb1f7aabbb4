"""Which modules of DeepGen 1.0 are stored in fewer bits: the stacks, where nearly all weights and all work are.

In the checkpoint's precision stay the embeddings and position tables, what carries a token in or out of a stack (patch
and text embeddings, the merger, the connector's projectors, the last product), all norms, the VAE, and the modulations
of the diffusion transformer: these are made once before the first step, and then leave the card.
"""

from ....quant.recipe import Recipe, Rotation, recipe_of

LLM = tuple(f"llm.layers.*.{name}" for name in ("qkv", "o", "gate_up", "down"))
VISION = tuple(f"vision.blocks.*.{name}" for name in ("qkv", "proj", "gate_up", "down"))
CONNECTOR = tuple(f"connector.encoder.*.{name}" for name in ("qkv", "proj", "fc1", "fc2"))
DIT = tuple(f"dit.blocks.*.{stream}.{name}" for stream in ("image", "text") for name in ("qkv", "proj", "fc1", "fc2"))
ALONE = tuple(f"dit.blocks.*.alone.{name}" for name in ("qkv", "proj"))
MODULES = (*LLM, *VISION, *CONNECTOR, *DIT, *ALONE)
ROTATED_INPUTS = ("llm.layers.*.down", "vision.blocks.*.down")  # a SwiGLU makes them, which multiplies outliers

# The language model's residual stream: the merger's tokens and the queries enter it as words do, and the connector taps
# it between layers. LayerNorm takes a mean away and modulations scale single channels, so all other streams stay.
ROTATION = Rotation(
    table="embed",
    writers=("vision.merger.fc2", "llm.layers.*.o", "llm.layers.*.down"),
    readers=(
        ("llm.layers.*.input_norm", "llm.layers.*.qkv"),
        ("llm.layers.*.post_norm", "llm.layers.*.gate_up"),
    ),
    last="llm.norm",
    rows=("connector.queries",),
    taps=("connector.projector_1",),
)


def recipe(scheme: str) -> Recipe:
    """Raises ValueError for a scheme that is none."""
    return recipe_of(scheme, MODULES, ROTATION, ROTATED_INPUTS)
