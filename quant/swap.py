"""A recipe carried out: linear layers exchanged on the meta device, tensors of a float checkpoint as they stream by."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from ..kernels.quantise import group_of
from .bnb import bnb8, is_packed, nf4
from .int8 import Int8Linear, quantise_weight
from .recipe import Recipe, expand
from .rotate import Folding, RotatedEmbedding

LAYERS: dict[str, Callable[..., nn.Module]] = {"int8": Int8Linear, "bnb8": bnb8, "nf4": nf4}


def swap(model: nn.Module, recipe: Recipe) -> list[str]:
    """Exchange the recipe's layers in a model on the meta device; returns their names.

    Raises ValueError for a name that no linear layer has, MissingPackageError without bitsandbytes.
    """
    modules = dict(model.named_modules())
    names = _expanded(recipe.modules, modules)
    rotated = {*_expanded(recipe.rotated_inputs, names)}
    for name in names:
        layer = modules[name]
        if not isinstance(layer, nn.Linear):
            raise ValueError(f"{name} is a {type(layer).__name__}, and only linear layers can be {recipe.scheme}")
        with torch.device("meta"):
            kind = {"group": group_of(layer.in_features)} if name in rotated else {}
            layer = LAYERS[recipe.scheme](layer.in_features, layer.out_features, layer.bias is not None, **kind)
        model.set_submodule(name, layer.requires_grad_(False))
    if recipe.rotation:
        table = modules[recipe.rotation.table]
        with torch.device("meta"):
            model.set_submodule(recipe.rotation.table, RotatedEmbedding(table.num_embeddings, table.embedding_dim))
    return names


def _expanded(patterns: Iterable[str], names: Iterable[str]) -> list[str]:
    return [name for pattern in patterns for name in expand(pattern, names)]


class Change:
    """What the tensors of a checkpoint become in a model after `swap`, by name; with `done`, they are that already."""

    def __init__(self, model: nn.Module, recipe: Recipe, done: bool = False) -> None:
        modules = dict(model.named_modules())
        scales = {f"{n}.weight": f"{n}.scale" for n, layer in modules.items() if isinstance(layer, Int8Linear)}
        self.exact = {*scales.values()}  # tensors that stay float32 whatever the model's dtype
        self.scales = {} if done else scales
        self.groups = {name: modules[name.removesuffix(".weight")].group for name in scales}
        self.fold = Folding(recipe.rotation, list(modules)) if recipe.rotation and not done else None
        self.packs = {f"{n}.weight": layer for n, layer in modules.items() if is_packed(layer)}  # see bnb.packed
        self.reads = self.fold.norms if self.fold else set()
        self.gains: dict[str, Tensor] = {}  # the stored tensors called `reads`: give them before the first call

    def changes(self, name: str) -> bool:
        """Whether the tensor does not stay as it is stored."""
        return name in self.scales or (self.fold is not None and self.fold.changes(name))

    def planned(self, name: str, shape: tuple[int, ...]) -> dict[str, tuple[torch.dtype | None, tuple[int, ...]]]:
        """Type and shape of each tensor a stored one becomes; None is the type it is stored in."""
        if name in self.scales:
            return {name: (torch.int8, shape), self.scales[name]: (torch.float32, shape[:1])}
        mixed = self.fold is not None and name == self.fold.last
        return {name: (None, shape)} | ({self.fold.mix: (None, 2 * shape)} if mixed else {})

    def __call__(self, name: str, tensor: Tensor) -> dict[str, Tensor]:
        """The tensors as planned."""
        made = self.fold(name, tensor, self.gains) if self.fold else {name: tensor}
        if name in self.scales:
            whole, scale = quantise_weight(made[name], self.groups[name])
            return {name: whole, self.scales[name]: scale}
        return {each: value.to(tensor.dtype).contiguous() for each, value in made.items()}
