"""What fits the cards of this machine, and how: predictions, as `plan` makes them, for what people ask for most.

A plan that is kept costs nothing. Others are made only as long as PATIENCE lasts, so that `doctor` stays quick: what
is left then is named with the command that plans it, and comes the next time.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from . import families
from .errors import BudgetError, UnsupportedDeviceError
from .estimate import Asked, ask_for, tasks_of
from .facts import Gpu
from .gpus import DEVICE_NAMES, GIB
from .placing import UNKNOWN
from .residency import describe

PATIENCE = 3.0  # seconds after which no dry run begins; one takes some more
WANTED = [(res, quant, task) for res in (1024, 512) for quant in ("none", "int8") for task in ("gen", "edit", "ask")]


@dataclass(frozen=True)
class Fit:
    """`line`: how it fits, why it does not, or the command that tells; the numbers are None where it is not planned."""

    gpu: str
    model: str
    task: str
    res: int
    quant: str
    state: str  # fits, too large, not planned
    line: str
    peak_bytes: int | None = None
    seconds: float | None = None


def fits_on(gpus: Sequence[Gpu], patience: float = PATIENCE) -> list[Fit]:
    """Of every card the released models: gen, edit and ask at two sizes, in bfloat16 and int8."""
    start, found = time.monotonic(), []
    for gpu in {gpu.name: gpu for gpu in gpus}.values():
        for model in families.FAMILIES:
            known = tasks_of(families.model(model))
            for res, quant, task in WANTED:
                if task not in known:
                    continue
                try:
                    asked = asked_on(gpu, model, task, res, quant)
                except UnsupportedDeviceError as error:  # a package that the model is made of is not installed
                    found.append(Fit(gpu.name, model, task, res, quant, "not planned", error.remedy))
                    continue
                found.append(fit_of(gpu, asked, quant, time.monotonic() - start < patience))
    return found


def asked_on(gpu: Gpu, model: str, task: str, res: int, quant: str) -> Asked:
    """All memory of the card counts, whoever uses it now."""
    card = DEVICE_NAMES.get(gpu.name)
    asked = ask_for(model, task, res=res, quant=quant, gpu=card.name if card else UNKNOWN)
    return replace(asked, vram_bytes=gpu.total)


def fit_of(gpu: Gpu, asked: Asked, quant: str, may_run: bool) -> Fit:
    how = asked.settings()
    what = gpu.name, how["model"], how["task"], how["res"], quant
    if not (may_run or asked.is_kept()):
        card = f"--gpu {asked.card.name} --vram {gpu.total / GIB:.1f}"
        return Fit(*what, "not planned", _command(how, quant, card))
    try:
        placement = asked.placement()
    except BudgetError as error:
        return Fit(*what, "too large", error.what)
    if gpu.name in DEVICE_NAMES:
        return Fit(*what, "fits", describe(placement), placement.peak, placement.seconds)
    line = describe(placement).rpartition(", about")[0]  # whose seconds would be another card's
    return Fit(*what, "fits", line, placement.peak)


def _command(how: dict[str, Any], quant: str, card: str) -> str:
    return f"unipic-run plan {how['task']} --model {how['model']} --res {how['res']} --quant {quant} {card}"


def told(fits: Sequence[Fit]) -> Iterator[str]:
    """Lines below the checks of `doctor`."""
    if not fits:
        yield "      fits       no GPU here: `unipic-run plan gen --gpu NAME` tells what fits a card, and how fast"
    for gpu, model in dict.fromkeys((fit.gpu, fit.model) for fit in fits):
        yield f"      fits       {model} on {gpu}, predicted from fixed rates, never measured:"
        for fit in fits:
            if (fit.gpu, fit.model) == (gpu, model):
                bits = "bf16" if fit.quant == "none" else fit.quant
                said = {"fits": "", "too large": "too large: ", "not planned": "not planned yet: "}[fit.state]
                yield f"{'':<17}{fit.task:<4} {fit.res:>4} {bits:<4}  {said}{fit.line}"
