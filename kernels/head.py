"""The diffusion head's fused steps: with the modulations at hand, a block is two launches.

    modulated_linear  silu((LN(h) (1 + scale) + shift) W^T + b)                        fc1 of a block
    gated_linear      h + gate * (u W^T + b)                                           fc2 of a block

Called by engine/layers/linear.py. Rows are tens to hundreds: small products bound by reading W, so the normalisation
is computed anew by every program that needs it, which costs less than a launch.
Letters: M rows, K width in, O width out.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ._device import activate, moments
from ._op import Case, Cost, Operator, cdiv, launch, random_tensor, tl, triton
from ._tuned import Options, dtype_class, row_class, tuned
from .linear import linear


def modulated_linear_ref(h, shift, scale, norm_weight, norm_bias, eps, weight, bias) -> Tensor:
    """In the tensors' dtype. What the operators take is said at the functions of their names."""
    normed = F.layer_norm(h, h.shape[-1:], norm_weight, norm_bias, eps)
    return F.silu(linear(normed * (1 + scale) + shift, weight, bias))


def gated_linear_ref(u, weight, bias, gate, h) -> Tensor:
    return h + gate * linear(u, weight, bias)


@triton.jit(do_not_specialize=["rows"])
def _modulated_linear_kernel(
    h_ptr,  # (M, K), rows h_stride apart
    shift_ptr,  # (M, K), rows m_stride apart; scale alike
    scale_ptr,
    norm_weight_ptr,  # (K); norm_bias alike
    norm_bias_ptr,
    weight_ptr,  # (O, K) contiguous
    bias_ptr,  # (O)
    y_ptr,  # (M, O)
    h_stride,
    m_stride,
    eps,
    rows,  # M
    K: tl.constexpr,
    OUT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAT: tl.constexpr,
):
    col = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.program_id(1).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = row < rows
    mean, variance = moments(h_ptr + tl.minimum(row, rows - 1) * h_stride, K, BLOCK_M, STAT)
    inverse = tl.rsqrt(variance + eps)
    y = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        there = inside[:, None] & (k < K)[None, :]
        a = tl.load(h_ptr + row[:, None] * h_stride + k[None, :], mask=there, other=0.0).to(tl.float32)
        a = (a - mean[:, None]) * inverse[:, None]
        a = a * tl.load(norm_weight_ptr + k, mask=k < K, other=0.0).to(tl.float32)[None, :]
        a = a + tl.load(norm_bias_ptr + k, mask=k < K, other=0.0).to(tl.float32)[None, :]
        modulation = row[:, None] * m_stride + k[None, :]
        scale = tl.load(scale_ptr + modulation, mask=there, other=0.0).to(tl.float32)
        shift = tl.load(shift_ptr + modulation, mask=there, other=0.0).to(tl.float32)
        a = (a * (1 + scale) + shift).to(h_ptr.dtype.element_ty)
        w_there = (k < K)[:, None] & (col < OUT)[None, :]  # zeros beyond K, whatever stands in a there
        w = tl.load(weight_ptr + col[None, :].to(tl.int64) * K + k[:, None], mask=w_there, other=0.0)
        y = tl.dot(a, w, y, input_precision="ieee")
    y += tl.load(bias_ptr + col, mask=col < OUT, other=0.0).to(tl.float32)[None, :]
    y = activate(y, False, False, True)
    to = y_ptr + row[:, None] * OUT + col[None, :]
    tl.store(to, y.to(y_ptr.dtype.element_ty), mask=inside[:, None] & (col < OUT)[None, :])


