"""What `doctor` looks at: Python, torch, GPUs, Triton and its compiler, optional packages, the cache."""

import importlib
import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import hub
from .errors import UnipicError

EXTRAS = {"flash-attn": "flash_attn", "xformers": "xformers", "bitsandbytes": "bitsandbytes"}


@dataclass(frozen=True)
class Gpu:
    name: str
    capability: tuple[int, int]
    free: int  # bytes
    total: int


@dataclass(frozen=True)
class Facts:
    """What was found. A version is None where the package is missing; `torch_error` says why torch did not import."""

    python: tuple[int, int, int]
    system: str  # Linux, Windows, Darwin
    machine: str
    torch: str | None
    torch_error: str
    torch_cuda: str | None  # the CUDA version torch was built for
    torch_archs: tuple[str, ...]  # e.g. sm_90, compute_90
    nvidia_smi: bool
    driver: str | None
    gpus: tuple[Gpu, ...]
    triton: str | None
    triton_error: str
    triton_wanted: str | None  # by this torch, exactly
    compiler: str | None
    python_headers: bool
    attention: str
    extras: dict[str, str | None]
    cache: Path
    cache_writable: bool
    cache_free: int
    offline: bool
    models: tuple[str, ...]  # without those inside the package


def gather() -> Facts:
    """Look around: imports torch, asks nvidia-smi, opens no network connection, writes nothing."""
    return Facts(
        python=sys.version_info[:3],
        system=platform.system(),
        machine=platform.machine(),
        **_torch_facts(),
        **_triton_facts(),
        nvidia_smi=shutil.which("nvidia-smi") is not None,
        driver=_driver(),
        compiler=os.environ.get("CC") or next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None),
        python_headers=Path(sysconfig.get_path("include"), "Python.h").is_file(),
        extras={name: _version(name) for name in EXTRAS},
        **_cache_facts(),
        offline=hub.is_offline(),
    )


def _torch_facts() -> dict[str, Any]:
    facts: dict[str, Any] = dict.fromkeys(("torch", "torch_cuda"), None)
    facts |= {"torch_error": "", "torch_archs": (), "gpus": (), "attention": "none", "triton_wanted": None}
    try:
        torch = importlib.import_module("torch")
        facts |= {"torch": str(torch.__version__), "torch_cuda": torch.version.cuda}
        facts["triton_wanted"] = _triton_wanted()
        if torch.cuda.is_available():
            facts["torch_archs"] = tuple(torch.cuda.get_arch_list())
            facts["gpus"] = tuple(_gpu(torch, index) for index in range(torch.cuda.device_count()))
        facts["attention"] = _attention()
    except Exception as error:  # a broken installation fails in any way
        facts["torch_error"] = f"{type(error).__name__}: {error}"
    return facts


def _gpu(torch: Any, index: int) -> Gpu:
    free, total = 0, torch.cuda.get_device_properties(index).total_memory
    with suppress(Exception):  # needs a context, which a card without code for it or without memory refuses
        free, total = torch.cuda.mem_get_info(index)
    return Gpu(torch.cuda.get_device_name(index), torch.cuda.get_device_capability(index), free, total)


def _attention() -> str:
    """The backend a run with all defaults takes."""
    from .device import as_device, as_dtype
    from .layers.attention import resolve

    device = as_device("auto")
    return resolve("auto", device, as_dtype("auto", device)).backend


def _triton_wanted() -> str | None:
    for requirement in importlib.metadata.requires("torch") or []:
        if found := re.match(r"triton\s*==\s*([\w.]+)", requirement):
            return found[1]
    return None


def _triton_facts() -> dict[str, Any]:
    if importlib.util.find_spec("triton") is None:
        return {"triton": None, "triton_error": "not installed"}
    try:
        return {"triton": str(importlib.import_module("triton").__version__), "triton_error": ""}
    except Exception as error:
        return {"triton": None, "triton_error": f"cannot be imported ({type(error).__name__}: {error})"}


def _driver() -> str | None:
    """The NVIDIA driver's version."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return next(iter(done.stdout.split()), None) if done.returncode == 0 else None


def _version(package: str) -> str | None:
    """Of an optional package; it is not imported, since that may take seconds."""
    if importlib.util.find_spec(EXTRAS[package]) is None:
        return None
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "of unknown version"


def _cache_facts() -> dict[str, Any]:
    cache = hub.cache_root()
    seen = filter(os.path.exists, (cache, *cache.absolute().parents))  # which, unlike a Path's, never raises
    there = next(seen)
    try:
        rows = [row for row in hub.list_models() if row.path and row.family != "?"]
        models = tuple(row.name for row in rows if row.name not in hub.PACKAGED)
    except (OSError, UnipicError):  # a cache that cannot be read
        models = ()
    writable = there.is_dir() and os.access(there, os.W_OK | os.X_OK)
    return {"cache": cache, "cache_writable": writable, "cache_free": shutil.disk_usage(there).free, "models": models}
