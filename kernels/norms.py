"""Normalisations over the last dimension, with what surrounds them fused in.

    RMSNorm     x / sqrt(mean x^2 + eps) * weight                                    language models
    LayerNorm   (x - mean x) / sqrt(var x + eps) * weight + bias                     MAR
    modulated   LayerNorm(x) (1 + scale) + shift                                     diffusion head, DiT (adaLN)
    *_int8      any of these as whole numbers and a scale a row, for kernels/int8_linear.py

Statistics are float32. Letters: N rows, D width. One program a row, which it reads once.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ._device import quantise_row
from ._op import Case, Cost, Operator, launch, next_power_of_2, tl, triton, unit_rows
from ._tuned import tuned
from .quantise import quantise_rows


def norm_ref(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    eps: float,
    rms: bool,
) -> Tensor:
    """All of them in float32 or wider. x (..., D); weight, bias (D); shift, scale (M, D), each for N / M rows."""
    x = x if x.dtype == torch.float64 else x.float()
    x = x if rms else x - x.mean(-1, keepdim=True)
    y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    y = y if weight is None else y * weight.to(y.dtype)
    y = y if bias is None else y + bias.to(y.dtype)
    if shift is None:
        return y
    rows = y.view(len(shift), -1, y.shape[-1])
    return (rows * (1 + scale.to(y.dtype)[:, None]) + shift.to(y.dtype)[:, None]).view(x.shape)


def norm_torch(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    eps: float,
    rms: bool,
) -> Tensor:
    """In x's dtype. RMSNorm is rounded before the weight, as language models do."""
    if rms:
        wide = x.float()
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype) * weight
    y = F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    if shift is None:
        return y
    rows = y.view(len(shift), -1, y.shape[-1])
    return (rows * (1 + scale[:, None]) + shift[:, None]).view(x.shape)


