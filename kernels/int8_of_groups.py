"""Matrix product of whole numbers with a scale for each group of 128 inputs, as kernels/int8_to_groups.py leaves them.

    y = residual + gate * ((sum over g of s_g (q_x,g q_W,g^T)) w_scale + bias)

    g    a group of 128 columns of x and of the weight; s (M, groups)
    the rest as in kernels/int8_linear.py

Sums within a group are exact. Each costs an addition and a multiplication then, which a product of 128 int8 operands
hides at best, and counts as if it did not. No conversion: sums begin at a whole number whose bits are a float's, and
end as the bits of that float plus the sum.
Called for the MLPs of 8-bit models (engine/layers/linear.py), those of the head included, and behind their language
model's attention, whose heads are such groups. Letters: M rows, K inputs, N outputs.
"""

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._op import Case, Cost, Operator, launch, tl, triton
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

# Rows, columns, and K of one of a group's products; warps, stages.
TILES = ((128, 128, 64, 8, 3), (64, 64, 64, 4, 3), (16, 32, 64, 4, 3))


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
    x_scale_ptr,  # (M, K / 128) float32
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
    x_at = x_ptr + safe[:, None] * K + at[None, :]
    x_scale_at = x_scale_ptr + safe * (K // GROUP)
    weight_at = weight_ptr + weight_rows(left, N, BLOCK_N, False).to(tl.int64)[None, :] * K + at[:, None]
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for _ in range(K // GROUP):
        x_scale = tl.load(x_scale_at)
        sums = tl.full((BLOCK_M, BLOCK_N), MAGIC, tl.int32)
        for part in tl.static_range(GROUP // BLOCK_K):
            x, weight = tl.load(x_at + part * BLOCK_K), tl.load(weight_at + part * BLOCK_K)
            sums = tl.dot(x, weight, sums, out_dtype=tl.int32)
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
    m = x.numel() // k
    tiles = product_options("int8_of_groups", "", TILES, (m, n, k), x.device, fixed=("BLOCK_K",))
    launch(
        _of_groups_kernel,
        (triton.cdiv(m, tiles["BLOCK_M"]) * triton.cdiv(n, tiles["BLOCK_N"]),),
        *(x.contiguous(), x_scale.contiguous(), weight, weight_scale, weight_scale if bias is None else bias),
        y if residual is None else residual.contiguous(),
        *(y if gate is None else gate, y, m),
        1 if gate is None else m // max(len(gate), 1),
        0 if gate is None else gate.stride(0),
        K=k,
        GROUP=GROUP,
        MAGIC=MAGIC,
        OFFSET=OFFSET,
        GROUP_M=GROUP_M,
        **tiles,
        **epilogue_options(n, bias, "none", residual, gate),
    )
    return y


def int8_linear_of_groups_cost(x, x_scale, weight, weight_scale, bias, residual, gate, dtype) -> Cost:
    base = product_cost((x.flatten(-2), x_scale, weight, weight_scale, bias, residual, gate), weight, "none", dtype)
    return replace(base, beside=ADDED * INSTRUCTION * x_scale.numel() * len(weight))


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
    """residual + gate * (x W^T + bias) in `dtype` (..., N), of what `int8_linear_to_groups` returns.

    x (..., K / 128, 128) int8, x_scale (..., K / 128) float32; the rest as for int8_linear.
    """
    if x.shape[-1] != GROUP or x_scale.shape != x.shape[:-1]:
        raise ValueError(f"x {tuple(x.shape)} and x_scale {tuple(x_scale.shape)} are no groups of {GROUP} columns")
    check_product(x.flatten(-2), weight, weight_scale, bias, "none", residual, gate)
    return _int8_linear_of_groups(x, x_scale, weight, weight_scale, bias, residual, gate, dtype)


def int8_linear_of_groups_cases() -> list[Case]:
    def make(m: int, k: int, n: int, **how: Any):
        def arguments(device):
            noise = torch.Generator().manual_seed(0)
            x = torch.randint(-127, 128, (m, k // GROUP, GROUP), dtype=torch.int8, generator=noise)
            x_scale = torch.rand(m, k // GROUP, generator=noise) / 64
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
        Case("DiT fc2, a gate a picture", make(8192, 6144, 1536, residual=True, gates=2), "aot gpu"),
        *(
            Case(f"head fc2, {rows} rows", make(rows, 1536, 1536, residual=True, gates=rows), "aot gpu")
            for rows in (10, 200, 402, 1604)
        ),
        Case("tails of rows and columns", make(19, 384, 37, residual=True, dtype=torch.float32)),
        Case("a gate a row, no bias", make(6, 256, 48, residual=True, gates=6, bias=False)),
        Case("one row, one group, float16", make(1, 128, 16, dtype=torch.float16)),
        Case("no rows", make(0, 128, 32)),
    ]
