"""What Triton's failures mean to a user: which of them torch may stand in for, why in a few words, and what helps.

A kernel that cannot be compiled or loaded has not run, so torch can do its work. A device that fails at work is another
matter: what was computed before may be lost, and whatever comes next would fail too, so nothing may hide that.
"""

import re
import subprocess
from dataclasses import dataclass

import torch


class KernelWarning(UserWarning):
    """A kernel cannot run here, and torch does its work."""


class NotCompiled(RuntimeError):
    """Triton could not compile or load a kernel; the cause says why."""


@dataclass(frozen=True)
class Failure:
    """`kind` is the same for all kernels that fail alike; `everywhere`: no other kernel can be had either."""

    kind: str
    reason: str
    remedy: str
    everywhere: bool = True

    def sentence(self, kernel: str) -> str:
        if self.everywhere:
            return f"the kernels do not run here ({self.reason}): torch does their work, more slowly; {self.remedy}"
        others = "torch does its work, and that of others that fail alike"
        return f"the kernel {kernel} does not run here ({self.reason}): {others}; {self.remedy}"


DOCTOR = "`unipic-run doctor` looks for the cause"
DEVICE = re.compile(r"CUDA (driver )?error|Triton Error \[CUDA\]|device-side assert")
# In the driver's words, what it does not take although Triton has made it. Nothing has run then.
UNLOADABLE = re.compile(
    "device kernel image is invalid|no kernel image is available|PTX JIT compilation failed|unsupported toolchain"
    "|symbol not found|too many resources requested for launch"
)


def of_the_device(error: BaseException) -> bool:
    """Whether memory ran out or the device failed at work, which torch would not survive either."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    text = str(error)
    return DEVICE.search(text) is not None and not UNLOADABLE.search(text)


def failure(error: BaseException) -> Failure:
    """What is wrong, of an error that is not the device's."""
    text = str(error).strip()
    if "C compiler" in text:
        return Failure("compiler", "no C compiler was found", f"install gcc, or name one in CC; {DOCTOR}")
    if isinstance(error, subprocess.CalledProcessError):  # its text names a temporary file, another one each time
        remedy = f"install the headers of this Python (python3-dev); {DOCTOR}"
        return Failure("compiler", "the C compiler failed", remedy)
    if isinstance(error, OSError) and error.strerror and not isinstance(error, FileNotFoundError):
        remedy = "Triton needs a folder that it can write: set TRITON_CACHE_DIR to one"
        return Failure("folder", f"{error.strerror}: {error.filename}", remedy)
    lines = [line.strip() for line in text.splitlines() if line.strip(" ^")] or ["no further word"]
    if isinstance(error, OSError | ImportError) or "active drivers" in text:
        return Failure("driver", lines[0][:200], DOCTOR)
    if UNLOADABLE.search(text):
        return Failure("loading", lines[0][:200], "update the driver", everywhere=False)
    reason = f"{type(error).__name__}: {lines[-1]}"[:200]  # the source lies in between
    return Failure(reason, reason, DOCTOR, everywhere=False)
