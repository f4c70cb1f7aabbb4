"""Fill a module that was built on the meta device from a folder of safetensors, one tensor at a time."""

import math
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from .checkpoint import manifest
from .checkpoint.cache import again
from .checkpoint.differences import refuse_differences
from .checkpoint.manifest import Progress
from .errors import CorruptWeightsError, ModelMissingError


def load(
    module: nn.Module,
    folder: Path,
    device: torch.device | str,
    dtype: torch.dtype,
    on_progress: Progress | None = None,
) -> None:
    """Give every parameter and saved buffer of `module` its value from `folder`, which must carry a manifest.

    Floating tensors are cast to `dtype`; names and shapes must match exactly. Nothing is assigned if anything is wrong.
    Memory: the loaded tensors and one more. Raises CorruptWeightsError, ModelMissingError.
    """
    folder = Path(folder)
    manifest.check(folder)
    paths = sorted(folder.glob("*.safetensors"))
    if not paths:
        raise ModelMissingError(f"{folder} holds no safetensors", again(folder))
    wanted = module.state_dict()
    expected = {name: tuple(tensor.shape) for name, tensor in wanted.items()}
    refuse_differences(expected, _shapes(paths), str(folder))
    total, done = sum(map(math.prod, expected.values())), 0
    tensors: dict[str, torch.Tensor] = {}
    for path in paths:
        with _opened(path) as file:
            for name in file.keys():  # noqa: SIM118 (not a dict)
                tensors[name] = _read(file, path, name, wanted[name], device, dtype)
                done += tensors[name].numel()
                if on_progress is not None:
                    on_progress("load", done * dtype.itemsize, total * dtype.itemsize)
    module.load_state_dict(tensors, assign=True)
    module.requires_grad_(False)


def _shapes(paths: list[Path]) -> dict[str, tuple[int, ...]]:
    """Every tensor's shape from the headers alone."""
    shapes: dict[str, tuple[int, ...]] = {}
    for path in paths:
        with _opened(path) as file:
            for name in file.keys():  # noqa: SIM118
                if name in shapes:
                    raise CorruptWeightsError(f"tensor {name} is in two files, the second {path}", again(path.parent))
                shapes[name] = tuple(file.get_slice(name).get_shape())
    return shapes


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError, ValueError) as error:
        remedy = again(path.parent)
        raise CorruptWeightsError(f"{path} is not a whole safetensors file ({str(error)[:200]})", remedy) from None


def _read(
    file: Any, path: Path, name: str, like: torch.Tensor, device: torch.device | str, dtype: torch.dtype
) -> torch.Tensor:
    try:
        stored = file.get_tensor(name)
    except (SafetensorError, OSError, ValueError, RuntimeError, TypeError) as error:
        remedy = again(path.parent)
        raise CorruptWeightsError(f"{path}: tensor {name} cannot be read ({str(error)[:200]})", remedy) from None
    if stored.is_floating_point() != like.is_floating_point():
        what = f"{path}: tensor {name} is {stored.dtype}, which is no {like.dtype}"
        raise CorruptWeightsError(what, again(path.parent))
    wanted = dtype if stored.is_floating_point() else like.dtype
    # A copy: what stays mapped would crash the process if the file shrank, and would lock the file on Windows.
    tensor = stored.to(device=device, dtype=wanted, copy=True)
    if not all(torch.isfinite(chunk).all() for chunk in tensor.reshape(-1).split(2**24)):
        finite = all(torch.isfinite(chunk).all() for chunk in stored.reshape(-1).split(2**24))
        remedy = f"its values do not fit {wanted}: use bfloat16 or float32" if finite else again(path.parent)
        raise CorruptWeightsError(f"{path}: tensor {name} holds NaN or Inf", remedy)
    return tensor
