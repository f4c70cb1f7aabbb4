"""What of a card an engine may use, and what of that is not for tensors.

    bound = bound_on(device, "6")                      # bytes of the card, CUDA's context among them
    budget = overhead(card, device).usable(bound)      # of these, for weights and activations

CUDA's context is measured where an engine under a bound is the first in its process to use the device, and assumed
elsewhere.
"""

import math
import re
from dataclasses import dataclass

import torch

from .device import out_of_memory
from .errors import BudgetError, UsageError
from .gpus import GIB, Card
from .nvml import free_bytes

AUTO = "auto"
CONTEXT = GIB // 2  # bytes of a card that CUDA itself takes; assumed where it was not measured
LATER = GIB // 8  # by which a new context still grows: libraries load their kernels at first use; heuristic
CONTEXTS = (GIB // 16, 2 * GIB)  # between these a context was measured; else others took or freed memory meanwhile
SLACK = 0.94  # share of the rest that tensors may take: the allocator cannot use every byte; heuristic, never measured
MARGIN = GIB // 2  # of what is free, what `auto` leaves to other programs, which may want more later; heuristic
BUSY = "end what else uses it (nvidia-smi shows that), or take --device cpu"

_measured: dict[torch.device, int] = {}  # bytes of the context, for the rest of the process


@dataclass(frozen=True)
class Overhead:
    """Bytes of a card that are not for weights and activations: CUDA's context, and room for libraries to work in."""

    context: int
    workspace: int

    def usable(self, vram: int) -> int:
        """Of so many bytes of the card, those that weights and activations may take."""
        return int((vram - self.context) * SLACK) - self.workspace

    def needed(self, nbytes: int) -> float:
        """GiB of a card on which so many bytes are usable, rounded up to a hundredth."""
        return math.ceil(((nbytes + self.workspace) / SLACK + self.context) / GIB * 100) / 100


def overhead(card: Card, device: torch.device | None = None) -> Overhead:
    """On a card that is this device, or that is only spoken of.

    Room for convolutions is not among it: torch tries their algorithms until one finds enough.
    """
    return Overhead(CONTEXT if device is None else context_on(device), card.workspace_bytes)


def context_on(device: torch.device) -> int:
    """Bytes that CUDA itself takes of a device: measured in this process, or assumed."""
    return _measured.get(device, CONTEXT)


def measure_context(device: torch.device) -> None:
    """Make CUDA's context, and remember what of the card that took. Does nothing the second time. Raises BudgetError.

    Where there was a context before, the driver does not tell, or others used the card meanwhile, it stays assumed.
    """
    if device.type != "cuda" or device in _measured:
        return
    uuid = str(torch.cuda.get_device_properties(device).uuid)
    before = free_bytes(uuid)
    with out_of_memory("starting CUDA", BUSY):
        torch.cuda.synchronize(device)
    after = free_bytes(uuid)
    if before is not None and after is not None:
        took = before - after - torch.cuda.memory_reserved(device)
        if CONTEXTS[0] <= took <= CONTEXTS[1]:
            _measured[device] = took + LATER


def as_vram(text: float | str) -> int:
    """Bytes of `8`, `8GiB` or `7.5`. Raises UsageError."""
    found = re.fullmatch(r"\s*(\d{1,4}(?:\.\d+)?)\s*(?:g|gb|gib)?\s*", str(text), re.IGNORECASE | re.ASCII)
    if not found or float(found[1]) == 0:
        raise UsageError(f"vram {text!r:.80} is no amount of memory", "give GiB, such as 8 or 7.5, or auto")
    return int(float(found[1]) * GIB)


def bound_of(card: Card, vram: float | str | None) -> int:
    """Bytes that may be used of a card that is only spoken of, with nothing else on it. Raises UsageError."""
    if vram is None or vram == AUTO:
        return card.vram_bytes - (MARGIN if vram else 0)
    return min(as_vram(vram), card.vram_bytes)


def free_on(device: torch.device) -> int:
    """Bytes of a GPU that are free, behind what CUDA itself has taken here, or takes now. Raises BudgetError."""
    with out_of_memory("looking at the GPU", BUSY):
        return torch.cuda.mem_get_info(device)[0]


def bound_on(device: torch.device, vram: float | str | None) -> int | None:
    """Bytes of the card that may be used: all that is free now less a margin for `auto`, None for no bound.

    On the CPU `auto` bounds nothing. Raises UsageError; BudgetError where next to nothing is free.
    """
    if vram is None or (vram == AUTO and device.type != "cuda"):
        return None
    if vram == AUTO:
        free = free_on(device)
        if free <= MARGIN + CONTEXT:
            raise BudgetError(f"{free / GIB:.1f} GiB of the GPU are free, too little to work in", BUSY)
        return free - MARGIN + context_on(device)
    wanted = as_vram(vram)
    if device.type != "cuda":
        raise UsageError(f"vram bounds what a GPU is used for, and the device is {device}", "leave it out")
    if wanted <= 2 * CONTEXT:
        raise UsageError(f"vram {wanted / GIB:g} GiB is little more than CUDA itself takes", "give more than 1")
    return min(wanted, torch.cuda.get_device_properties(device).total_memory)
