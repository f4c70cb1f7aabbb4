"""Where and in which precision a model runs, and what its memory did."""

import re
import sys
import traceback
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

from .errors import BudgetError, HostMemoryError, UnsupportedDeviceError, UsageError

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_LONG_NAMES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
# What torch, CUDA's libraries (CUBLAS_STATUS_ALLOC_FAILED) and convolutions without room to work say of memory.
_NO_MEMORY = re.compile("can't allocate memory|out of memory|ALLOC_FAILED|unable to find an engine", re.IGNORECASE)
_OF_THE_HOST = "DefaultCPUAllocator"  # by which torch's allocator for the CPU names itself when it fails
TAKE_LESS = 'add --quant int8 or, on a GPU, --vram auto (Engine keywords quant="int8", vram="auto")'
FREE_RAM = "end other programs, ask for less at once, or add --quant int8 or, under --vram, --drop-idle"


def as_device(name: str | torch.device) -> torch.device:
    """auto takes a CUDA device when there is one; a CUDA device has its number. Raises UnsupportedDeviceError."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError):
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise UnsupportedDeviceError(f"device {name!r} is not supported", "use auto, cpu, cuda or cuda:N")
    if device.type == "cuda":
        found = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= found:
            raise UnsupportedDeviceError(
                f"device {name!r} is not here: torch {torch.__version__} sees {found} CUDA devices",
                "use cpu, or see `unipic-run doctor`",
            )
        if device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
    return device


def as_dtype(name: str | torch.dtype, device: torch.device) -> torch.dtype:
    """auto is bfloat16 on CUDA and float32 on the CPU. Raises UsageError."""
    if isinstance(name, torch.dtype):
        name = str(name).removeprefix("torch.")
    if name == "auto":
        name = "bf16" if device.type == "cuda" else "fp32"
    name = _LONG_NAMES.get(name, name)
    if name not in DTYPES:
        raise UsageError(f"dtype {name!r} is unknown", f"choose from auto, {', '.join(DTYPES)}")
    return DTYPES[name]


def current(device: torch.device) -> AbstractContextManager[object]:
    """Inside, kernels start on this device."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def dtype_name(dtype: torch.dtype) -> str:
    return next(name for name, known in DTYPES.items() if known == dtype)


def reset_memory_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def memory_peak(device: torch.device) -> int | None:
    """Bytes: the allocator's peak reservation on CUDA, the process's peak resident set on the CPU, None on Windows."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    if sys.platform == "win32":
        return None
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


@contextmanager
def out_of_memory(doing: str, remedy: str = TAKE_LESS) -> Iterator[None]:
    """Turns an allocator's failure into a BudgetError, raised only after the failed frames have let go.

    Of the machine's own memory it is a HostMemoryError.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # torch.OutOfMemoryError is a RuntimeError
        if not (isinstance(error, torch.OutOfMemoryError | MemoryError) or _NO_MEMORY.search(str(error))):
            raise
        reason = str(error).partition("\n")[0] or type(error).__name__
        of_the_host = isinstance(error, MemoryError) or _OF_THE_HOST in str(error)
        traceback.clear_frames(error.__traceback__)
        error.__traceback__ = None
    else:
        return
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if of_the_host:
        raise HostMemoryError(f"out of the machine's own memory (RAM) while {doing} ({reason})", FREE_RAM) from None
    raise BudgetError(f"out of memory while {doing} ({reason})", remedy) from None
