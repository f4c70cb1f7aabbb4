"""One door to attention: the backends, and which of them runs.

`sdpa` is our kernels, or torch's own where they are not faster; `int8-qk` is the same with scores in whole numbers
wherever attention is bidirectional, and behind prompts where its layers are int8 (int8_attention.py), for speed at a
relative error under 2e-2; `flash-attn` and `xformers` are optional
packages for CUDA. `auto` takes flash-attn where it is installed and applies, else sdpa. The resolved name is what
`doctor` and every result report.
"""

import importlib
import importlib.util
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from ...kernels.attention import attention as sdpa
from ...kernels.attention_int8 import attention_int8
from ...kernels.prefix_attention import prefix_attention as sdpa_behind
from ..errors import UnipicWarning, UnsupportedDeviceError, UsageError
from ..kv_cache import Prompts

BACKENDS = ("auto", "sdpa", "int8-qk", "flash-attn", "xformers")
_MODULES = {"flash-attn": "flash_attn", "xformers": "xformers"}
_ENTRIES = {"flash-attn": "flash_attn", "xformers": "xformers.ops"}
_MAX_FLASH_HEAD = 256
_MAX_INT8_HEAD = 128


@dataclass(frozen=True)
class Attention:
    """softmax(q k^T / sqrt(d)) v through one backend."""

    backend: str = "sdpa"

    @property
    def ours(self) -> bool:
        """Whether causal attention is our kernels'."""
        return self.backend in ("sdpa", "int8-qk")

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, causal: bool = False) -> Tensor:
        """q (B, H, Lq, d); k, v (B, K, Lk, d), K divides H; causal masks align to the last key. Returns q's shape."""
        if self.backend == "flash-attn" and q.shape[-1] <= _MAX_FLASH_HEAD:
            return _flash(q, k, v, causal)
        if self.backend == "xformers":
            return _xformers(q, k, v, causal)
        if self.backend == "int8-qk" and not causal and q.shape[-1] <= _MAX_INT8_HEAD:
            return attention_int8(q, k, v)
        return sdpa(q, k, v, causal)


def resolve(name: str, device: torch.device, dtype: torch.dtype) -> Attention:
    """The backend for `name` on this device. Raises UsageError, or UnsupportedDeviceError with the reason."""
    if name not in BACKENDS:
        raise UsageError(f"attention backend {name!r} is unknown", f"choose from {', '.join(BACKENDS)}")
    fits = device.type == "cuda" and dtype in (torch.float16, torch.bfloat16)
    if name == "auto":
        name = "flash-attn" if fits and installed("flash-attn") else "sdpa"
        if name == "flash-attn" and (problem := _import_problem(name)):
            warnings.warn(f"flash-attn is installed but broken ({problem}): using sdpa", UnipicWarning, stacklevel=2)
            name = "sdpa"
    elif name in _MODULES:
        if not installed(name):
            extra = f"unipic-run[{name.removesuffix('-attn')}]"
            raise UnsupportedDeviceError(f"attention backend {name} is not installed", f"install {extra}, or use sdpa")
        if not fits:
            kind = str(dtype).removeprefix("torch.")
            raise UnsupportedDeviceError(
                f"attention backend {name} needs float16 or bfloat16 on CUDA, not {kind} on {device.type}", "use sdpa"
            )
        if problem := _import_problem(name):
            raise UnsupportedDeviceError(f"{name} is installed but broken ({problem})", "reinstall it, or use sdpa")
    return Attention(name)


def _import_problem(name: str) -> str | None:
    """Why an installed package cannot be used; its compiled part may be of another torch."""
    try:
        importlib.import_module(_ENTRIES[name])
    except Exception as error:
        return f"{type(error).__name__}: {error}".partition("\n")[0][:200]
    return None


def installed(name: str) -> bool:
    return importlib.util.find_spec(_MODULES[name]) is not None


def prefix_attention(attend: Attention, prompts: Prompts, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention of a block of rows, each continuing its own prompt.

    q (R, H, L, d); k, v (R, K, L, d). Lengths differ between prompts and no pad is ever attended. Returns q's shape.
    """
    if attend.ours:
        return sdpa_behind(q, k, v, *prompts.of_layer(layer))
    keys, values, *_ = prompts.of_layer(layer)
    out, row = [], 0
    for prompt, rows, length in prompts.runs:
        here = slice(row, row + rows)
        before = (x[prompt, :, :length].expand(rows, -1, -1, -1) for x in (keys, values))
        joined = (torch.cat([x, own[here]], dim=2) for x, own in zip(before, (k, v), strict=True))
        out.append(attend(q[here], *joined, causal=True))
        row += rows
    return torch.cat(out)


def _flash(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    from flash_attn import flash_attn_func  # an optional package

    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, L, H, d); flash-attn aligns causal masks to the last key
    return flash_attn_func(q, k, v, causal=causal).transpose(1, 2)


def _xformers(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    from xformers.ops import LowerTriangularFromBottomRightMask, memory_efficient_attention  # an optional package

    group = q.shape[1] // k.shape[1]  # it has no grouped queries in this layout
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    bias = LowerTriangularFromBottomRightMask() if causal else None
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return memory_efficient_attention(q, k, v, attn_bias=bias).transpose(1, 2)
