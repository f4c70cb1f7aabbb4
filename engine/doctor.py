"""What works on this machine, what does not, and the fix: each check is a pure function of the facts.

`fail` means that the engine cannot do anything useful here, `warn` that it works but slower or not yet.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

from .facts import Facts
from .gpus import GIB

LITTLE, PLENTY = 1 * GIB, 20 * GIB  # free disk: too little to store anything; the released files and their conversion
_CUDA_TORCH = "install the CUDA build of torch: the install selector on pytorch.org gives the command for {system}"


@dataclass(frozen=True)
class Check:
    name: str
    state: str  # ok, warn, fail
    what: str
    fix: str = ""

    def text(self) -> str:
        line = f"{self.state:<4}  {self.name:<9}  {self.what}"
        return f"{line}\n{'':<17}fix: {self.fix}" if self.fix else line


def examine(facts: Facts) -> list[Check]:
    return [check(facts) for check in CHECKS]


def check_python(facts: Facts) -> Check:
    what = f"{'.'.join(map(str, facts.python))} on {facts.system} {facts.machine}"
    if facts.python < (3, 11):
        return Check("python", "fail", f"{what} is too old", "use Python 3.11 or later")
    return Check("python", "ok", what)


def check_torch(facts: Facts) -> Check:
    fix = _CUDA_TORCH.format(system=facts.system)
    if facts.torch is None:
        return Check("torch", "fail", f"cannot be imported ({facts.torch_error})", "install unipic-run again")
    if facts.torch_cuda is None:
        what = f"{facts.torch}, CPU only"
        if facts.nvidia_smi and facts.system in ("Linux", "Windows"):
            return Check("torch", "warn", f"{what}, but an NVIDIA driver is here: the GPU is not used", fix)
        return Check("torch", "ok", what)
    what = f"{facts.torch}, built for CUDA {facts.torch_cuda}"
    if facts.gpus:
        return Check("torch", "ok", what)
    if facts.nvidia_smi:
        driver = f"driver {facts.driver}" if facts.driver else "the driver"
        return Check("torch", "warn", f"{what}, sees no GPU: {driver} may be too old for it", "update the driver")
    return Check("torch", "ok", f"{what}, no NVIDIA driver here: the CPU is used")


def check_gpu(facts: Facts) -> Check:
    if not facts.gpus:
        return Check("gpu", "ok", "none that torch can use: everything runs on the CPU, slowly")
    rows = [
        f"{gpu.name}, compute capability {gpu.capability[0]}.{gpu.capability[1]}, "
        f"{gpu.free / GIB:.1f} of {gpu.total / GIB:.1f} GiB free"
        for gpu in facts.gpus
    ]
    what = "; ".join(rows) + (f"; driver {facts.driver}" if facts.driver else "")
    if not all(runs_on(facts.torch_archs, gpu.capability) for gpu in facts.gpus):
        has = ", ".join(facts.torch_archs) or "nothing"
        what = f"{what}: this torch has no code for it (only {has})"
        return Check("gpu", "fail", what, f"{_CUDA_TORCH.format(system=facts.system)}; --device cpu works now")
    if any(gpu.capability < (8, 0) for gpu in facts.gpus):
        return Check("gpu", "warn", f"{what}: too old for fast bfloat16", "try --dtype fp16")
    return Check("gpu", "ok", what)


def check_triton(facts: Facts) -> Check:
    needed = bool(facts.gpus)
    if facts.triton is None:
        why = facts.triton_error or "not installed"
        if not needed:
            return Check("triton", "ok", f"{why}; it is of use on a GPU only")
        package = "triton-windows" if facts.system == "Windows" else "triton"
        return Check("triton", "warn", f"{why}: plain torch is used instead", f"pip install {package}")
    if needed and facts.triton_wanted and facts.triton != facts.triton_wanted:
        what = f"{facts.triton}, but torch {facts.torch} needs {facts.triton_wanted}"
        return Check("triton", "warn", what, f"pip install triton=={facts.triton_wanted}")
    return Check("triton", "ok", facts.triton)


def check_compiler(facts: Facts) -> Check:
    if facts.compiler and (facts.python_headers or facts.system != "Linux"):
        return Check("compiler", "ok", facts.compiler)
    missing = "Python.h is missing" if facts.compiler else "no C compiler (cc, gcc, clang)"
    if not facts.gpus or facts.system != "Linux":
        return Check("compiler", "ok", f"{missing}; only Triton on a Linux GPU machine needs it")
    package = "the headers of this Python (python3-dev)" if facts.compiler else "gcc"
    return Check("compiler", "warn", f"{missing}: Triton kernels cannot start", f"install {package}")


def check_attention(facts: Facts) -> Check:
    extras = ", ".join(f"{name} {version}" for name, version in facts.extras.items() if version)
    return Check("attention", "ok", f"{facts.attention}; optional packages: {extras or 'none'}")


def check_cache(facts: Facts) -> Check:
    what = f"{facts.cache}, {facts.cache_free / GIB:.1f} GiB free"
    state = "warn" if facts.models else "fail"  # what is already here still runs
    if not facts.cache_writable:
        return Check("cache", state, f"{what}, cannot be written", "set UNIPIC_RUN_CACHE to a folder you can write")
    if facts.cache_free < LITTLE:
        return Check("cache", state, f"{what}: the disk is full", "make room, or set UNIPIC_RUN_CACHE to another disk")
    if facts.cache_free < PLENTY and not facts.models:
        return Check("cache", "warn", f"{what}: a first pull may need {PLENTY / GIB:.0f} GiB", "make room before it")
    return Check("cache", "ok", what)


def check_models(facts: Facts) -> Check:
    if facts.models:
        return Check("models", "ok", ", ".join(facts.models))
    if facts.offline:
        fix = "unset HF_HUB_OFFLINE and pull one, or give --model a folder"
        return Check("models", "warn", "none but pocket on this machine, and HF_HUB_OFFLINE forbids fetching one", fix)
    fix = "unipic-run pull unipic, or give --model a folder"
    return Check("models", "warn", "none but pocket on this machine yet", fix)


def check_network(facts: Facts) -> Check:
    return Check("network", "ok", "HF_HUB_OFFLINE is set: nothing is fetched" if facts.offline else "may be used")


CHECKS: tuple[Callable[[Facts], Check], ...] = (
    check_python,
    check_torch,
    check_gpu,
    check_triton,
    check_compiler,
    check_attention,
    check_cache,
    check_network,
    check_models,
)


def runs_on(archs: tuple[str, ...], capability: tuple[int, int]) -> bool:
    """Machine code runs within its major version from its minor on; intermediate code (compute_) on all later cards."""
    for arch in archs:
        found = re.fullmatch(r"(sm|compute)_(\d+)(\d)([af]?)", arch)
        if not found:
            continue
        kind, built = found[1], (int(found[2]), int(found[3]))
        forward = built <= capability and (kind == "compute" or built[0] == capability[0])
        if built == capability or (forward and not found[4]):
            return True
    return False