@triton.jit
def _norm_kernel(
    x_ptr,  # (N, D), rows x_stride apart
    weight_ptr,  # (D)
    bias_ptr,  # (D)
    shift_ptr,  # (M, D), rows m_stride apart; scale alike
    scale_ptr,
    y_ptr,  # (N, D) contiguous: x's type, or int8
    y_scale_ptr,  # (N) float32, of int8
    x_stride,
    m_stride,
    group,  # rows of x a row of shift is for
    eps,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    RMS: tl.constexpr,
    WEIGHT: tl.constexpr,
    BIAS: tl.constexpr,
    MODULATE: tl.constexpr,
    INT8: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < D
    x = tl.load(x_ptr + row * x_stride + at, mask=inside, other=0.0).to(tl.float32)
    if not RMS:
        x = tl.where(inside, x - tl.sum(x, axis=0) / D, 0.0)
    y = x * tl.rsqrt(tl.sum(x * x, axis=0) / D + eps)
    if RMS:
        y = y.to(x_ptr.dtype.element_ty).to(tl.float32)  # language models round here
    if WEIGHT:
        y = y * tl.load(weight_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if BIAS:
        y = y + tl.load(bias_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if MODULATE:
        modulation = (row // group) * m_stride + at
        scale = tl.load(scale_ptr + modulation, mask=inside, other=0.0).to(tl.float32)
        y = y * (1 + scale) + tl.load(shift_ptr + modulation, mask=inside, other=0.0).to(tl.float32)
    if INT8:
        whole, y_scale = quantise_row(y, inside)
        tl.store(y_ptr + row * D + at, whole, mask=inside)
        tl.store(y_scale_ptr + row, y_scale)
    else:
        tl.store(y_ptr + row * D + at, y.to(y_ptr.dtype.element_ty), mask=inside)


def _launch(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    eps: float,
    rms: bool,
    y: Tensor,
    y_scale: Tensor | None,
) -> None:
    rows = unit_rows(x.reshape(-1, x.shape[-1]))  # a copy only where the rows are not evenly spaced, or not dense
    (n, width), modulated = rows.shape, shift is not None
    if modulated and (shift.stride() != scale.stride() or shift.stride(1) != 1):
        shift, scale = shift.contiguous(), scale.contiguous()
    heuristic = {"num_warps": 4 if width <= 2048 else 8}
    launch(
        _norm_kernel,
        (n,),
        rows,
        rows if weight is None else weight,
        rows if bias is None else bias,
        shift if modulated else rows,
        scale if modulated else rows,
        y,
        y if y_scale is None else y_scale,
        rows.stride(0),
        shift.stride(0) if modulated else 0,
        n // len(shift) if modulated else 1,
        eps,
        D=width,
        BLOCK=next_power_of_2(width),
        RMS=rms,
        WEIGHT=weight is not None,
        BIAS=bias is not None,
        MODULATE=modulated,
        INT8=y_scale is not None,
        **tuned("norm", f"d{width}", heuristic, x.device),
    )


def _norm_triton(x, weight, bias, shift, scale, eps, rms):
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch(x, weight, bias, shift, scale, eps, rms, y, None)
    return y


def _norm_int8_triton(x, weight, bias, shift, scale, eps, rms):
    y = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    y_scale = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    _launch(x, weight, bias, shift, scale, eps, rms, y, y_scale)
    return y, y_scale


def _norm_int8_torch(x, weight, bias, shift, scale, eps, rms):
    return quantise_rows(norm_torch(x, weight, bias, shift, scale, eps, rms))


def norm_cost(x, weight, bias, shift, scale, eps, rms, out_bytes: int | None = None) -> Cost:
    read = sum(t.nbytes for t in (x, weight, bias, shift, scale) if t is not None)
    return Cost(8 * x.numel(), read + x.numel() * (out_bytes or x.element_size()))


def _norm_int8_cost(x, *arguments) -> Cost:
    whole = norm_cost(x, *arguments, out_bytes=1)
    return replace(whole, nbytes=whole.nbytes + 4 * (x.numel() // x.shape[-1]))


_ARGUMENTS = "(Tensor x, Tensor? weight, Tensor? bias, Tensor? shift, Tensor? scale, float eps, bool rms)"
norm = Operator(f"norm{_ARGUMENTS} -> Tensor", torch=norm_torch, triton=_norm_triton, cost=norm_cost)
norm_int8 = Operator(
    f"norm_int8{_ARGUMENTS} -> (Tensor, Tensor)", torch=_norm_int8_torch, triton=_norm_int8_triton, cost=_norm_int8_cost
)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight over the last dimension: statistics in float32, rounded to x's dtype before the weight."""
    return norm(x, weight, None, None, None, eps, True)


def norm_cases() -> list[Case]:
    def make(*shape: int, kind: str, groups: int = 0, dtype: torch.dtype = torch.float32, spread: int = 1):
        def arguments(device):
            noise = torch.Generator().manual_seed(0)

            def random(*size: int) -> Tensor:
                return torch.randn(*size, generator=noise).to(device, dtype)

            width = shape[-1]
            x = random(*shape[:-1], spread * width)[..., :width]
            weight = None if kind == "bare" else random(width)
            bias = random(width) if kind == "layer" else None
            modulation = random(groups, 3 * width) if groups else None  # as one GEMM makes them
            shift, scale, _ = modulation.chunk(3, dim=-1) if groups else (None, None, None)
            return x, weight, bias, shift, scale, 1e-6, kind == "rms"

        return arguments

    half = torch.bfloat16
    return [
        Case("MAR at 1024, both guidance halves", make(8320, 1280, kind="layer", dtype=half), "aot gpu"),
        Case("LLM block at 1024", make(8320, 1536, kind="rms", dtype=half), "aot gpu"),
        Case("one token of an answer", make(1, 1536, kind="rms", dtype=half)),
        Case("diffusion head, a modulation a row", make(33, 1536, kind="layer", groups=33, dtype=half)),
        Case("DiT, a modulation a picture, no weight", make(2, 7, 1536, kind="bare", groups=2, dtype=half)),
        Case("tiny head in float32", make(5, 48, kind="layer", groups=5)),
        Case("width that is no power of two, rows apart", make(3, 5, 37, kind="rms", spread=2)),
        Case("no rows", make(0, 64, kind="rms")),
        Case("a wide row takes more warps", make(2, 3584, kind="rms", dtype=half)),
    ]
