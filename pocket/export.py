"""The trained model as a folder that the engine loads: bfloat16 weights, config, tokenizer, manifest."""

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..engine.checkpoint import manifest
from ..engine.checkpoint.config_file import write_config_file
from ..engine.models.unipic.config import UniPicConfig
from .tokenizer import pocket_tokenizer

MOST_BYTES = 20 * 2**20


def export(folder: Path, config: UniPicConfig, weights: dict[str, Tensor], told: dict[str, object]) -> None:
    """Write or replace `folder`; `told` is what its manifest says of the training. Raises ValueError when too large."""
    tensors = {name: tensor.detach().to("cpu", torch.bfloat16).contiguous() for name, tensor in weights.items()}
    size = sum(2 * tensor.numel() for tensor in tensors.values())
    if size > MOST_BYTES:
        raise ValueError(f"the weights take {size} bytes, at most {MOST_BYTES} may ship: make the model smaller")
    readme = folder / "README.md"
    kept = readme.read_bytes() if readme.exists() else None
    with manifest.locked(folder), manifest.publishing(folder, told, replace=True) as fresh:
        write_config_file(fresh, "unipic", config.to_json())
        save_file(tensors, fresh / "model.safetensors", {"format": "pt"})
        (fresh / "model.safetensors").chmod(0o644)  # safetensors writes for the owner alone
        pocket_tokenizer().save(str(fresh / "tokenizer.json"))
        if kept is not None:
            (fresh / "README.md").write_bytes(kept)
