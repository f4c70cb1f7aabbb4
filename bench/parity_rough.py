"""Recorded cases through a model in fewer bits: how far each tensor is, beside what float32 itself is away.

Informative: distances are relative, the norm of the difference over the norm of the record, and the bounds are loose,
three to four times what the small random model of the records shows in int8. They say that quantisation is not broken
(scales one row off: 0.2 to 0.8 in every quantised unit), never that pictures are good. What no quantised layer has
touched is held to float32's own error, and what is whole by nature (masks, positions, ids, schedules) to equality. An
answer's words may differ: one id is enough, and all behind it is left out.
"""

from dataclasses import dataclass, replace
from fnmatch import fnmatch
from typing import Any

import torch
from torch import Tensor
from unipic_run.bench.parity_case import Case
from unipic_run.bench.parity_ledger import EXACT, INFORMATIVE, Check, Ledger

UNTOUCHED = 1e-4
# By name, the first that fits. In brackets the worst that the recorded cases gave in int8, with either attention.
BOUNDS: tuple[tuple[str, float], ...] = (
    *((name, UNTOUCHED) for name in ("vae.*", "pos.*", "proj_*", "head.t_*", "*pixels", "*latent_tokens")),
    ("head.out*", 0.03),  # (0.007)
    ("loop.*_bf16_net", INFORMATIVE),
    ("loop.*", 0.05),  # (0.008) a hundred steps of the head
    ("psample.*.pred_xstart", 0.2),  # (0.05) at high noise eps times hundreds
    ("psample.*", 0.05),  # (0.011)
    ("mar.*", 0.06),  # (0.018)
    ("llm.*", 0.1),  # (0.027)
    ("step*.enc", 0.2),  # (0.049) of tokens that earlier rounds have made
    ("*x_con", 0.06),  # (0.014)
    ("x_enc", 0.06),  # (0.015)
    ("*z_enc", 0.06),  # (0.014)
    ("inputs_embeds", 0.06),  # (0.014)
    ("step*.*z", 0.15),  # (0.038)
    ("logits", 0.2),  # (0.052)
    ("scores", 0.2),  # (0.052)
    ("decoded", INFORMATIVE),
    ("*", 0.4),  # (0.118) what follows from all of it: caches, hidden states, tokens, pictures
)
WEIGHTLESS = ("tokenizer", "mask_schedule", "rope", "preprocess")  # kinds of cases
IN_BFLOAT16 = "bf16_informative"


@dataclass(frozen=True)
class How:
    """What stands in place of the float32 model."""

    quant: str
    attention: str

    @property
    def rough(self) -> bool:
        return (self.quant, self.attention) != ("none", "sdpa")


class RoughLedger(Ledger):
    """Relative distances against `BOUNDS`; equality where equality is asked."""

    def compare(self, name: str, ours: Any, tolerance: float, recorded: Any = None) -> None:
        if name == "generated_ids":
            return self.compare_ids(ours, self.recorded[name])
        if tolerance == EXACT:
            return super().compare(name, ours, tolerance, recorded)
        exact = (self.recorded[name] if recorded is None else recorded).detach().cpu().double()
        ours = torch.as_tensor(ours).detach().cpu().double()
        away = (ours - exact).norm() / (exact.norm() or 1.0) if ours.shape == exact.shape else torch.tensor(torch.inf)
        self.limit(name, away.item(), bound(name))

    def compare_levels(self, name: str, ours: Tensor, recorded: Tensor, share_off: float = INFORMATIVE) -> None:
        self.compare(name, ours, bound(name), recorded)

    def compare_ids(self, ours: Any, recorded: Tensor) -> None:
        """The share of an answer's tokens from the first that differs on."""
        pairs = list(zip(ours[0], recorded[0].tolist(), strict=False))
        same = next((at for at, (a, b) in enumerate(pairs) if a != b), len(pairs))
        self.checks["generated_ids"] = Check(1 - same / max(len(ours[0]), recorded.shape[1]), INFORMATIVE)

    def limit(self, name: str, error: float, tolerance: float, note: str = "") -> None:
        super().limit(name, error, bound(name), note)


def bound(name: str) -> float:
    return next(bound for pattern, bound in BOUNDS if fnmatch(name, pattern))


def roughly(case: Case) -> Case:
    return replace(case, kept_by=RoughLedger)


def beside(report: dict[str, Any], exact: dict[str, Any]) -> dict[str, Any]:
    """The report of a case with the error of each tensor in float32, measured alike."""
    for name, check in report["tensors"].items():
        check["float32"] = exact["tensors"].get(name, {}).get("error")
    return report


def nothing_to_see(case: Case) -> str:
    """Why a case is left out, if it is."""
    if case.kind in WEIGHTLESS:
        return "no weights take part"
    return "recorded in bfloat16" if case.kind == IN_BFLOAT16 else ""
