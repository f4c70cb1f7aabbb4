"""Engines with random weights: neither speed nor memory depends on the values."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from unipic_run.engine import families
from unipic_run.engine.allocator import grow_segments
from unipic_run.engine.device import DTYPES, as_device
from unipic_run.engine.engine import Engine
from unipic_run.engine.layers.attention import resolve
from unipic_run.engine.plan import shapes
from unipic_run.engine.tokens import Tokens
from unipic_run.quant.int8 import Int8Linear

NEVER = -1  # an end token no answer has, so that every answer has the length that was asked for


def family_of(model: str) -> tuple[families.Family, Any]:
    """The family of a released model by its short name, or of the checkpoint in a folder, and its sizes."""
    row = None if model in families.FAMILIES else families.of_released(Path(model))
    if row is None:
        return families.architecture(model)
    with families.released(row.name).Released(Path(model)) as checkpoint:
        return row, checkpoint.config


def architecture(model: str) -> Any:
    """The sizes alone."""
    return family_of(model)[1]


def random_engine(
    model: str, tokenizer: Path, device: str, dtype: str, attention: str = "auto", quant: str = "none"
) -> Engine:
    """An engine of the architecture `model`, with any small tokenizer in place of its own."""
    place, precision, (row, config) = as_device(device), DTYPES[dtype], family_of(model)
    family = families.model(row.name)
    tokens = any_tokens(tokenizer, family.IMAGE)
    config = replace(config, image_token=tokens.tokenizer.token_to_id(family.IMAGE), eos_token=NEVER)
    recipe = families.recipe(row.name, quant)
    module = shapes(family, config, recipe, precision, resolve(attention, place, precision))
    grow_segments(place, str)  # as an engine that is loaded does
    module = module.to_empty(device=place).requires_grad_(False).eval()
    fill(module)
    return Engine(family, module, tokens, f"{model} with random weights", recipe)


def any_tokens(tokenizer: Path, image_text: str) -> Tokens:
    from tokenizers import Tokenizer

    known = Tokenizer.from_file(str(tokenizer))
    known.add_special_tokens([image_text])
    return Tokens(tokenizer, image_text, known.token_to_id(image_text))


def fill(module: nn.Module) -> None:
    """Small random matrices, norms that change nothing, no biases: activations stay finite."""
    generator = torch.Generator(next(module.parameters()).device).manual_seed(0)
    for name, parameter in module.named_parameters():
        if parameter.dim() > 1:
            parameter.normal_(0, 0.02, generator=generator)
        else:
            parameter.fill_(1.0 if name.endswith("weight") else 0.0)
    for layer in module.modules():
        if isinstance(layer, Int8Linear):
            layer.weight.random_(-127, 128, generator=generator)
            layer.scale.fill_(0.02 / 73)  # whole numbers spread evenly up to 127 deviate by 73
