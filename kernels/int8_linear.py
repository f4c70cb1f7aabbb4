"""Matrix product of whole numbers, W8A8: y = x W^T with int8 operands, int32 sums and everything after in registers.

    y = residual + gate * activation(x_scale (q_x q_W^T) w_scale + bias)

    q_x (M, K), x_scale (M)        rows of kernels/quantise.py or of the norms, one scale a row
    q_W (N, K), w_scale (N)        K-contiguous, one scale an output channel
    activation                     those of kernels/quantise.py
    gate (G, N)                    each row for M / G rows of y, as adaLN gates are

For SwiGLU the weight is (2 N, K) = [gate | up], as one joins the two matrices of a checkpoint, w_scale and bias alike;
nothing is interleaved, since half of a program's columns read from either half. Sums are exact.
Called by engine/layers/linear.py for the head's modulations, DeepGen's attention outputs, and where nothing fits that
leaves whole numbers: without int8-qk, and in MLPs whose inner width is no multiple of 128. A few rows that are not
quantised are for kernels/int8_weight.py.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._op import Case, Cost, Operator, cdiv, launch, tl, triton
from ._product import (
    GROUP_M,
    check_product,
    epilogue,
    epilogue_options,
    finished,
    halves,
    out_features,
    place,
    product_cost,
    product_operands,
    product_options,
    weight_rows,
    whole_sums,
)

EXACT = 1024  # products of int8 whose sum float32 holds exactly: 1024 * 128 * 128 = 2^24

# Rows, columns, and K of one of a step's two products; warps, stages. Shared memory in bytes behind.
TILES = (
    (128, 256, 64, 8, 3),  # 98304: one program a multiprocessor, each operand byte used most often
    (128, 128, 32, 4, 4),  # 49152: two programs, one computes while the other stores
    (64, 128, 64, 8, 3),  # 49152
    (64, 64, 64, 4, 4),  # 49152
    (32, 64, 64, 4, 4),  # 36864
    (16, 32, 128, 4, 4),  # 36864: fewest wasted rows
)


def int8_linear_ref(
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    activation: str,
    residual: Tensor | None,
    gate: Tensor | None,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """On the dequantised operands in float64."""
    y = (x.double() * x_scale.double()[..., None]) @ (weight.double() * weight_scale.double()[:, None]).T
    return finished(y, bias, activation, residual, gate, torch.float64)


def int8_linear_torch(x, x_scale, weight, weight_scale, bias, activation, residual, gate, dtype) -> Tensor:
    return finished(
        whole_product(x, weight).float() * x_scale[..., None] * weight_scale, bias, activation, residual, gate, dtype
    )


def whole_product(x: Tensor, weight: Tensor) -> Tensor:
    """x W^T of int8 x (..., K) and weight (N, K), exact int32.

    By tensor cores where torch takes the shapes; else float32 in pieces that cannot round, which is also faster than
    whole numbers on most CPUs.
    """
    (n, k), rows = weight.shape, x.reshape(-1, x.shape[-1])
    if x.is_cuda and len(rows) > 16 and k % 8 == n % 8 == 0:
        return torch._int_mm(rows.contiguous(), weight.T).view(*x.shape[:-1], n)
    parts = zip(x.split(EXACT, dim=-1), weight.split(EXACT, dim=-1), strict=True)
    return sum(F.linear(a.float(), b.float()).to(torch.int32) for a, b in parts)


@triton.jit(do_not_specialize=["m", "group"])  # they change from round to round
def _int8_linear_kernel(
    x_ptr,  # (M, K) int8, rows x_stride apart
    x_scale_ptr,  # (M) float32
    weight_ptr,  # (N, K) int8 contiguous, or (2 N, K) for SwiGLU
    scale_ptr,  # what follows is said at _product.epilogue
    bias_ptr,
    residual_ptr,
    gate_ptr,
    y_ptr,
    m,
    group,
    x_stride,
    gate_stride,
    N: tl.constexpr,
    K: tl.constexpr,
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
    WIDE: tl.constexpr = BLOCK_N // 2 if SWIGLU else BLOCK_N  # columns of the output
    PARTS: tl.constexpr = 2 if BLOCK_N > 64 else 1  # so that the epilogue does not run out of registers
    row, column = place(m, tl.cdiv(N, WIDE), BLOCK_M, GROUP_M)
    left = column * WIDE
    weight_row = weight_rows(left, N, BLOCK_N, SWIGLU, PARTS)
    sums = whole_sums(x_ptr, weight_ptr, row, weight_row, m, x_stride, K, BLOCK_M, BLOCK_N, BLOCK_K)
    x_scale = tl.load(x_scale_ptr + row, mask=row < m, other=0.0)
    if PARTS == 2:
        sums, right = halves(sums)
        epilogue(
            right, x_scale, row, left + WIDE // 2, m, group, scale_ptr, bias_ptr, residual_ptr, gate_ptr, y_ptr,
            gate_stride, N, BIAS, RESIDUAL, GATE, GELU, GELU_TANH, SILU, SWIGLU,
        )  # fmt: skip
    epilogue(
        sums, x_scale, row, left, m, group, scale_ptr, bias_ptr, residual_ptr, gate_ptr, y_ptr,
        gate_stride, N, BIAS, RESIDUAL, GATE, GELU, GELU_TANH, SILU, SWIGLU,
    )  # fmt: skip


def _int8_linear_triton(x, x_scale, weight, weight_scale, bias, activation, residual, gate, dtype):
    rows = x.reshape(-1, x.shape[-1])  # a copy only where the rows are not evenly spaced
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    (m, k), n = rows.shape, out_features(weight, activation)
    y = torch.empty((*x.shape[:-1], n), dtype=dtype, device=x.device)
    tiles = product_options("int8_linear", "", TILES, (m, len(weight), k), x.device)
    launch(
        _int8_linear_kernel,
        (cdiv(m, tiles["BLOCK_M"]) * cdiv(n, tiles["BLOCK_N"] * n // len(weight)),),
        rows,
        x_scale.contiguous(),
        weight,
        weight_scale,
        weight_scale if bias is None else bias,
        y if residual is None else residual.contiguous(),
        y if gate is None else gate,
        y,
        m,
        1 if gate is None else m // max(len(gate), 1),
        rows.stride(0),
        0 if gate is None else gate.stride(0),
        K=k,
        GROUP_M=GROUP_M,
        **tiles,
        **epilogue_options(n, bias, activation, residual, gate),
    )
    return y


def int8_linear_cost(x, x_scale, weight, weight_scale, bias, activation, residual, gate, dtype) -> Cost:
    return product_cost((x, x_scale, weight, weight_scale, bias, residual, gate), weight, activation, dtype)


_int8_linear = Operator(
    "int8_linear(Tensor x, Tensor x_scale, Tensor weight, Tensor weight_scale, Tensor? bias, str activation, "
    "Tensor? residual, Tensor? gate, ScalarType dtype) -> Tensor",
    torch=int8_linear_torch,
    triton=_int8_linear_triton,
    cost=int8_linear_cost,
)


def int8_linear(
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    activation: str = "none",
    residual: Tensor | None = None,
    gate: Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """residual + gate * activation(x W^T + bias) in `dtype` (..., N); letters and layouts as at the top of the file.

    x (..., K) int8, x_scale (...) float32, weight (N, K) int8 contiguous, weight_scale (N) float32, bias (N), or (2 N)
    in place of N for swiglu; residual (..., N), gate (G, N), each row for as many rows of x. Other floats any type.
    """
    if x_scale.shape != x.shape[:-1]:
        raise ValueError(f"x_scale is {tuple(x_scale.shape)}, not one for each row of x {tuple(x.shape)}")
    check_product(x, weight, weight_scale, bias, activation, residual, gate)
    return _int8_linear(x, x_scale, weight, weight_scale, bias, activation, residual, gate, dtype)


def int8_linear_cases() -> list[Case]:
    def make(m: int, k: int, n: int, spread: int = 1, **how: Any):
        def arguments(device):
            noise = torch.Generator().manual_seed(0)
            x = torch.randint(-127, 128, (m, spread * k), dtype=torch.int8, generator=noise).to(device)[:, :k]
            scale = torch.rand(m, generator=noise).to(device) / 64
            return x, scale, *product_operands(device, m, k, n, **how)

        return arguments

    layers = {
        "LLM qkv": ((8320, 4160, 400), {"k": 1536, "n": 2048}),
        "LLM o": ((8320, 4160, 400), {"k": 1536, "n": 1536, "bias": False, "residual": True}),
        "LLM gate and up": ((8320, 4160, 400), {"k": 1536, "n": 17920, "bias": False, "activation": "swiglu"}),
        "LLM down": ((8320, 4160, 400), {"k": 8960, "n": 1536, "bias": False, "residual": True}),
        "MAR qkv": ((8320, 4160), {"k": 1280, "n": 3840}),
        "MAR proj": ((8320, 4160), {"k": 1280, "n": 1280, "residual": True}),
        "MAR fc1": ((8320, 4160), {"k": 1280, "n": 5120}),
        "MAR fc2": ((8320, 4160), {"k": 5120, "n": 1280, "residual": True}),
        "head fc1": ((400, 33, 10, 1), {"k": 1536, "n": 1536, "activation": "silu"}),
        "head fc2": ((400, 33, 10, 1), {"k": 1536, "n": 1536, "residual": True}),
        "head modulations": ((400, 33, 10, 1), {"k": 1536, "n": 4608}),
        "DiT fc1": ((8192,), {"k": 1536, "n": 6144, "activation": "gelu_tanh"}),
        "DiT fc2": ((8192,), {"k": 6144, "n": 1536, "residual": True, "gates": 2}),
    }
    real = [
        Case(f"{name}, {m} rows", make(m, **(how | {"gates": m} if name == "head fc2" else how)), "aot gpu")
        for name, (rows, how) in layers.items()
        for m in rows
    ]
    wide = {"dtype": torch.float32}
    return [
        *real,
        Case("MAR fc1 with its GELU", make(8320, 1280, 5120, activation="gelu"), "aot gpu"),
        Case("GELU, bands of 8 row tiles, all tails", make(150, 144, 40, activation="gelu", **wide)),
        Case("gated residual, a gate a row, rows apart", make(5, 256, 48, spread=2, residual=True, gates=5, **wide)),
        Case("gate a picture, float16", make(34, 96, 80, activation="gelu_tanh", gates=2, dtype=torch.float16)),
        Case("SwiGLU with an odd width", make(20, 272, 2 * 23, activation="swiglu", **wide)),
        Case("sums beyond the whole numbers of float32", make(3, 2064, 16, activation="silu", bias=False, **wide)),
        Case("one row in bfloat16, K that is no multiple of 16", make(1, 40, 33, residual=True)),
        Case("no rows", make(0, 64, 32)),
    ]
