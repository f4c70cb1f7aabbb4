"""Matrix product with int8 weights and floating rows, W8A16, for 1 to 16 rows: y = x W^T, W ~ q_W * w_scale.

    y = residual + gate * activation((x q_W^T) w_scale + bias)

    x (M, K) in the model's dtype; q_W (N, K), w_scale (N), SwiGLU and the rest as in kernels/int8_linear.py

So few rows only wait for the weight, which is read once. One row (a token of an answer) is summed by plain
multiplication, a few columns a program; more rows go through the tensor cores, where int8 is exact in any 16-bit type.
Where columns alone do not occupy the card, programs share K: each writes its sums, and a second kernel adds them up in
one order, so that results do not depend on who comes first.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._op import Case, Cost, Operator, cdiv, launch, tl, triton
from ._product import (
    check_product,
    epilogue,
    epilogue_options,
    finished,
    out_features,
    product_cost,
    product_operands,
    weight_rows,
)
from ._tuned import Options, dtype_class, tuned

MOST_ROWS = 16
JOINED = 128  # columns that a program of the second kernel adds up


def tile(m: int, n: int, k: int, dtype: torch.dtype) -> tuple[int, int, int]:
    """(columns of a program, K of a step, programs that share K); a heuristic, never measured."""
    if m == 1:
        return 4, 1024, 1
    programs = cdiv(n, 16)
    split = 1 if programs >= 128 or k < 4096 else min(cdiv(192, programs), 8)
    return 16, 32 if dtype == torch.float32 else 256, split  # no tensor cores for float32: more would spill


def options(block_m: int, n: int, k: int, x: Tensor) -> Options:
    """Of the launch for up to block_m rows x and a weight (n, k)."""
    block_n, block_k, split = tile(block_m, n, k, x.dtype)
    heuristic = {"BLOCK_N": block_n, "BLOCK_K": block_k, "SPLIT": split, "num_warps": 4, "num_stages": 4}

    def staged(tiles: Options) -> int:
        return tiles["BLOCK_K"] * (block_m * x.element_size() + tiles["BLOCK_N"])

    return tuned("int8_weight", f"{dtype_class(x.dtype)} m{block_m} n{n} k{k}", heuristic, x.device, staged)


def int8_weight_ref(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    activation: str,
    residual: Tensor | None,
    gate: Tensor | None,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """On the dequantised weight in float64."""
    y = x.double() @ (weight.double() * weight_scale.double()[:, None]).T
    return finished(y, bias, activation, residual, gate, torch.float64)


def int8_weight_torch(x, weight, weight_scale, bias, activation, residual, gate, dtype) -> Tensor:
    y = F.linear(x.float(), weight.float()) * weight_scale.float()
    return finished(y, bias, activation, residual, gate, dtype)


@triton.jit(do_not_specialize=["m", "group"])
def _int8_weight_kernel(
    x_ptr,  # (M, K), rows x_stride apart
    weight_ptr,  # (N, K) int8 contiguous, or (2 N, K) for SwiGLU
    sums_ptr,  # (SPLIT, M, N or 2 N) float32, where programs share K
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
    SPLIT: tl.constexpr,
    BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    GATE: tl.constexpr,
    GELU: tl.constexpr,
    GELU_TANH: tl.constexpr,
    SILU: tl.constexpr,
    SWIGLU: tl.constexpr,
):
    SHARE: tl.constexpr = tl.cdiv(K, SPLIT * BLOCK_K) * BLOCK_K  # of K, a program's
    left = tl.program_id(0) * (BLOCK_N // 2 if SWIGLU else BLOCK_N)
    row = tl.arange(0, BLOCK_M)
    column = weight_rows(left, N, BLOCK_N, SWIGLU)
    at = tl.arange(0, BLOCK_K)
    begin = tl.program_id(1) * SHARE
    if BLOCK_M == 1:
        products = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
        weight_at = weight_ptr + column.to(tl.int64)[:, None] * K + at[None, :]
        # Without a tl.dot the compiler prefetches only where it is told to.
        for start in tl.range(begin, begin + SHARE, BLOCK_K, num_stages=4):
            inside = at < K - start
            x = tl.load(x_ptr + start + at, mask=inside, other=0.0).to(tl.float32)
            weight = tl.load(weight_at + start, mask=inside[None, :], other=0)
            products += weight.to(tl.float32) * x[None, :]
        sums = tl.sum(products, axis=1)[None, :]
    else:
        sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        x_at = x_ptr + tl.minimum(row, m - 1)[:, None] * x_stride + at[None, :]
        weight_at = weight_ptr + column.to(tl.int64)[None, :] * K + at[:, None]
        for start in range(begin, begin + SHARE, BLOCK_K):
            inside = at < K - start
            x = tl.load(x_at + start, mask=inside[None, :], other=0.0)
            weight = tl.load(weight_at + start, mask=inside[:, None], other=0)
            sums = tl.dot(x, weight.to(tl.float32).to(x.dtype), sums, input_precision="ieee")

    if SPLIT > 1:  # a column that the weight ends before is the last one again, with the same sums
        WIDTH: tl.constexpr = 2 * N if SWIGLU else N
        to = (tl.program_id(1) * m + row)[:, None] * WIDTH + column[None, :]
        tl.store(sums_ptr + to, sums, mask=(row < m)[:, None])
    else:
        epilogue(
            sums, tl.full((BLOCK_M,), 1.0, tl.float32), row, left, m, group, scale_ptr, bias_ptr, residual_ptr,
            gate_ptr, y_ptr, gate_stride, N, BIAS, RESIDUAL, GATE, GELU, GELU_TANH, SILU, SWIGLU,
        )  # fmt: skip


@triton.jit(do_not_specialize=["m", "group"])
def _join_kernel(
    sums_ptr,  # as above, with all that follows
    scale_ptr,
    bias_ptr,
    residual_ptr,
    gate_ptr,
    y_ptr,
    m,
    group,
    gate_stride,
    N: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLIT: tl.constexpr,
    BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    GATE: tl.constexpr,
    GELU: tl.constexpr,
    GELU_TANH: tl.constexpr,
    SILU: tl.constexpr,
    SWIGLU: tl.constexpr,
):
    WIDTH: tl.constexpr = 2 * N if SWIGLU else N
    left = tl.program_id(0) * (BLOCK_N // 2 if SWIGLU else BLOCK_N)
    row = tl.program_id(1) + tl.arange(0, 1)
    at = row[:, None] * WIDTH + weight_rows(left, N, BLOCK_N, SWIGLU)[None, :]
    sums = tl.zeros((1, BLOCK_N), tl.float32)
    for part in tl.static_range(SPLIT):
        sums += tl.load(sums_ptr + part * m * WIDTH + at)
    epilogue(
        sums, tl.full((1,), 1.0, tl.float32), row, left, m, group, scale_ptr, bias_ptr, residual_ptr,
        gate_ptr, y_ptr, gate_stride, N, BIAS, RESIDUAL, GATE, GELU, GELU_TANH, SILU, SWIGLU,
    )  # fmt: skip


def _int8_weight_triton(x, weight, weight_scale, bias, activation, residual, gate, dtype):
    rows = x.reshape(-1, x.shape[-1])  # a copy only where the rows are not evenly spaced
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    (m, k), n = rows.shape, out_features(weight, activation)
    y = torch.empty((*x.shape[:-1], n), dtype=dtype, device=x.device)
    block_m = 1 if m == 1 else MOST_ROWS
    tiles = options(block_m, len(weight), k, x)
    split = tiles["SPLIT"]
    sums = torch.empty((split, m, len(weight)), dtype=torch.float32, device=x.device) if split > 1 else y
    after = (
        weight_scale,
        weight_scale if bias is None else bias,
        y if residual is None else residual.contiguous(),
        y if gate is None else gate,
        y,
        m,
        1 if gate is None else m // max(len(gate), 1),
    )
    gate_stride = 0 if gate is None else gate.stride(0)
    flags = epilogue_options(n, bias, activation, residual, gate)
    halved = 2 if flags["SWIGLU"] else 1
    launch(
        _int8_weight_kernel,
        (cdiv(n * halved, tiles["BLOCK_N"]) if m else 0, split),
        rows,
        weight,
        sums,
        *after,
        rows.stride(0),
        gate_stride,
        K=k,
        BLOCK_M=block_m,
        **flags,
        **tiles,
    )
    if split > 1:
        grid = (cdiv(n * halved, JOINED), m)
        launch(_join_kernel, grid, sums, *after, gate_stride, BLOCK_N=JOINED, SPLIT=split, **flags, num_warps=4)
    return y


def int8_weight_cost(x, weight, weight_scale, bias, activation, residual, gate, dtype) -> Cost:
    return product_cost((x, weight, weight_scale, bias, residual, gate), weight, activation, dtype)


_int8_weight = Operator(
    "int8_weight(Tensor x, Tensor weight, Tensor weight_scale, Tensor? bias, str activation, Tensor? residual, "
    "Tensor? gate, ScalarType dtype) -> Tensor",
    torch=int8_weight_torch,
    triton=_int8_weight_triton,
    cost=int8_weight_cost,
)


def int8_weight_linear(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    activation: str = "none",
    residual: Tensor | None = None,
    gate: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """residual + gate * activation(x W^T + bias) in `dtype`, x's where None, for at most 16 rows of x (..., K).

    weight (N, K) int8 contiguous, weight_scale (N) float32, the rest as for int8_linear.
    """
    check_product(x, weight, weight_scale, bias, activation, residual, gate)
    if x.numel() > MOST_ROWS * x.shape[-1]:
        raise ValueError(f"x {tuple(x.shape)} has more than {MOST_ROWS} rows: quantise them, for int8_linear")
    return _int8_weight(x, weight, weight_scale, bias, activation, residual, gate, dtype or x.dtype)


def int8_weight_cases() -> list[Case]:
    def make(m: int, k: int, n: int, spread: int = 1, **how: Any):
        def arguments(device):
            noise = torch.Generator().manual_seed(0)
            rest = product_operands(device, m, k, n, **how)
            return torch.randn(m, spread * k, generator=noise).to(device, rest[-1])[:, :k], *rest

        return arguments

    layers = {
        "LLM qkv": {"k": 1536, "n": 2048},
        "LLM o": {"k": 1536, "n": 1536, "bias": False, "residual": True},
        "LLM gate and up": {"k": 1536, "n": 17920, "bias": False, "activation": "swiglu"},
        "LLM down": {"k": 8960, "n": 1536, "bias": False, "residual": True},
        "head fc1": {"k": 1536, "n": 1536, "activation": "silu"},
        "head modulations": {"k": 1536, "n": 4608},
    }
    real = [Case(f"{name}, {m} rows", make(m, **how), "aot gpu") for name, how in layers.items() for m in (1, 10)]
    wide = {"dtype": torch.float32}
    return [
        *real,
        Case("head fc2, a gate a row", make(10, 1536, 1536, residual=True, gates=10), "aot gpu"),
        Case("one row, all tails", make(1, 1100, 7, activation="gelu", residual=True, gates=1)),
        Case("one row, SwiGLU with an odd width", make(1, 48, 2 * 11, activation="swiglu", **wide)),
        Case("few rows, rows apart, a gate a picture", make(6, 272, 36, spread=2, gates=2, dtype=torch.float16)),
        Case("few rows share K", make(5, 4112, 40, activation="gelu_tanh", residual=True, **wide)),
        Case("few rows share K, SwiGLU with an odd width", make(2, 4096, 2 * 13, activation="swiglu")),
        Case("16 rows, one more weight row than a program has", make(16, 64, 17, activation="silu")),
        Case("no rows", make(0, 64, 32)),
    ]
