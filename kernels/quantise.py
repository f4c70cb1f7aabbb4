"""Rows as whole numbers: int8 values and one float32 scale a row, after the activation that precedes the product.

    y = activation(x) R,  scale = max |y| / 127,  q = round(y / scale)      so that y ~ q * scale, row by row

    activation  none | gelu (exact) | gelu_tanh | silu | swiglu: silu(gate) * up of x = [gate | up]
    R           in each group of columns Sylvester's Hadamard matrix over sqrt(group), which spreads outliers;
                nothing where a group is one column. The weight that follows carries R as well: x R (W R)^T = x W^T

`rotated` is y itself, for rows so few that they are not quantised. Called before kernels/int8_linear.py wherever no
norm does it (kernels/norms.py quantises what it normalises). All of y is float32 and folded into the load, so it never
travels through memory. Letters: N rows, D width.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ._device import activate, row_scale, to_int8, walsh_hadamard_rows
from ._op import Case, Cost, Operator, launch, next_power_of_2, tl, triton, unit_rows

ACTIVATIONS = ("none", "gelu", "gelu_tanh", "silu", "swiglu")
LARGEST_GROUP = 128  # columns that R mixes
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


def walsh_hadamard(x: Tensor, group: int) -> Tensor:
    """Each `group` columns of x (..., D) times Sylvester's matrix of +1 and -1, in x's dtype and one fixed order."""
    y, size = x, 1
    while size < group:
        low, high = y.reshape(-1, 2, size).unbind(1)
        y, size = torch.stack([low + high, low - high], dim=1), 2 * size
    return y.reshape(x.shape)


def turned(x: Tensor, group: int) -> Tensor:
    """x R in x's dtype."""
    return x if group == 1 else walsh_hadamard(x, group) * group**-0.5


def rotated_ref(x: Tensor, activation: str, group: int) -> Tensor:
    """In float64."""
    return turned(activated(x.double(), activation), group)


quantise_ref = rotated_ref  # what the whole numbers times their scales stand for


def rotated_torch(x: Tensor, activation: str, group: int) -> Tensor:
    return turned(activated(x.float(), activation), group).to(x.dtype)


def quantise_torch(x: Tensor, activation: str, group: int) -> tuple[Tensor, Tensor]:
    return quantise_rows(rotated_torch(x.float(), activation, group))


