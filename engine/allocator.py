"""torch's allocator on a card, told once how to take memory: in segments that grow.

By default a block that is larger than all before takes a segment of its own, and what smaller ones have left behind
stays reserved. The rounds of a picture make blocks of ever larger sizes: of UniPic at 1024x1024 in bfloat16 the dry run
foresees 8.3 GiB reserved for 5.3 GiB in use, and 5.4 GiB where segments grow (`segments.py`).
"""

import os
import sys
from collections.abc import Callable

import torch

VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")  # in which users say themselves how it is to be
SETTING = "expandable_segments"


def grow_segments(device: torch.device, say: Callable[[str], object]) -> None:
    """Let segments grow for the rest of the process, if torch has taken nothing of the card yet.

    What a user has set stays as it is, and so does another allocator. Linux only: torch cannot do it elsewhere. `say`
    hears where the driver cannot, as on some virtual machines. Raises torch.OutOfMemoryError where nothing is free.
    """
    if device.type != "cuda" or sys.platform != "linux" or torch.version.cuda is None:
        return
    if any(name in os.environ for name in VARIABLES) or torch.cuda.get_allocator_backend() != "native":
        return
    if torch.cuda.memory_reserved(device):
        return
    torch._C._accelerator_setAllocatorSettings(f"{SETTING}:True")
    try:
        torch.empty(1, device=device)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        torch._C._accelerator_setAllocatorSettings(f"{SETTING}:False")
        why = str(error).partition("\n")[0]
        say(f"torch cannot let segments of memory grow on this GPU ({why}): more of it will be reserved than used")
