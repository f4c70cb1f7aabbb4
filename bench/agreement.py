"""Whether an operator's kernel agrees with its reference, asked by the tests and before anything is timed.

The reference runs in float64, the kernel and torch's path in the dtype of the case. An error is the norm of the
difference over the norm of the reference, and that of the largest element over the largest of the reference. The
kernel's may be 1.25 times torch's in the same dtype, or 1e-6 where torch makes none; attention whose queries and keys
become int8 inside may differ by 2e-2. Whole numbers with scales are compared as what they stand for.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from unipic_run.kernels._op import Operator
from unipic_run.kernels._registry import Check

TIMES_TORCH = 1.25
NOTHING = 1e-6
INT8_ATTENTION = 2e-2


@dataclass(frozen=True)
class Error:
    """Of one result, relative; infinite when it is not finite where the reference is."""

    mean: float  # ||y - r|| / ||r||
    largest: float  # max |y - r| / max |r|


@dataclass(frozen=True)
class Agreement:
    """Errors of each result against the reference."""

    kernel: list[Error]
    torch: list[Error]
    allowed: float  # whatever torch's error is

    @property
    def holds(self) -> bool:
        return all(
            ours <= max(TIMES_TORCH * theirs + NOTHING, self.allowed)
            for kernel, path in zip(self.kernel, self.torch, strict=True)
            for ours, theirs in ((kernel.mean, path.mean), (kernel.largest, path.largest))
        )


def agreement(check: Check, device: torch.device | str, kernel: Callable[..., Any] | None = None) -> Agreement:
    """`kernel` is the operator's own by default: under `interpreted` on a CPU, else on a CUDA device."""
    operator = check.operator
    with torch.inference_mode():
        ours = outcome(operator, kernel or operator, check.case.make(device))
        paths = outcome(operator, operator.torch, check.case.make(device))
        exact = outcome(operator, check.reference or operator.torch, [wide(x) for x in check.case.make(device)])
        pairs = scaled(ours)
        exact = values(exact, pairs) if len(exact) == len(ours) else exact
        ours, paths = values(ours, pairs), values(paths, pairs)
        assert len(ours) == len(exact), f"{check}: {len(ours)} results, but {len(exact)} of the reference"
        compared = list(zip(ours, paths, exact, strict=True))
    quantises = "attention" in operator.name and "int8" in operator.name
    return Agreement(
        [error(x, e) for x, _, e in compared], [error(x, e) for _, x, e in compared], INT8_ATTENTION * quantises
    )


def outcome(operator: Operator, function: Callable[..., Any], arguments: Sequence[Any]) -> list[Tensor]:
    """The tensors that a call returns, and the arguments that it writes to."""
    result = function(*arguments)
    returned = [result] if isinstance(result, Tensor) else list(result or ())
    return returned + operator.written(arguments)


def wide(x: Any) -> Any:
    """An argument in float64, if it is a floating point number or says to compute in one."""
    if isinstance(x, Tensor) and x.is_floating_point():
        return x.double()
    return torch.float64 if isinstance(x, torch.dtype) and x.is_floating_point else x


def scaled(results: Sequence[Tensor]) -> list[int]:
    """Where int8 results stand that are followed by their scales."""
    return [
        at
        for at, (x, scale) in enumerate(pairwise(results))
        if x.dtype == torch.int8 and scale.dtype == torch.float32 and scale.shape == x.shape[: scale.dim()]
    ]


def values(results: Sequence[Tensor], pairs: Sequence[int]) -> list[Tensor]:
    """The results in float64, whole numbers and their scales multiplied into one."""
    out, at = [], 0
    while at < len(results):
        x = results[at].double()
        if at in pairs:
            at += 1
            scale = results[at].double()
            x = x * scale[(..., *[None] * (x.dim() - scale.dim()))]
        out.append(x)
        at += 1
    return out


def error(x: Tensor, exact: Tensor) -> Error:
    assert x.shape == exact.shape, f"{tuple(x.shape)} instead of {tuple(exact.shape)}"
    off = x - exact
    if not x.numel() or not off.any():
        return Error(0.0, 0.0)
    if not off.isfinite().all():
        return Error(float("inf"), float("inf"))
    mean, largest = off.norm() / exact.norm(), off.abs().max() / exact.abs().max()
    return Error(mean.item(), largest.item())