@triton.jit
def _rotate(y, GROUP: tl.constexpr):
    """As `walsh_hadamard`, and normalised; y (columns) float32."""
    COLUMNS: tl.constexpr = y.shape[0]
    groups = walsh_hadamard_rows(tl.reshape(y, (COLUMNS // GROUP, GROUP)), GROUP)
    return tl.reshape(groups, (COLUMNS,)) * GROUP**-0.5


@triton.jit
def _load(
    x_ptr,  # the row
    at,
    D: tl.constexpr,
    GROUP: tl.constexpr,
    GELU: tl.constexpr,
    GELU_TANH: tl.constexpr,
    SILU: tl.constexpr,
    SWIGLU: tl.constexpr,
):
    """y at the columns `at`, float32 and zero beyond the row: every activation of zero is zero."""
    x = tl.load(x_ptr + at, mask=at < D, other=0.0).to(tl.float32)
    y = activate(x, GELU, GELU_TANH, SILU)
    if SWIGLU:
        y *= tl.load(x_ptr + D + at, mask=at < D, other=0.0).to(tl.float32)
    return _rotate(y, GROUP) if GROUP > 1 else y


@triton.jit(do_not_specialize=["length"])  # it changes from prompt to prompt
def _quantise_kernel(
    x_ptr,  # (G, L, D) or (G, L, 2 D), last dimension contiguous; N = G L
    y_ptr,  # (N, D) contiguous: int8, or x's type
    scale_ptr,  # (N) float32, of int8
    length,  # L
    x_group,  # strides
    x_row,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    INT8: tl.constexpr,
    GROUP: tl.constexpr,
    GELU: tl.constexpr,
    GELU_TANH: tl.constexpr,
    SILU: tl.constexpr,
    SWIGLU: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row // length * x_group + row % length * x_row
    y_ptr += row * D
    at = tl.arange(0, BLOCK)
    if not INT8:
        for start in range(0, D, BLOCK):
            y = _load(x_ptr, start + at, D, GROUP, GELU, GELU_TANH, SILU, SWIGLU)
            tl.store(y_ptr + start + at, y.to(y_ptr.dtype.element_ty), mask=start + at < D)
    elif D <= BLOCK:
        y = _load(x_ptr, at, D, GROUP, GELU, GELU_TANH, SILU, SWIGLU)
        scale = row_scale(tl.max(tl.abs(y), axis=0))
        tl.store(y_ptr + at, to_int8(y, scale), mask=at < D)
        tl.store(scale_ptr + row, scale)
    else:
        largest = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, D, BLOCK):
            y = _load(x_ptr, start + at, D, GROUP, GELU, GELU_TANH, SILU, SWIGLU)
            largest = tl.maximum(largest, tl.abs(y))
        scale = row_scale(tl.max(largest, axis=0))
        for start in range(0, D, BLOCK):
            y = _load(x_ptr, start + at, D, GROUP, GELU, GELU_TANH, SILU, SWIGLU)
            tl.store(y_ptr + start + at, to_int8(y, scale), mask=start + at < D)
        tl.store(scale_ptr + row, scale)


def _width(x: Tensor, activation: str) -> int:
    return x.shape[-1] // 2 if activation == "swiglu" else x.shape[-1]


def _launch(x: Tensor, activation: str, group: int, y: Tensor, scale: Tensor | None) -> None:
    width = _width(x, activation)
    # Of joint attention's output each stream takes its tokens: no copy.
    rows = unit_rows(x if x.dim() == 3 else x.reshape(1, -1, x.shape[-1]))
    whole = width <= WHOLE_ROW
    launch(
        _quantise_kernel,
        (rows.shape[0] * rows.shape[1],),
        rows,
        y,
        y if scale is None else scale,
        rows.shape[1],
        *rows.stride()[:2],
        D=width,
        BLOCK=next_power_of_2(width) if whole else WHOLE_ROW // 4,
        INT8=scale is not None,
        GROUP=group,
        **activation_flags(activation),
        num_warps=4 if width <= 2048 else 8,  # heuristic
    )


def _quantise_triton(x: Tensor, activation: str, group: int) -> tuple[Tensor, Tensor]:
    q = torch.empty((*x.shape[:-1], _width(x, activation)), dtype=torch.int8, device=x.device)
    scale = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    _launch(x, activation, group, q, scale)
    return q, scale


def _rotated_triton(x: Tensor, activation: str, group: int) -> Tensor:
    y = torch.empty((*x.shape[:-1], _width(x, activation)), dtype=x.dtype, device=x.device)
    _launch(x, activation, group, y, None)
    return y


def rotated_cost(x: Tensor, activation: str, group: int) -> Cost:
    out = x.numel() // x.shape[-1] * _width(x, activation)
    return Cost(8 * x.numel() + int(math.log2(group)) * out, (x.numel() + out) * x.element_size())


def quantise_cost(x: Tensor, activation: str, group: int) -> Cost:
    rows = x.numel() // x.shape[-1]
    out = rows * _width(x, activation)
    return Cost(rotated_cost(x, activation, group).flop, x.numel() * x.element_size() + out + 4 * rows)


_quantise = Operator(
    "quantise(Tensor x, str activation, int group) -> (Tensor, Tensor)",
    torch=quantise_torch,
    triton=_quantise_triton,
    cost=quantise_cost,
)
_rotated = Operator(
    "rotated(Tensor x, str activation, int group) -> Tensor",
    torch=rotated_torch,
    triton=_rotated_triton,
    cost=rotated_cost,
)


def quantise(x: Tensor, activation: str = "none", group: int = 1) -> tuple[Tensor, Tensor]:
    """(int8 (..., D), float32 scales (...)) of activation(x) R; x (..., D), or (..., 2 D) = [gate | up] for swiglu.

    `group`: the columns that R mixes, a power of two up to 128 that divides D.
    """
    _check_group(_width(x, activation), group)
    return _quantise(x, activation, group)


def rotated(x: Tensor, activation: str = "none", group: int = 1) -> Tensor:
    """activation(x) R (..., D) in x's dtype; the same arguments."""
    _check_group(_width(x, activation), group)
    return _rotated(x, activation, group)


def group_of(width: int) -> int:
    """The largest group that fits so many columns; 1 where none does."""
    return min(LARGEST_GROUP, width & -width)


def _check_group(width: int, group: int) -> None:
    if group < 1 or group_of(width) % group:
        raise ValueError(f"group {group} is no power of two up to {LARGEST_GROUP} that divides {width} columns")


def quantise_cases() -> list[Case]:
    def make(
        *shape: int,
        activation: str,
        group: int = 1,
        dtype: torch.dtype = torch.bfloat16,
        spread: int = 1,
        zeros: bool = False,
        first: int = 0,
    ):
        def arguments(device):
            noise = torch.Generator().manual_seed(0)
            x = torch.randn(*shape[:-1], spread * shape[-1], generator=noise).to(device, dtype)[..., : shape[-1]]
            x = x[:, first:] if first else x
            return (x.mul_(torch.arange(len(x)).view(-1, 1).to(x)) if zeros else x), activation, group

        return arguments

    return [
        Case("LLM at 1024, after SwiGLU", make(8320, 8960, activation="none"), "aot gpu"),
        Case("LLM at 1024, with SwiGLU", make(8320, 17920, activation="swiglu"), "aot gpu"),
        Case("LLM at 1024, with SwiGLU, rotated", make(8320, 17920, activation="swiglu", group=128), "aot gpu"),
        Case("MAR at 1024, with GELU", make(8320, 5120, activation="gelu"), "aot gpu"),
        Case("attention's output", make(4160, 1536, activation="none"), "aot gpu"),
        Case("diffusion head, conditions", make(10, 1536, activation="silu")),
        Case("a row in registers, GELU", make(3, 5120, activation="gelu")),
        Case("a row in pieces", make(2, 8960, activation="none")),
        Case("a row in pieces, SwiGLU of [gate | up]", make(2, 17920, activation="swiglu")),
        Case("a row in pieces, SwiGLU, rotated", make(2, 17920, activation="swiglu", group=128)),
        Case("a row in registers, rotated", make(5, 384, activation="silu", group=128, dtype=torch.float32)),
        Case("small groups, rows apart, a row of zeros", make(3, 24, activation="none", group=8, spread=2, zeros=True)),
        Case("DiT's GELU, float16, one row", make(1, 6144, activation="gelu_tanh", dtype=torch.float16)),
        Case("odd width, rows apart, a row of zeros", make(4, 37, activation="none", spread=2, zeros=True)),
        Case("three dimensions, SwiGLU, float32", make(2, 3, 26, activation="swiglu", dtype=torch.float32)),
        Case("no rows", make(0, 64, activation="silu")),
        Case("some tokens of each picture", make(3, 5, 64, activation="none", first=2)),
    ]
