"""Which modules of UniPic2-MetaQuery are stored in fewer bits: those of DeepGen, and as much of the residual stream
is rotated. The conditioner and the answers' output layer read it behind the last norm.
"""

from dataclasses import replace

from .....quant.recipe import NONE, Recipe
from ...deepgen import recipe as deepgen

ROTATION = replace(
    deepgen.ROTATION,
    readers=(*deepgen.ROTATION.readers, ("llm.norm", "connector.projector_1"), ("llm.norm", "lm_head")),
    taps=(),
)


def recipe(scheme: str) -> Recipe:
    """Raises ValueError for a scheme that is none."""
    made = deepgen.recipe(scheme)
    return NONE if made is NONE else replace(made, rotation=made.rotation and ROTATION)
