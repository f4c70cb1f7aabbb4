"""Rows as whole numbers: int8 values and one float32 scale a row, after the activation that precedes the product.

    y = activation(x),  scale = max |y| / 127,  q = round(y / scale)        so that y ~ q * scale, row by row

    activation  none | gelu (exact) | gelu_tanh | silu | swiglu: silu(gate) * up of x = [gate | up]

Called before kernels/int8_linear.py wherever no norm does it (kernels/norms.py quantises what it normalises). The
activation is float32 and folded into the load, so its result never travels through memory. Letters: N rows, D width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ._device import activate, row_scale, to_int8
from ._op import Case, Cost, Operator, launch, tl, triton

ACTIVATIONS = ("none", "gelu", "gelu_tanh", "silu", "swiglu")
WHOLE_ROW = 8192  # columns a program keeps in registers; wider rows are read twice, the second time from a cache


def activated(x: Tensor, activation: str) -> Tensor:
    """In x's dtype. x (..., D), or (..., 2 D) for swiglu."""
    if activation == "gelu":
        return F.gelu(x)
    if activation == "gelu_tanh":
        return F.gelu(x, approximate="tanh")
    if activation == "silu":
        return F.silu(x)
    if activation == "swiglu":
        gate, up = x.chunk(2, dim=-1)
        return F.silu(gate) * up
    if activation == "none":
        return x
    raise ValueError(f"activation {activation!r} is none of {', '.join(ACTIVATIONS)}")


