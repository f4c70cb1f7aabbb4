"""Matrix product of whole numbers that leaves whole numbers behind, with a scale for each group of 128 columns.

    y = activation(x_scale (q_x q_W^T) w_scale + bias) R
    s = max |y| / 127 and q = round(y / s) in each row of a group, so that y ~ q * s

    R    as in kernels/quantise.py, in groups of 128 columns, or nothing
    the rest as in kernels/int8_linear.py

No program sees a whole row of y, which is thousands of columns wide; but whole groups lie within its tile, and a scale
a group is finer than one a row. kernels/int8_of_groups.py reads them; y never travels through memory as floats.
Called for the MLPs of 8-bit models (engine/layers/linear.py). Letters: M rows, K inputs, N outputs.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ._device import activate, walsh_hadamard_rows
from ._op import Case, Cost, Operator, cdiv, launch, tl, triton
from ._product import (
    GROUP,
    GROUP_M,
    INSTRUCTION,
    check_product,
    dequantised,
    finished,
    halves,
    out_features,
    place,
    product_cost,
    product_operands,
    product_options,
    store_whole,
    weight_rows,
    whole_sums,
)
from .int8_linear import int8_linear_torch
from .quantise import activation_flags, quantise_rows, turned

# Instructions that a value of y takes beyond those of kernels/int8_linear.py, as compiled for sm_89.
WRITTEN, ROTATED = 8, 20

# Rows, columns, and K of one of a step's two products; warps, stages.
TILES = ((128, 256, 64, 8, 3), (64, 256, 64, 8, 3), (32, 256, 64, 8, 3), (16, 256, 64, 4, 3))


def int8_linear_to_groups_ref(x, x_scale, weight, weight_scale, bias, activation, group) -> Tensor:
    """y (..., groups, 128) on the dequantised operands in float64."""
    y = (x.double() * x_scale.double()[..., None]) @ (weight.double() * weight_scale.double()[:, None]).T
    return turned(finished(y, bias, activation, None, None, torch.float64), group).unflatten(-1, (-1, GROUP))


def int8_linear_to_groups_torch(x, x_scale, weight, weight_scale, bias, activation, group) -> tuple[Tensor, Tensor]:
    y = int8_linear_torch(x, x_scale, weight, weight_scale, bias, activation, None, None, torch.float32)
    return quantise_rows(turned(y, group).unflatten(-1, (-1, GROUP)))


@triton.jit(do_not_specialize=["m"])  # it changes from round to round
def _to_groups_kernel(
    x_ptr,  # (M, K) int8, rows x_stride apart
    x_scale_ptr,  # (M) float32
    weight_ptr,  # (N, K) int8 contiguous, or (2 N, K) for SwiGLU
    scale_ptr,  # (N) float32, or (2 N); bias alike
    bias_ptr,
    y_ptr,  # (M, N) int8
    y_scale_ptr,  # (M, N / 128) float32
    m,
    x_stride,
    N: tl.constexpr,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,  # 256, so that a tile is a group of SwiGLU's, or two of others
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_M: tl.constexpr,
    ROTATE: tl.constexpr,
    BIAS: tl.constexpr,
    GELU: tl.constexpr,
    GELU_TANH: tl.constexpr,
    SILU: tl.constexpr,
    SWIGLU: tl.constexpr,
):
    WIDE: tl.constexpr = BLOCK_N // 2 if SWIGLU else BLOCK_N  # columns of the output
    row, column = place(m, tl.cdiv(N, WIDE), BLOCK_M, GROUP_M)
    left = column * WIDE
    weight_row = weight_rows(left, N, BLOCK_N, SWIGLU, 2)
    sums = whole_sums(x_ptr, weight_ptr, row, weight_row, m, x_stride, K, BLOCK_M, BLOCK_N, BLOCK_K)
    x_scale = tl.load(x_scale_ptr + row, mask=row < m, other=0.0)
    first, second = halves(sums)
    if SWIGLU:
        gate, up = halves(first)
        a = _swiglu(gate, up, x_scale, left, scale_ptr, bias_ptr, N, BIAS)
        gate, up = halves(second)
        b = _swiglu(gate, up, x_scale, left + WIDE // 2, scale_ptr, bias_ptr, N, BIAS)
        _store(a, b, row, left, m, y_ptr, y_scale_ptr, N, GROUP, ROTATE)
    else:
        finish_group(second, x_scale, row, left + WIDE // 2, m, scale_ptr, bias_ptr, y_ptr, y_scale_ptr, N, GROUP,
                     ROTATE, BIAS, GELU, GELU_TANH, SILU)  # fmt: skip
        finish_group(first, x_scale, row, left, m, scale_ptr, bias_ptr, y_ptr, y_scale_ptr, N, GROUP, ROTATE,
                     BIAS, GELU, GELU_TANH, SILU)  # fmt: skip


@triton.jit
def _swiglu(gate, up, x_scale, left, scale_ptr, bias_ptr, N: tl.constexpr, BIAS: tl.constexpr):
    col = left + tl.arange(0, gate.shape[1])
    gate = dequantised(gate, x_scale, col, N, scale_ptr, bias_ptr, BIAS)
    return activate(gate, False, False, True) * dequantised(up, x_scale, N + col, 2 * N, scale_ptr, bias_ptr, BIAS)


@triton.jit
def finish_group(
    sums,  # (rows, 128)
    x_scale,
    row,
    left,
    m,
    scale_ptr,
    bias_ptr,
    y_ptr,
    y_scale_ptr,
    N: tl.constexpr,
    GROUP: tl.constexpr,
    ROTATE: tl.constexpr,
    BIAS: tl.constexpr,
    GELU: tl.constexpr,
    GELU_TANH: tl.constexpr,
    SILU: tl.constexpr,
):
    """One group, half of its columns at a time until their scale is known."""
    a, b = halves(sums)
    col = left + tl.arange(0, a.shape[1])
    a = activate(dequantised(a, x_scale, col, N, scale_ptr, bias_ptr, BIAS), GELU, GELU_TANH, SILU)
    col += a.shape[1]
    b = activate(dequantised(b, x_scale, col, N, scale_ptr, bias_ptr, BIAS), GELU, GELU_TANH, SILU)
    _store(a, b, row, left, m, y_ptr, y_scale_ptr, N, GROUP, ROTATE)


@triton.jit
def _store(a, b, row, left, m, y_ptr, y_scale_ptr, N: tl.constexpr, GROUP: tl.constexpr, ROTATE: tl.constexpr):
    """The group [a | b] (rows, 64 each), whose first column is `left`."""
    UNIT: tl.constexpr = GROUP**-0.5 if ROTATE else 1.0  # of the matrix of +1 and -1
    if ROTATE:
        total = a + b
        b = walsh_hadamard_rows(a - b, GROUP // 2)
        a = walsh_hadamard_rows(total, GROUP // 2)
    inside = row < tl.where(left < N, m, 0)
    row = row.to(tl.int64)
    store_whole(a, b, y_ptr + row * N + left, y_scale_ptr + row * (N // GROUP) + left // GROUP, inside, UNIT)


def _int8_linear_to_groups_triton(x, x_scale, weight, weight_scale, bias, activation, group) -> tuple[Tensor, Tensor]:
    rows = x.reshape(-1, x.shape[-1])  # a copy only where the rows are not evenly spaced
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    (m, k), n = rows.shape, out_features(weight, activation)
    y = torch.empty((*x.shape[:-1], n // GROUP, GROUP), dtype=torch.int8, device=x.device)
    y_scale = torch.empty(y.shape[:-1], dtype=torch.float32, device=x.device)
    how, shape = f"{activation}{' rotated' * (group > 1)} ", (m, len(weight), k)
    tiles = product_options("int8_to_groups", how, TILES, shape, x.device, fixed=("BLOCK_N",))
    launch(
        _to_groups_kernel,
        (cdiv(m, tiles["BLOCK_M"]) * cdiv(len(weight), tiles["BLOCK_N"]),),
        *(rows, x_scale.contiguous(), weight, weight_scale, weight_scale if bias is None else bias, y, y_scale),
        *(m, rows.stride(0)),
        N=n,
        K=k,
        GROUP=GROUP,
        GROUP_M=GROUP_M,
        ROTATE=group > 1,
        BIAS=bias is not None,
        **activation_flags(activation),
        **tiles,
    )
    return y, y_scale


def int8_linear_to_groups_cost(x, x_scale, weight, weight_scale, bias, activation, group) -> Cost:
    """With the instructions behind the product that it would not have alone."""
    base = product_cost((x, x_scale, weight, weight_scale, bias), weight, activation, torch.int8)
    values = x.numel() // x.shape[-1] * out_features(weight, activation)
    beside = (WRITTEN + ROTATED * (group > 1)) * INSTRUCTION * values
    return replace(base, nbytes=base.nbytes + 4 * values // GROUP, beside=beside)


_int8_linear_to_groups = Operator(
    "int8_linear_to_groups(Tensor x, Tensor x_scale, Tensor weight, Tensor weight_scale, Tensor? bias, str activation, "
    "int group) -> (Tensor, Tensor)",
    torch=int8_linear_to_groups_torch,
    triton=_int8_linear_to_groups_triton,
    cost=int8_linear_to_groups_cost,
)


def int8_linear_to_groups(
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    activation: str = "none",
    group: int = 1,
) -> tuple[Tensor, Tensor]:
    """activation(x W^T + bias) R: int8 (..., groups, 128) and float32 scales (..., groups).

    The arguments as for int8_linear; `group` columns are mixed by R: 128, or 1 for none.
    """
    if x_scale.shape != x.shape[:-1]:
        raise ValueError(f"x_scale is {tuple(x_scale.shape)}, not one for each row of x {tuple(x.shape)}")
    check_product(x, weight, weight_scale, bias, activation, None, None)
    if out_features(weight, activation) % GROUP or group not in (1, GROUP):
        raise ValueError(
            f"{out_features(weight, activation)} columns, of which {group} are mixed: they have to be a multiple of "
            f"{GROUP}, and 1 or {GROUP} of them mixed"
        )
    return _int8_linear_to_groups(x, x_scale, weight, weight_scale, bias, activation, group)


def int8_linear_to_groups_cases() -> list[Case]:
    def make(m: int, k: int, n: int, group: int = 1, spread: int = 1, **how: Any):
        def arguments(device):
            noise = torch.Generator().manual_seed(0)
            x = torch.randint(-127, 128, (m, spread * k), dtype=torch.int8, generator=noise).to(device)[:, :k]
            weight, scale, bias, activation, *_ = product_operands(device, m, k, n, **how)
            return x, torch.rand(m, generator=noise).to(device) / 64, weight, scale, bias, activation, group

        return arguments

    llm, mar = {"bias": False, "activation": "swiglu"}, {"activation": "gelu"}
    return [
        Case("MAR fc1 with its GELU, 8320 rows", make(8320, 1280, 5120, **mar), "aot gpu"),
        Case("MAR fc1 with its GELU, 70 rows", make(70, 1280, 5120, **mar), "aot gpu"),
        Case("LLM gate and up, rotated, 8320 rows", make(8320, 1536, 17920, 128, **llm), "aot gpu"),
        Case("LLM gate and up, rotated, 400 rows", make(400, 1536, 17920, 128, **llm), "aot gpu"),
        Case("LLM gate and up, rotated, 30 rows", make(30, 1536, 17920, 128, **llm), "aot gpu"),
        Case("DiT fc1 with its GELU", make(8192, 1536, 6144, activation="gelu_tanh"), "aot gpu"),
        Case("GELU, a tile and a half, rows apart", make(20, 144, 384, spread=2, **mar)),
        Case("SwiGLU, two groups, rotated, with a bias", make(18, 272, 512, 128, activation="swiglu")),
        Case("SwiGLU in float32, one row", make(1, 64, 256, activation="swiglu", dtype=torch.float32)),
        Case("rotated, no activation", make(5, 128, 128, 128)),
        Case("no rows", make(0, 64, 256, 128, **llm)),
    ]
