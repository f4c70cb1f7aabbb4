"""Which modules of UniPic2-SD3.5M-Kontext are stored in fewer bits: the stacks of the text encoders, and of the
diffusion transformer what DeepGen's recipe takes.

T5's residual stream has no last table to rotate into, so only the inputs of its MLPs' second layers are rotated.
"""

from .....quant.recipe import Recipe, recipe_of
from ...deepgen.recipe import ALONE, DIT

CLIP_LAYER = (*(f"self_attn.{x}_proj" for x in ("q", "k", "v", "out")), "mlp.fc1", "mlp.fc2")
CLIP = tuple(f"{name}.text_model.encoder.layers.*.{part}" for name in ("clip_l", "clip_g") for part in CLIP_LAYER)
T5 = tuple(f"t5.block.*.layer.0.SelfAttention.{name}" for name in "qkvo")
T5_MLP = tuple(f"t5.block.*.layer.1.DenseReluDense.{name}" for name in ("wi_0", "wi_1", "wo"))
MODULES = (*CLIP, *T5, *T5_MLP, *DIT, *ALONE)
ROTATED_INPUTS = ("t5.block.*.layer.1.DenseReluDense.wo",)  # a gate multiplies outliers


def recipe(scheme: str) -> Recipe:
    """Raises ValueError for a scheme that is none."""
    return recipe_of(scheme, MODULES, None, ROTATED_INPUTS)