@triton.jit(do_not_specialize=["rows"])
def _gated_linear_kernel(
    u_ptr,  # (M, K), rows u_stride apart
    weight_ptr,  # (O, K) contiguous
    bias_ptr,  # (O)
    gate_ptr,  # (M, O), rows gate_stride apart
    h_ptr,  # (M, O), rows h_stride apart
    y_ptr,  # (M, O) contiguous
    u_stride,
    gate_stride,
    h_stride,
    rows,  # M
    K: tl.constexpr,
    OUT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    col = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.program_id(1).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = row < rows
    y = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        there = inside[:, None] & (k < K)[None, :]
        u = tl.load(u_ptr + row[:, None] * u_stride + k[None, :], mask=there, other=0.0)
        w_there = (k < K)[:, None] & (col < OUT)[None, :]
        w = tl.load(weight_ptr + col[None, :].to(tl.int64) * K + k[:, None], mask=w_there, other=0.0)
        y = tl.dot(u, w, y, input_precision="ieee")
    y += tl.load(bias_ptr + col, mask=col < OUT, other=0.0).to(tl.float32)[None, :]
    there = inside[:, None] & (col < OUT)[None, :]
    y *= tl.load(gate_ptr + row[:, None] * gate_stride + col[None, :], mask=there, other=0.0).to(tl.float32)
    y += tl.load(h_ptr + row[:, None] * h_stride + col[None, :], mask=there, other=0.0).to(tl.float32)
    tl.store(y_ptr + row[:, None] * OUT + col[None, :], y.to(y_ptr.dtype.element_ty), mask=there)


def _tiles(kernel: str, rows: int, weight: Tensor, operands: int, **for_many: int) -> Options:
    """`operands`: of the product's left side, how many tensors make it."""

    def staged(tiles: Options) -> int:
        return tiles["BLOCK_K"] * (operands * tiles["BLOCK_M"] + tiles["BLOCK_N"]) * weight.element_size()

    key = f"{dtype_class(weight.dtype)} m{row_class(rows)} n{len(weight)} k{weight.shape[1]}"
    return tuned(kernel, key, _heuristic(rows, weight, **for_many), weight.device, staged)


def _heuristic(rows: int, weight: Tensor, **for_many: int) -> Options:
    """Few rows are bound by reading W, so many programs share it out; many rows want to reuse it."""
    k = 256 // weight.element_size()
    if rows <= 32:
        return {"BLOCK_M": 16 if rows <= 16 else 32, "BLOCK_N": 16, "BLOCK_K": k, "num_warps": 4, "num_stages": 4}
    if rows <= 128:
        return {"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_K": k // 2, "num_warps": 4, "num_stages": 4}
    if rows <= 512:
        return {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": k // 2, **for_many}
    return {"BLOCK_M": 64, "BLOCK_N": 128, "BLOCK_K": k // 4, "num_warps": 8, "num_stages": 3}


def _modulated_linear_triton(h, shift, scale, norm_weight, norm_bias, eps, weight, bias):
    (rows, width), out = h.shape, len(weight)
    if shift.stride() != scale.stride() or shift.stride(1) != 1:
        shift, scale = shift.contiguous(), scale.contiguous()
    h = h if h.stride(1) == 1 else h.contiguous()
    y, tiles = h.new_empty(rows, out), _tiles("modulated_linear", rows, weight, 3, num_warps=8, num_stages=2)
    launch(
        _modulated_linear_kernel,
        (cdiv(out, tiles["BLOCK_N"]), cdiv(rows, tiles["BLOCK_M"])),
        h,
        shift,
        scale,
        norm_weight,
        norm_bias,
        weight.contiguous(),
        bias,
        y,
        h.stride(0),
        shift.stride(0),
        eps,
        rows,
        K=width,
        OUT=out,
        STAT=1024 * tiles["num_warps"] // tiles["BLOCK_M"],  # 32 values a thread
        **tiles,
    )
    return y


def _gated_linear_triton(u, weight, bias, gate, h):
    (rows, width), out = u.shape, len(weight)
    u, gate, h = (x if x.stride(1) == 1 else x.contiguous() for x in (u, gate, h))
    y, tiles = h.new_empty(rows, out), _tiles("gated_linear", rows, weight, 1, num_warps=4, num_stages=3)
    launch(
        _gated_linear_kernel,
        (cdiv(out, tiles["BLOCK_N"]), cdiv(rows, tiles["BLOCK_M"])),
        u,
        weight.contiguous(),
        bias,
        gate,
        h,
        y,
        u.stride(0),
        gate.stride(0),
        h.stride(0),
        rows,
        K=width,
        OUT=out,
        **tiles,
    )
    return y


def _nbytes(*tensors: Tensor) -> int:
    return sum(t.nbytes for t in tensors)


def modulated_linear_cost(h, shift, scale, norm_weight, norm_bias, eps, weight, bias) -> Cost:
    rows, out = len(h), len(weight)
    moved = _nbytes(h, shift, scale, norm_weight, norm_bias, weight, bias) + rows * out * h.element_size()
    return Cost(2 * rows * weight.numel() + 8 * h.numel(), moved)


def gated_linear_cost(u, weight, bias, gate, h) -> Cost:
    return Cost(2 * len(u) * weight.numel() + 2 * h.numel(), _nbytes(u, weight, bias, gate, h, h))


_modulated_linear = Operator(
    "modulated_linear(Tensor h, Tensor shift, Tensor scale, Tensor norm_weight, Tensor norm_bias, float eps, "
    "Tensor weight, Tensor bias) -> Tensor",
    torch=modulated_linear_ref,
    triton=_modulated_linear_triton,
    cost=modulated_linear_cost,
)
_gated_linear = Operator(
    "gated_linear(Tensor u, Tensor weight, Tensor bias, Tensor gate, Tensor h) -> Tensor",
    torch=gated_linear_ref,
    triton=_gated_linear_triton,
    cost=gated_linear_cost,
)


def modulated_linear(
    h: Tensor,
    shift: Tensor,
    scale: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    weight: Tensor,
    bias: Tensor,
) -> Tensor:
    """silu((LN(h) (1 + scale) + shift) W^T + b), (M, O).

    h, shift, scale (M, K), norm_* (K), weight (O, K), bias (O).
    """
    return _modulated_linear(h, shift, scale, norm_weight, norm_bias, eps, weight, bias)


def gated_linear(u: Tensor, weight: Tensor, bias: Tensor, gate: Tensor, h: Tensor) -> Tensor:
    """h + gate * (u W^T + b): u (M, K), weight (O, K), bias (O), gate and h (M, O)."""
    return _gated_linear(u, weight, bias, gate, h)


ROWS = (10, 20, 40, 100, 200, 402, 804, 1604)  # of rounds of a picture at 1024x1024, and of batches of two and four


def random_block(rows: int, width: int, out: int, dtype: torch.dtype = torch.bfloat16):
    """Makes a case's arguments of `modulated_linear`."""

    def arguments(device):
        how = {"dtype": dtype, "device": device}
        shift, scale, _ = random_tensor(rows, 3 * width, **how).chunk(3, dim=-1)
        norm = random_tensor(width, **how), random_tensor(1, width, **how)[0]
        weight, bias = random_tensor(out, width, **how) * width**-0.5, random_tensor(out, **how)
        return random_tensor(rows, width, **how), shift, scale, *norm, 1e-6, weight, bias

    return arguments


def modulated_linear_cases() -> list[Case]:
    make = random_block
    return [
        *(Case(f"{rows} rows of a block", make(rows, 1536, 1536), "aot gpu") for rows in ROWS),
        *(
            Case(f"{n} rows in float32", make(n, 1536, 1536, dtype=torch.float32), "aot gpu")
            for n in (20, 100, 402, 804)
        ),
        Case("few rows, odd widths", make(5, 150, 37, dtype=torch.float32)),
        Case("a few more", make(33, 72, 40)),
        Case("many rows", make(130, 48, 12)),
        Case("rows of a batch of pictures", make(515, 24, 12)),
        Case("no rows", make(0, 32, 32)),
    ]


def gated_linear_cases() -> list[Case]:
    def make(rows: int, width: int, out: int, dtype: torch.dtype = torch.bfloat16):
        def arguments(device):
            how = {"dtype": dtype, "device": device}
            gate = random_tensor(rows, 3 * out, **how)[:, 2 * out :]
            weight, bias = random_tensor(out, width, **how) * width**-0.5, random_tensor(out, **how)
            return random_tensor(rows, width, **how), weight, bias, gate, random_tensor(rows, out, **how)

        return arguments

    return [
        *(Case(f"{rows} rows of a block", make(rows, 1536, 1536), "aot gpu") for rows in ROWS),
        *(Case(f"{n} rows in float32", make(n, 1536, 1536, torch.float32), "aot gpu") for n in (20, 100, 402, 804)),
        Case("few rows, odd widths", make(5, 150, 37, torch.float32)),
        Case("a few more", make(33, 72, 40)),
        Case("many rows", make(130, 48, 12)),
        Case("rows of a batch of pictures", make(515, 24, 12)),
        Case("no rows", make(0, 32, 32)),
    ]
