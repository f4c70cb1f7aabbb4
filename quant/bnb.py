"""bitsandbytes as a second backend and a yardstick: LLM.int8() and 4-bit NormalFloat layers, quantised while loading.

The package is optional and imported only when one of its schemes is asked for. Nothing of it is written to disk.
"""

import logging
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

THRESHOLD = 6.0  # LLM.int8(): columns of activations that reach this stay floating


class MissingPackageError(RuntimeError):
    """bitsandbytes is not installed, or does not work."""


def package() -> Any:
    """bitsandbytes. Raises MissingPackageError."""
    try:
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # else a line for every product with bf16 rows
        return import_module("bitsandbytes")
    except Exception as error:  # its compiled part may fail in any way
        reason = f"{type(error).__name__}: {error}".partition("\n")[0][:200]
        raise MissingPackageError(f"bitsandbytes cannot be used ({reason})") from None


def bnb8(in_features: int, out_features: int, bias: bool) -> nn.Module:
    layer = package().nn.Linear8bitLt
    return layer(in_features, out_features, bias=bias, has_fp16_weights=False, threshold=THRESHOLD)


def nf4(in_features: int, out_features: int, bias: bool) -> nn.Module:
    layer = package().nn.Linear4bit(in_features, out_features, bias=bias, quant_type="nf4")
    layer.support_avx512bf16_for_cpu = False  # where it repacks weights, first and later results differ, odd sizes fail
    return layer


def is_packed(layer: nn.Module) -> bool:
    """Whether the weight of a layer is in a format of bitsandbytes."""
    return type(layer).__module__.partition(".")[0] == "bitsandbytes"


def packed(layer: nn.Module, weight: Tensor, device: torch.device | str) -> nn.Parameter:
    """The parameter that holds `weight` (N, K), on the CPU, in the layer's format on `device`."""
    bnb = package()
    if isinstance(layer, bnb.nn.Linear4bit):
        return bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4", module=layer).to(device)
    return bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False).to(device)
