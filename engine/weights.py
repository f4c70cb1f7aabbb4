"""Fill a module that was built on the meta device from a folder of safetensors, one tensor at a time.

A checkpoint that holds its linear layers as they were released becomes any scheme while it streams by; one that
`convert --quant int8` wrote is read as it is.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from ..quant import bnb
from ..quant.recipe import NONE, SCHEMES, Recipe
from ..quant.swap import Change, swap
from .checkpoint import manifest
from .checkpoint.cache import again
from .checkpoint.differences import refuse_differences
from .checkpoint.manifest import Progress
from .checkpoint.shards import Shards
from .errors import CorruptWeightsError, UnsupportedDeviceError, UsageError

Where = torch.device | str
CHUNK = 2**24  # elements looked at at once


def as_scheme(name: str | None) -> str | None:
    """A scheme that can run here, or None for the checkpoint's own. Raises UsageError, UnsupportedDeviceError."""
    if name is not None and name not in SCHEMES:
        raise UsageError(f"quant {name!r:.80} is unknown", f"choose from auto, {', '.join(SCHEMES)}")
    if name in ("bnb8", "nf4"):
        try:
            bnb.package()
        except bnb.MissingPackageError as error:
            raise UnsupportedDeviceError(f"quant {name}: {error}", "install unipic-run[bnb], or use int8") from None
    return name


def stored_scheme(folder: Path) -> str:
    """How a folder in our format stores its linear layers: none or int8. Raises CorruptWeightsError."""
    manifest.check(folder)
    with Shards(folder) as shards:
        return shards.scheme


def prepared(build: Callable[[], nn.Module], recipe: Recipe) -> nn.Module:
    """What `build` makes on the meta device, with the recipe's layers. Raises UsageError for sizes that do not fit."""
    with torch.device("meta"):
        module = build()
    try:
        swap(module, recipe)
    except ValueError as error:
        raise UsageError(f"this model cannot be {recipe.scheme}: {error}", "use quant none") from None
    return module


def load(
    module: nn.Module,
    folder: Path,
    device: Where,
    dtype: torch.dtype,
    on_progress: Progress | None = None,
    recipe: Recipe = NONE,
    packed: Where | None = None,
    parts: Sequence[str] = (),
    which: str = "",
) -> None:
    """Give every parameter and saved buffer of `module` its value from `folder`, which must carry a manifest.

    `module` is what `swap` made of it by `recipe`. Floating tensors are cast to `dtype`, except the scales of int8
    weights; names and shapes must match exactly. Nothing is assigned if anything is wrong. `packed`: where weights in a
    format of bitsandbytes go, which cannot move afterwards; by default to `device` like all others. `parts`: the only
    ones to be filled; the others stay as they are. `which` set of weights: as for Shards.
    Memory: the loaded tensors, and one as it is stored, with its float32 copies where it is rotated or quantised.
    Raises CorruptWeightsError, ModelMissingError, UsageError.
    """
    folder = Path(folder)
    manifest.check(folder)
    with Shards(folder, which) as shards:
        if shards.scheme not in ("none", recipe.scheme):
            remedy = f"leave quant out, or convert the original checkpoint again for quant {recipe.scheme}"
            raise UsageError(f"{folder} is stored in {shards.scheme}, which cannot become {recipe.scheme}", remedy)
        change = Change(module, recipe, done=shards.scheme != "none")
        inside, done = tuple(f"{part}." for part in parts) or ("",), 0
        filling = _Filling(module, shards, (device, device if packed is None else packed), dtype, change, inside)
        shapes = {name: shape for name, shape in shards.shapes.items() if any_in(inside, change.planned(name, shape))}
        total = sum(map(math.prod, shapes.values()))
        for name, shape in shapes.items():
            filling.take(name)
            done += math.prod(shape)
            if on_progress is not None:
                on_progress("load", done * dtype.itemsize, total * dtype.itemsize)
    filling.assign()


def any_in(inside: tuple[str, ...], names: Iterable[str]) -> bool:
    return any(name.startswith(inside) for name in names)


class _Filling:
    """Tensors on their way from the files into a module, all of them assigned at once."""

    def __init__(
        self,
        module: nn.Module,
        shards: Shards,
        devices: tuple[Where, Where],
        dtype: torch.dtype,
        change: Change,
        inside: tuple[str, ...],
    ) -> None:
        """`devices`: of all tensors but the packed ones, and of those. `inside`: how names begin that will be filled.

        Only these are compared: others may be packed by now, and have other shapes.
        """
        self.module, self.shards, self.devices, self.change, self.inside = module, shards, devices, change, inside
        wanted = module.state_dict()
        planned = {n: p for name, shape in shards.shapes.items() for n, p in change.planned(name, shape).items()}
        expected = {name: tuple(tensor.shape) for name, tensor in wanted.items() if name.startswith(inside)}
        found = {name: shape for name, (_, shape) in planned.items() if name.startswith(inside)}
        refuse_differences(expected, found, str(shards.folder))
        self.types = {name: dtype if like.is_floating_point() else like.dtype for name, like in wanted.items()}
        self.types |= dict.fromkeys(change.exact, torch.float32)
        change.gains = {name: self.stored(name) for name in change.reads}
        self.tensors: dict[str, Tensor] = {}

    def take(self, name: str) -> None:
        """Read one tensor and make what the module wants of it."""
        packs, stored = self.change.packs, self.stored(name)
        place = "cpu" if name in packs else self.devices[0]
        # A copy: what stays mapped would crash the process if the file shrank, and would lock the file on Windows.
        if self.change.changes(name):
            made = self.change(name, self.checked(name, stored, stored.to(device=place, copy=True)))
            for each, value in made.items():
                self.tensors[each] = self.checked(name, value, value.to(self.types[each]))
        else:
            copy = stored.to(device=place, dtype=self.types[name], copy=True)
            self.tensors[name] = self.checked(name, stored, copy)
        if name in packs:
            self.tensors[name] = bnb.packed(packs[name], self.tensors[name], self.devices[1])

    def stored(self, name: str) -> Tensor:
        tensor, wanted = self.shards.read(self.shards.records[name]), self.types[name]
        floating = self.change.changes(name) or wanted.is_floating_point
        if not (tensor.is_floating_point() if floating else tensor.dtype == wanted):
            what = f"{self.shards.where(name)} is {tensor.dtype}, which is no {'floating type' if floating else wanted}"
            raise CorruptWeightsError(what, again(self.shards.folder))
        return tensor

    def checked(self, name: str, before: Tensor, after: Tensor) -> Tensor:
        if not all_finite(after):
            remedy = f"its values do not fit {after.dtype}: use bfloat16 or float32"
            remedy = remedy if all_finite(before) else again(self.shards.folder)
            raise CorruptWeightsError(f"{self.shards.where(name)} holds NaN or Inf", remedy)
        return after

    def assign(self) -> None:
        """What was taken of the inside; a stored tensor may become others besides."""
        tensors = {name: tensor for name, tensor in self.tensors.items() if name.startswith(self.inside)}
        packed = {name: tensors.pop(name) for name in self.change.packs if name in tensors}
        self.module.load_state_dict(tensors, assign=True, strict=not packed and self.inside == ("",))
        for name, parameter in packed.items():
            layer, _, leaf = name.rpartition(".")
            setattr(self.module.get_submodule(layer), leaf, parameter)
        self.module.requires_grad_(False)


def all_finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or all(torch.isfinite(part).all() for part in tensor.reshape(-1).split(CHUNK))
