"""The account of one recorded case: every tensor in it is compared, or there is a reason why not."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

INJECTED = "played into the engine; what follows from it is compared"  # a reason to leave a tensor
EXACT = 0.0
NETWORK = 2e-4  # absolute: intermediates, tokens, images, logits
UNIT = 5e-5  # absolute: single modules, preprocessed pixels
TABLE = 1e-12  # relative: float64 constants
SCALED = 1e-4  # of the largest value: every tensor of a record that says so
INFORMATIVE = math.inf  # reported, whatever it is
OFF_BY_ONE = 0.005  # share of 8-bit values that may be one level off, none more


@dataclass(frozen=True)
class Check:
    """One comparison. `error` is infinite where shapes differ or NaN appears."""

    error: float
    tolerance: float
    note: str = ""

    @property
    def passed(self) -> bool:
        return self.error <= self.tolerance


class Ledger:
    """Compares what a case holds with what was computed, name by name."""

    def __init__(self, recorded: Mapping[str, Tensor]) -> None:
        self.recorded = recorded
        self.checks: dict[str, Check] = {}
        self.not_computed: dict[str, str] = {}  # name -> reason; also for parts of tensors that were compared

    def compare(self, name: str, ours: Any, tolerance: float, recorded: Any = None) -> None:
        """Largest absolute error of `ours` against the recorded tensor `name`, or against the part of it given."""
        recorded = self.recorded[name] if recorded is None else recorded
        self.checks[name] = _difference(ours, recorded, tolerance, relative=False)

    def compare_relative(self, name: str, ours: Any, recorded: Any = None) -> None:
        recorded = self.recorded[name] if recorded is None else recorded
        self.checks[name] = _difference(ours, recorded, TABLE, relative=True)

    def compare_scaled(self, name: str, ours: Any, recorded: Any = None, tolerance: float = SCALED) -> None:
        """Largest absolute error in units of the largest recorded value."""
        recorded = self.recorded[name] if recorded is None else recorded
        error = _difference(ours, recorded, tolerance, relative=False)
        largest = _wide(recorded).abs().max().item() if error.note != "empty" else 1.0
        self.limit(name, error.error / (largest or 1.0), tolerance, error.note)

    def compare_levels(self, name: str, ours: Tensor, recorded: Tensor, share_off: float = OFF_BY_ONE) -> None:
        """8-bit pictures: the share of values that are off, infinite if any is off by more than one level."""
        levels = _difference(ours, recorded, 1.0, relative=False)
        share = (ours != recorded).double().mean().item() if levels.passed else math.inf
        self.limit(name, share, share_off, levels.note or f"share of values that are off, by {levels.error:g} level")

    def limit(self, name: str, error: float, tolerance: float, note: str = "") -> None:
        """A distance that was measured elsewhere."""
        self.checks[name] = Check(error if math.isfinite(error) else math.inf, tolerance, note)

    def leave(self, name: str, reason: str) -> None:
        """`name`, or a part of it, is not computed."""
        self.not_computed[name] = reason

    def failures(self) -> list[str]:
        missed = [name for name, check in self.checks.items() if not check.passed]
        silent = [name for name in self.recorded if name not in self.checks and name not in self.not_computed]
        nothing = [] if self.checks else ["nothing was compared"]
        return missed + [f"{name}: recorded but neither compared nor explained" for name in silent] + nothing

    def report(self) -> dict[str, Any]:
        """JSON-ready; what is infinite is null."""
        tensors = {
            name: {
                "error": _number(check.error),
                "tolerance": _number(check.tolerance),
                "passed": check.passed,
            }
            | ({"note": check.note} if check.note else {})
            for name, check in self.checks.items()
        }
        failures = self.failures()
        return {
            "passed": not failures,
            "failures": failures,
            "compared": len(tensors),
            "tensors": tensors,
            "not_computed": self.not_computed,
        }


def _difference(ours: Any, recorded: Any, tolerance: float, relative: bool) -> Check:
    ours, recorded = _wide(ours), _wide(recorded)
    if ours.shape != recorded.shape:
        return Check(math.inf, tolerance, f"shape {list(ours.shape)}, recorded {list(recorded.shape)}")
    if not ours.numel():
        return Check(0.0, tolerance, "empty")
    error = (ours - recorded).abs()
    if relative:
        error = error / recorded.abs().clamp_min(torch.finfo(torch.float64).tiny)
    worst = error.max().item()  # NaN wins over every number
    return Check(worst if math.isfinite(worst) else math.inf, tolerance)


def _number(x: float) -> float | None:
    return x if math.isfinite(x) else None


def _wide(value: Any) -> Tensor:
    return torch.as_tensor(value).detach().cpu().double()
