"""A folder in our format with the released architecture and random weights, to load as the real one is loaded."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from unipic_run.bench.random_model import any_tokens, family_of
from unipic_run.engine import families
from unipic_run.engine.checkpoint import manifest
from unipic_run.engine.checkpoint.config_file import write_config_file
from unipic_run.engine.device import DTYPES
from unipic_run.engine.layers.attention import Attention
from unipic_run.engine.plan import shapes

BLOCK = 2**22  # random values that are repeated, since drawing billions takes longer than loading them


def random_checkpoint(model: str, tokenizer: Path, dtype: str, folder: Path, say: Callable[[str], None] = str) -> int:
    """Write `folder`, one file a part; returns the bytes of its files. Small random matrices, norms that do nothing."""
    (row, config), precision = family_of(model), DTYPES[dtype]
    family = families.model(row.name)
    tokens = any_tokens(tokenizer, family.IMAGE)
    known = tokens.tokenizer
    # An answer ends early where the last row of the vocabulary is the likeliest: one in its size.
    last = config.llm.vocab - 1
    config = replace(config, image_token=known.token_to_id(family.IMAGE), eos_token=last)
    like = shapes(family, config, families.recipe(row.name, "none"), precision, Attention()).state_dict()
    say(f"writing random weights of {model}")
    block = torch.empty(BLOCK).normal_(0, 0.02, generator=torch.Generator().manual_seed(0)).to(precision)
    with manifest.publishing(folder, {"random": model}) as partial:
        write_config_file(partial, row.name, config.to_json())
        known.save(str(partial / "tokenizer.json"))
        for part in dict.fromkeys(name.partition(".")[0] for name in like):
            named = {name: tensor for name, tensor in like.items() if name.partition(".")[0] == part}
            made = {name: values(name, tensor, block) for name, tensor in named.items()}
            save_file(made, partial / f"{part}.safetensors", {"format": "pt"})
            del made
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def values(name: str, like: Tensor, block: Tensor) -> Tensor:
    """What a parameter of this name and these sizes is given."""
    if like.dim() < 2:
        return torch.full(like.shape, 1.0 if name.endswith("weight") else 0.0, dtype=like.dtype)
    made = torch.empty(like.shape, dtype=like.dtype)
    for piece in made.view(-1).split(BLOCK):
        piece.copy_(block[: len(piece)])
    return made
