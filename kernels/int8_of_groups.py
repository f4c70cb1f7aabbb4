"""Matrix product of whole numbers with a scale for each group of inputs, 128 as kernels/int8_to_groups.py leaves them.

    y = residual + gate * ((sum over g of s_g (q_x,g q_W,g^T)) w_scale + bias)

    g    a group of 128 columns of x and of the weight, or a head of 64 to 127; s (M, groups)
    the rest as in kernels/int8_linear.py

Sums within a group are exact. Each is then scaled and added to a total in float32: two instructions a value, counted as
if nothing hid them. Instead of being converted, sums begin at MAGIC, the bits of 1.5 * 2^23: below 2^22, what they end
as are the bits of 1.5 * 2^23 + sum.
Called for the MLPs of 8-bit models (engine/layers/linear.py), the head's included, and behind UniPic's attention.
Heads of 80 are multiplied as 64 + 32 columns, the least that int8 products take: a sixth in vain.
Letters: M rows, K inputs, N outputs.
"""

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._op import Case, Cost, Operator, cdiv, launch, tl, triton
from ._product import (
    GROUP,
    GROUP_M,
    INSTRUCTION,
    check_product,
    epilogue,
    epilogue_options,
    finished,
    place,
    product_cost,
    product_operands,
    product_options,
    weight_rows,
)

MAGIC = 0x4B400000  # the bits of 1.5 * 2^23: with a whole number below 2^22 added they are those of the float's sum
OFFSET = 12582912.0
ADDED = 2  # instructions for a group's sum
GROUPS = range(64, GROUP + 1)  # their columns

# Rows, columns, and K of one of a group's products; warps, stages.
TILES = ((128, 128, 64, 8, 3), (64, 128, 64, 8, 3), (64, 64, 64, 4, 3), (16, 32, 64, 4, 3))


def int8_linear_of_groups_ref(x, x_scale, weight, weight_scale, bias, residual, gate, dtype=torch.float64) -> Tensor:
    """On the dequantised operands in float64."""
    wide = (x.double() * x_scale.double()[..., None]).flatten(-2)
    y = wide @ (weight.double() * weight_scale.double()[:, None]).T
    return finished(y, bias, "none", residual, gate, torch.float64)


def int8_linear_of_groups_torch(x, x_scale, weight, weight_scale, bias, residual, gate, dtype) -> Tensor:
    y = F.linear((x * x_scale[..., None]).flatten(-2), weight.float()) * weight_scale
    return finished(y, bias, "none", residual, gate, dtype)


