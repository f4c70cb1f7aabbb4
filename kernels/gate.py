"""The elementwise products around matrix products that no product's epilogue takes in.

    swiglu     silu(gate) * up, x = [gate | up]          language model MLP
    gated_add  h + gate * u                              diffusion head, DiT (adaLN)

float32 inside, one rounding at the end. Bare SiLU and GELU are one launch in torch already. Letters: N rows, D width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ._device import activate
from ._op import Case, Cost, Operator, cdiv, launch, random_tensor, row_share, tl, triton, unit_rows


def swiglu_ref(x: Tensor) -> Tensor:
    """x (..., 2 D) to (..., D), in float32 or wider."""
    gate, up = (x if x.dtype == torch.float64 else x.float()).chunk(2, dim=-1)
    return gate * torch.sigmoid(gate) * up


def _swiglu_torch(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


def gated_add_ref(h: Tensor, gate: Tensor, u: Tensor) -> Tensor:
    """h, u (..., D); gate (M, D), each row for N / M rows of u; in float32 or wider."""
    wide = torch.float64 if h.dtype == torch.float64 else torch.float32
    return _gated_add_torch(h.to(wide), gate.to(wide), u.to(wide))


def _gated_add_torch(h: Tensor, gate: Tensor, u: Tensor) -> Tensor:
    if gate.shape == u.shape:
        return h + gate * u
    rows = u.reshape(len(gate), -1, u.shape[-1])
    return h + (gate[:, None] * rows).view(u.shape)


@triton.jit
def _swiglu_kernel(
    x_ptr,  # (N, 2 D), rows x_stride apart
    y_ptr,  # (N, D) contiguous
    x_stride,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(x_ptr + row * x_stride + at, mask=at < D, other=0.0).to(tl.float32)
    up = tl.load(x_ptr + row * x_stride + D + at, mask=at < D, other=0.0).to(tl.float32)
    y = activate(gate, False, False, True) * up
    tl.store(y_ptr + row * D + at, y.to(y_ptr.dtype.element_ty), mask=at < D)


@triton.jit(do_not_specialize=["group"])
def _gated_add_kernel(
    h_ptr,  # (N, D), rows h_stride apart; u alike
    gate_ptr,  # (M, D), rows gate_stride apart
    u_ptr,
    y_ptr,  # (N, D) contiguous
    h_stride,
    gate_stride,
    u_stride,
    group,  # rows of u a row of gate is for
    D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    h = tl.load(h_ptr + row * h_stride + at, mask=at < D, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + (row // group) * gate_stride + at, mask=at < D, other=0.0).to(tl.float32)
    u = tl.load(u_ptr + row * u_stride + at, mask=at < D, other=0.0).to(tl.float32)
    tl.store(y_ptr + row * D + at, (h + gate * u).to(y_ptr.dtype.element_ty), mask=at < D)


def _swiglu_triton(x: Tensor) -> Tensor:
    width = x.shape[-1] // 2
    rows = unit_rows(x.reshape(-1, 2 * width))
    y = torch.empty(*x.shape[:-1], width, dtype=x.dtype, device=x.device)
    share = row_share(width)
    launch(_swiglu_kernel, (len(rows), cdiv(width, share["BLOCK"])), rows, y, rows.stride(0), **share)
    return y


def _gated_add_triton(h: Tensor, gate: Tensor, u: Tensor) -> Tensor:
    width = h.shape[-1]
    h_rows, u_rows, gate = (unit_rows(x.reshape(-1, width)) for x in (h, u, gate))
    y, share = torch.empty(h.shape, dtype=h.dtype, device=h.device), row_share(width)
    launch(
        _gated_add_kernel,
        (len(u_rows), cdiv(width, share["BLOCK"])),
        h_rows,
        gate,
        u_rows,
        y,
        h_rows.stride(0),
        gate.stride(0),
        u_rows.stride(0),
        len(u_rows) // max(len(gate), 1),
        **share,
    )
    return y


def swiglu_cost(x: Tensor) -> Cost:
    return Cost(4 * x.numel(), x.numel() * x.element_size() * 3 // 2)


def gated_add_cost(h: Tensor, gate: Tensor, u: Tensor) -> Cost:
    return Cost(2 * h.numel(), (3 * h.numel() + gate.numel()) * h.element_size())


_swiglu = Operator("swiglu(Tensor x) -> Tensor", torch=_swiglu_torch, triton=_swiglu_triton, cost=swiglu_cost)
_gated_add = Operator(
    "gated_add(Tensor h, Tensor gate, Tensor u) -> Tensor",
    torch=_gated_add_torch,
    triton=_gated_add_triton,
    cost=gated_add_cost,
)


def swiglu(x: Tensor) -> Tensor:
    """silu(gate) * up of x (..., 2 D) = [gate | up]: (..., D)."""
    return _swiglu(x)


def gated_add(h: Tensor, gate: Tensor, u: Tensor) -> Tensor:
    """h + gate * u; h, u (..., D); gate like u, or (M, D) with each row for N / M rows of u."""
    return _gated_add(h, gate, u)


def swiglu_cases() -> list[Case]:
    def make(*shape: int, dtype: torch.dtype = torch.bfloat16, spread: int = 1):
        width = shape[-1]
        return lambda device: (random_tensor(*shape[:-1], spread * width, dtype=dtype, device=device)[..., :width],)

    return [
        Case("LLM block at 1024", make(2, 4160, 17920), "aot gpu"),
        Case("one token of an answer", make(1, 1, 17920), "aot gpu"),
        Case("two programs a row, the second partly full", make(3, 2400)),
        Case("odd width, rows apart, float32", make(2, 3, 74, dtype=torch.float32, spread=2)),
        Case("no rows", make(0, 64)),
    ]


def gated_add_cases() -> list[Case]:
    def make(*shape: int, gates: int, dtype: torch.dtype = torch.bfloat16):
        def arguments(device):
            width, rows = shape[-1], torch.Size(shape[:-1]).numel()
            gate = random_tensor(gates, 3 * width, dtype=dtype, device=device)[:, 2 * width :]  # as one GEMM makes them
            h, u = random_tensor(2 * rows, width, dtype=dtype, device=device).chunk(2)
            return h.view(shape), gate, u.view(shape)

        return arguments

    return [
        Case("diffusion head, 400 tokens with guidance", make(800, 1536, gates=800), "aot gpu"),
        Case("DiT, a gate a picture", make(2, 4096, 1536, gates=2), "aot gpu"),
        Case("a gate a row, two programs a row", make(5, 1536, gates=5)),
        Case("a gate for several rows, odd width, float32", make(2, 3, 37, gates=2, dtype=torch.float32)),
        Case("one row", make(1, 64, gates=1)),
        Case("no rows", make(0, 64, gates=0)),
    ]
