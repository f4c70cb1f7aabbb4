"""Memory of a card that is taken away, so that a program has no more of it than a smaller card would give.

Torch's own limit (`set_per_process_memory_fraction`) holds for torch's allocator alone. What libraries, kernels and
graphs take beside it fails only where the card really has no more: therefore the rest of it is taken here, through
the driver, where torch neither sees nor counts it.
"""

import ctypes
import sys
from collections.abc import Callable

import torch
from unipic_run.engine.budget import context_on, measure_context
from unipic_run.engine.errors import BudgetError, UsageError
from unipic_run.engine.gpus import GIB

STEP = 2**21  # bytes: how finely a card's memory is given out


def ballast_bytes(free: int, vram: int, context: int) -> int:
    """How much of `free` to take, so that of a card of `vram` bytes what CUDA itself has not taken is left."""
    return max(0, free - (vram - context)) // STEP * STEP


def drop_ballast(device: torch.device, vram: int, take: Callable[[int], int] | None = None) -> int:
    """Take what `device` has above `vram` bytes, for as long as the process lives; returns how much that was.

    `take(nbytes)` allocates and returns the driver's error code, 0 for none. Raises UsageError, BudgetError.
    """
    if device.type != "cuda":
        raise UsageError(f"ballast is for a GPU, and the device is {device}", "leave it out")
    measure_context(device)  # and make it: it then counts as taken
    free, context = torch.cuda.mem_get_info(device)[0], context_on(device)
    if free < vram - context:
        what = f"{free / GIB:.2f} GiB of the card are free, less than --vram {vram / GIB:g} is to have"
        raise BudgetError(what, "end what else uses it, or measure with less")
    nbytes = ballast_bytes(free, vram, context)
    with torch.cuda.device(device):
        error = (take or driver_takes)(nbytes) if nbytes else 0
    if error:
        raise BudgetError(f"the driver refuses {nbytes / GIB:.2f} GiB of ballast (error {error})", "end other programs")
    return nbytes


def driver_takes(nbytes: int) -> int:
    """Allocates in the current context, which torch shares; never executed on a card so far."""
    driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    address = ctypes.c_uint64()
    return driver.cuMemAlloc_v2(ctypes.byref(address), ctypes.c_size_t(nbytes))