@triton.jit(do_not_specialize=["m", "group"])
def _of_groups_kernel(
    x_ptr,  # (M, K) int8 contiguous
    x_scale_ptr,  # (M, K / GROUP) float32
    weight_ptr,  # (N, K) int8 contiguous
    scale_ptr,  # what follows is said at _product.epilogue
    bias_ptr,
    residual_ptr,
    gate_ptr,
    y_ptr,
    m,
    group,
    gate_stride,
    N: tl.constexpr,
    K: tl.constexpr,
    GROUP: tl.constexpr,
    REST: tl.constexpr,  # columns that cover what of a group is behind its products of BLOCK_K, or 0
    MAGIC: tl.constexpr,
    OFFSET: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    GATE: tl.constexpr,
    GELU: tl.constexpr,
    GELU_TANH: tl.constexpr,
    SILU: tl.constexpr,
    SWIGLU: tl.constexpr,
):
    row, column = place(m, tl.cdiv(N, BLOCK_N), BLOCK_M, GROUP_M)
    left = column * BLOCK_N
    safe = tl.minimum(row, m - 1).to(tl.int64)
    at = tl.arange(0, BLOCK_K)
    x_row, weight_row = x_ptr + safe[:, None] * K, weight_rows(left, N, BLOCK_N, False).to(tl.int64)[None, :] * K
    x_at, weight_at = x_row + at[None, :], weight_ptr + weight_row + at[:, None]
    x_scale_at = x_scale_ptr + safe * (K // GROUP)
    if REST:
        rest = tl.arange(0, REST)
        x_rest, weight_rest = x_row + rest[None, :], weight_ptr + weight_row + rest[:, None]
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for _ in range(K // GROUP):
        x_scale = tl.load(x_scale_at)
        sums = tl.full((BLOCK_M, BLOCK_N), MAGIC, tl.int32)
        for part in tl.static_range(GROUP // BLOCK_K):
            x, weight = tl.load(x_at + part * BLOCK_K), tl.load(weight_at + part * BLOCK_K)
            sums = tl.dot(x, weight, sums, out_dtype=tl.int32)
        if REST:
            behind: tl.constexpr = GROUP // BLOCK_K * BLOCK_K
            x = tl.load(x_rest + behind, mask=(rest < GROUP - behind)[None, :], other=0)
            weight = tl.load(weight_rest + behind, mask=(rest < GROUP - behind)[:, None], other=0)
            sums = tl.dot(x, weight, sums, out_dtype=tl.int32)
            x_rest += GROUP
            weight_rest += GROUP
        total += (sums.to(tl.float32, bitcast=True) - OFFSET) * x_scale[:, None]
        x_at += GROUP
        weight_at += GROUP
        x_scale_at += 1
    epilogue(
        total, tl.full((BLOCK_M,), 1.0, tl.float32), row, left, m, group, scale_ptr, bias_ptr, residual_ptr, gate_ptr,
        y_ptr, gate_stride, N, BIAS, RESIDUAL, GATE, GELU, GELU_TANH, SILU, SWIGLU,
    )  # fmt: skip


def _int8_linear_of_groups_triton(x, x_scale, weight, weight_scale, bias, residual, gate, dtype) -> Tensor:
    (n, k), lead = weight.shape, x.shape[:-2]
    y = torch.empty((*lead, n), dtype=dtype, device=x.device)
    m, group = x.numel() // k, x.shape[-1]
    how = "" if group == GROUP else f"d{group} "
    tiles = product_options("int8_of_groups", how, TILES, (m, n, k), x.device, fixed=("BLOCK_K",))
    launch(
        _of_groups_kernel,
        (cdiv(m, tiles["BLOCK_M"]) * cdiv(n, tiles["BLOCK_N"]),),
        *(x.contiguous(), x_scale.contiguous(), weight, weight_scale, weight_scale if bias is None else bias),
        y if residual is None else residual.contiguous(),
        *(y if gate is None else gate, y, m),
        1 if gate is None else m // max(len(gate), 1),
        0 if gate is None else gate.stride(0),
        K=k,
        GROUP=group,
        REST=_covering(group % tiles["BLOCK_K"]),
        MAGIC=MAGIC,
        OFFSET=OFFSET,
        GROUP_M=GROUP_M,
        **tiles,
        **epilogue_options(n, bias, "none", residual, gate),
    )
    return y


def _covering(columns: int) -> int:
    """Columns of a product that covers so few, fewer than 64; products of int8 take at least 32."""
    return 0 if not columns else 32 if columns <= 32 else 64


def int8_linear_of_groups_cost(x, x_scale, weight, weight_scale, bias, residual, gate, dtype) -> Cost:
    """With the columns in vain, and the sums of groups."""
    base = product_cost((x.flatten(-2), x_scale, weight, weight_scale, bias, residual, gate), weight, "none", dtype)
    behind = x.shape[-1] % 64
    of_a_sum = 2 * (_covering(behind) - behind) + ADDED * INSTRUCTION
    return replace(base, beside=of_a_sum * x_scale.numel() * len(weight))


_int8_linear_of_groups = Operator(
    "int8_linear_of_groups(Tensor x, Tensor x_scale, Tensor weight, Tensor weight_scale, Tensor? bias, "
    "Tensor? residual, Tensor? gate, ScalarType dtype) -> Tensor",
    torch=int8_linear_of_groups_torch,
    triton=_int8_linear_of_groups_triton,
    cost=int8_linear_of_groups_cost,
)


def int8_linear_of_groups(
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    gate: Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """residual + gate * (x W^T + bias) in `dtype` (..., N), of what `int8_linear_to_groups` or attention returns.

    x (..., K / g, g) int8, x_scale (..., K / g) float32, g 64 to 128; the rest as for int8_linear.
    """
    if x.shape[-1] not in GROUPS or x_scale.shape != x.shape[:-1]:
        raise ValueError(
            f"x {tuple(x.shape)} and x_scale {tuple(x_scale.shape)} are no groups of {GROUPS.start} to {GROUP} columns"
        )
    check_product(x.flatten(-2), weight, weight_scale, bias, "none", residual, gate)
    return _int8_linear_of_groups(x, x_scale, weight, weight_scale, bias, residual, gate, dtype)


def int8_linear_of_groups_cases() -> list[Case]:
    def make(m: int, k: int, n: int, group: int = GROUP, **how: Any):
        def arguments(device):
            noise = torch.Generator().manual_seed(0)
            x = torch.randint(-127, 128, (m, k // group, group), dtype=torch.int8, generator=noise)
            x_scale = torch.rand(m, k // group, generator=noise) / 64
            weight, scale, bias, _, *rest = product_operands(device, m, k, n, **how)
            return x.to(device), x_scale.to(device), weight, scale, bias, *rest

        return arguments

    return [
        Case("LLM down, 8320 rows", make(8320, 8960, 1536, bias=False, residual=True), "aot gpu"),
        Case("LLM down, 400 rows", make(400, 8960, 1536, bias=False, residual=True), "aot gpu"),
        Case("LLM down, 30 rows", make(30, 8960, 1536, bias=False, residual=True), "aot gpu"),
        Case("LLM o, 8320 rows", make(8320, 1536, 1536, bias=False, residual=True), "aot gpu"),
        Case("LLM o, 400 rows", make(400, 1536, 1536, bias=False, residual=True), "aot gpu"),
        Case("MAR fc2, 8320 rows", make(8320, 5120, 1280, residual=True), "aot gpu"),
        Case("MAR proj, 8320 rows", make(8320, 1280, 1280, 80, residual=True), "aot gpu"),
        Case("MAR proj, 400 rows", make(400, 1280, 1280, 80, residual=True), "aot gpu"),
        Case("MAR proj, 40 rows", make(40, 1280, 1280, 80, residual=True), "aot gpu"),
        Case("DiT fc2, a gate a picture", make(8192, 6144, 1536, residual=True, gates=2), "aot gpu"),
        *(
            Case(f"head fc2, {rows} rows", make(rows, 1536, 1536, residual=True, gates=rows), "aot gpu")
            for rows in (10, 200, 402, 1604)
        ),
        Case("tails of rows and columns", make(19, 384, 37, residual=True, dtype=torch.float32)),
        Case("a gate a row, no bias", make(6, 256, 48, residual=True, gates=6, bias=False)),
        Case("heads of 80, tails", make(19, 240, 37, 80, residual=True)),
        Case("heads of 104", make(5, 208, 16, 104)),
        Case("heads of 64", make(5, 192, 16, 64, bias=False)),
        Case("one row, one group, float16", make(1, 128, 16, dtype=torch.float16)),
        Case("no rows", make(0, 128, 32)),
    ]
