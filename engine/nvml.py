"""What the driver says of a card's memory, by NVML, which NVIDIA's drivers for Linux bring. Makes no CUDA context."""

import ctypes
from typing import Any

LIBRARY = "libnvidia-ml.so.1"


class Memory(ctypes.Structure):
    """NVML's nvmlMemory_t, in bytes."""

    _fields_ = [(name, ctypes.c_ulonglong) for name in ("total", "free", "used")]


def free_bytes(uuid: str, load: Any = ctypes.CDLL) -> int | None:
    """Of the card with this UUID, whoever uses the rest; None where the driver does not tell."""
    try:
        nvml = load(LIBRARY)
    except OSError:
        return None
    if nvml.nvmlInit_v2():
        return None
    try:
        card, memory = ctypes.c_void_p(), Memory()
        name = f"GPU-{uuid.removeprefix('GPU-')}".encode()
        failed = nvml.nvmlDeviceGetHandleByUUID(name, ctypes.byref(card))
        failed = failed or nvml.nvmlDeviceGetMemoryInfo(card, ctypes.byref(memory))
        return None if failed else memory.free
    finally:
        nvml.nvmlShutdown()