def activation_flags(activation: str) -> dict[str, bool]:
    """The constexprs by which a kernel knows the activation; SwiGLU is SiLU of one half times the other."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation {activation!r} is none of {', '.join(ACTIVATIONS)}")
    names = {"GELU": ("gelu",), "GELU_TANH": ("gelu_tanh",), "SILU": ("silu", "swiglu"), "SWIGLU": ("swiglu",)}
    return {flag: activation in those for flag, those in names.items()}


def quantise_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """(whole numbers -127 .. 127 as int8, float32 scales (...)) of x (..., D): x ~ whole * scale, row by row."""
    wide = x.float()
    scale = wide.abs().amax(-1).clamp_min(1e-12) / 127.0
    ratio = wide / scale[..., None]
    return torch.where(ratio >= 0, (ratio + 0.5).floor(), (ratio - 0.5).ceil()).to(torch.int8), scale


def quantise_ref(x: Tensor, activation: str) -> Tensor:
    """What the whole numbers times their scales stand for, in float64."""
    return activated(x.double(), activation)


def quantise_torch(x: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    return quantise_rows(activated(x.float(), activation))


@triton.jit
def _load(
    x_ptr,  # the row
    at,
    D: tl.constexpr,
    GELU: tl.constexpr,
    GELU_TANH: tl.constexpr,
    SILU: tl.constexpr,
    SWIGLU: tl.constexpr,
):
    """activation(x) at the columns `at`, float32 and zero beyond the row: every activation of zero is zero."""
    x = tl.load(x_ptr + at, mask=at < D, other=0.0).to(tl.float32)
    y = activate(x, GELU, GELU_TANH, SILU)
    if SWIGLU:
        y *= tl.load(x_ptr + D + at, mask=at < D, other=0.0).to(tl.float32)
    return y


@triton.jit
def _quantise_kernel(
    x_ptr,  # (N, D) or (N, 2 D), rows x_stride apart
    q_ptr,  # (N, D) int8 contiguous
    scale_ptr,  # (N) float32
    x_stride,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    GELU: tl.constexpr,
    GELU_TANH: tl.constexpr,
    SILU: tl.constexpr,
    SWIGLU: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * x_stride
    q_ptr += row * D
    at = tl.arange(0, BLOCK)
    if D <= BLOCK:
        y = _load(x_ptr, at, D, GELU, GELU_TANH, SILU, SWIGLU)
        scale = row_scale(tl.max(tl.abs(y), axis=0))
        tl.store(q_ptr + at, to_int8(y, scale), mask=at < D)
    else:
        largest = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, D, BLOCK):
            y = _load(x_ptr, start + at, D, GELU, GELU_TANH, SILU, SWIGLU)
            largest = tl.maximum(largest, tl.abs(y))
        scale = row_scale(tl.max(largest, axis=0))
        for start in range(0, D, BLOCK):
            y = _load(x_ptr, start + at, D, GELU, GELU_TANH, SILU, SWIGLU)
            tl.store(q_ptr + start + at, to_int8(y, scale), mask=start + at < D)
    tl.store(scale_ptr + row, scale)


def _quantise_triton(x: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    flags = activation_flags(activation)
    width = x.shape[-1] // 2 if flags["SWIGLU"] else x.shape[-1]
    rows = x.reshape(-1, x.shape[-1])  # a copy only where the rows are not evenly spaced
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    q = torch.empty((*x.shape[:-1], width), dtype=torch.int8, device=x.device)
    scale = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    whole = width <= WHOLE_ROW
    launch(
        _quantise_kernel,
        (len(rows),),
        rows,
        q,
        scale,
        rows.stride(0),
        D=width,
        BLOCK=triton.next_power_of_2(width) if whole else WHOLE_ROW // 4,
        **flags,
        num_warps=4 if width <= 2048 else 8,  # heuristic
    )
    return q, scale


def quantise_cost(x: Tensor, activation: str) -> Cost:
    out = x.numel() // 2 if activation == "swiglu" else x.numel()
    rows = x.numel() // x.shape[-1]
    return Cost(8 * x.numel(), x.numel() * x.element_size() + out + 4 * rows)


_quantise = Operator(
    "quantise(Tensor x, str activation) -> (Tensor, Tensor)",
    torch=quantise_torch,
    triton=_quantise_triton,
    cost=quantise_cost,
)


def quantise(x: Tensor, activation: str = "none") -> tuple[Tensor, Tensor]:
    """(int8 (..., D), float32 scales (...)) of activation(x); x (..., D), or (..., 2 D) = [gate | up] for swiglu."""
    return _quantise(x, activation)


def quantise_cases() -> list[Case]:
    def make(*shape: int, activation: str, dtype: torch.dtype = torch.bfloat16, spread: int = 1, zeros: bool = False):
        def arguments(device):
            noise = torch.Generator().manual_seed(0)
            x = torch.randn(*shape[:-1], spread * shape[-1], generator=noise).to(device, dtype)[..., : shape[-1]]
            return (x.mul_(torch.arange(len(x)).view(-1, 1).to(x)) if zeros else x), activation

        return arguments

    return [
        Case("LLM at 1024, after SwiGLU", make(8320, 8960, activation="none"), "aot gpu"),
        Case("LLM at 1024, with SwiGLU", make(8320, 17920, activation="swiglu"), "aot gpu"),
        Case("MAR at 1024, with GELU", make(8320, 5120, activation="gelu"), "aot gpu"),
        Case("attention's output", make(4160, 1536, activation="none"), "aot gpu"),
        Case("diffusion head, conditions", make(10, 1536, activation="silu")),
        Case("a row in registers, GELU", make(3, 5120, activation="gelu")),
        Case("a row in pieces", make(2, 8960, activation="none")),
        Case("a row in pieces, SwiGLU of [gate | up]", make(2, 17920, activation="swiglu")),
        Case("DiT's GELU, float16, one row", make(1, 6144, activation="gelu_tanh", dtype=torch.float16)),
        Case("odd width, rows apart, a row of zeros", make(4, 37, activation="none", spread=2, zeros=True)),
        Case("three dimensions, SwiGLU, float32", make(2, 3, 26, activation="swiglu", dtype=torch.float32)),
        Case("no rows", make(0, 64, activation="silu")),
    ]
