"""What a product in 8 bits adds to queries, keys and values: the bias, and to keys what takes their mean off.

    y = bias, but where a column is one of the keys': y = - mean over a sample of rows of x_scale (q_x q_W^T) w_scale

Softmax does not see what all keys of a head share, so a vector near their mean may be taken off them
(kernels/quantise_qkv.py). The mean of keys with a bias holds the bias, so both cancel: in place of a bias, keys get
their mean without one, negated. The vector is the same for a picture, and kernels/
int8_to_heads.py needs it before any of its programs. Letters: B pictures, L rows of each, K inputs, N outputs.
"""

from typing import Any

import torch
from torch import Tensor

from ._op import Case, Cost, Operator, cdiv, launch, tl, triton
from ._product import check_product, product_operands, whole_sums
from .int8_linear import int8_linear_torch
from .quantise_qkv import SAMPLE

COLUMNS = 64  # of a program


def keys_off_ref(x, x_scale, weight, weight_scale, bias, begin, end) -> Tensor:
    """On the dequantised operands in float64."""
    rows = sample(x.double() * x_scale.double()[..., None])
    y = -(rows @ (weight.double() * weight_scale.double()[:, None]).T).mean(1)
    return _elsewhere(y, bias, begin, end)


def keys_off_torch(x, x_scale, weight, weight_scale, bias, begin, end) -> Tensor:
    rows = sample(x), sample(x_scale)
    y = int8_linear_torch(*rows, weight, weight_scale, None, "none", None, None, torch.float32)
    return _elsewhere(-y.mean(1), bias, begin, end)


def sample(x: Tensor) -> Tensor:
    """Evenly spaced rows of x (B, L, ...)."""
    return x[:, torch.arange(SAMPLE, device=x.device) * x.shape[1] // SAMPLE]


def _elsewhere(y: Tensor, bias: Tensor | None, begin: int, end: int) -> Tensor:
    column = torch.arange(y.shape[1], device=y.device)
    return torch.where((column >= begin) & (column < end), y, 0.0 if bias is None else bias.to(y.dtype))


@triton.jit(do_not_specialize=["length"])
def _keys_off_kernel(
    x_ptr,  # (B, L, K) int8 contiguous
    x_scale_ptr,  # (B, L)
    weight_ptr,  # (N, K) int8 contiguous
    scale_ptr,  # (N) float32, bias alike
    bias_ptr,
    y_ptr,  # (B, N) float32
    length,
    N: tl.constexpr,
    K: tl.constexpr,
    BEGIN: tl.constexpr,  # of the columns that are keys
    END: tl.constexpr,
    SAMPLE: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BIAS: tl.constexpr,
):
    image = tl.program_id(1).to(tl.int64)
    left = tl.program_id(0) * COLUMNS
    col = left + tl.arange(0, COLUMNS)
    y = tl.zeros((COLUMNS,), tl.float32)
    if BIAS:
        y += tl.load(bias_ptr + col, mask=col < N, other=0.0).to(tl.float32)
    if (left < END) & (left + COLUMNS > BEGIN):
        which = image * length + tl.arange(0, SAMPLE).to(tl.int64) * length // SAMPLE
        sums = whole_sums(
            x_ptr, weight_ptr, which, tl.minimum(col, N - 1), image * length + length, K, K, SAMPLE, COLUMNS, BLOCK_K
        )
        sums = sums.to(tl.float32) * tl.load(x_scale_ptr + which)[:, None]
        scale = tl.load(scale_ptr + col, mask=col < N, other=0.0)
        y = tl.where((col >= BEGIN) & (col < END), -tl.sum(sums, axis=0) / SAMPLE * scale, y)
    tl.store(y_ptr + image * N + col, y, mask=col < N)


def _keys_off_triton(x, x_scale, weight, weight_scale, bias, begin, end) -> Tensor:
    x, (images, length, k), n = x.contiguous(), x.shape, len(weight)
    y = torch.empty((images, n), dtype=torch.float32, device=x.device)
    launch(
        _keys_off_kernel,
        (cdiv(n, COLUMNS), images),
        *(x, x_scale.contiguous(), weight, weight_scale, weight_scale if bias is None else bias, y, length),
        N=n,
        K=k,
        BEGIN=begin,
        END=end,
        SAMPLE=SAMPLE,
        COLUMNS=COLUMNS,
        BLOCK_K=128,
        BIAS=bias is not None,
        num_warps=8,  # heuristic; with 4, registers do not suffice on sm_120
        num_stages=3,
    )
    return y


def keys_off_cost(x, x_scale, weight, weight_scale, bias, begin, end) -> Cost:
    images, n, k = len(x), end - begin, x.shape[-1]
    read = images * SAMPLE * (k + 4) + n * (k + 4) + (0 if bias is None else bias.nbytes)
    return Cost(2 * images * SAMPLE * n * k, read + 4 * images * len(weight))


_keys_off = Operator(
    "keys_off(Tensor x, Tensor x_scale, Tensor weight, Tensor weight_scale, Tensor? bias, int begin, int end) "
    "-> Tensor",
    torch=keys_off_torch,
    triton=_keys_off_triton,
    cost=keys_off_cost,
)


def keys_off(
    x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, begin: int, end: int
) -> Tensor:
    """(B, N) float32, of keys that are columns begin ... end - 1. x (B, L, K) int8 with at least one row, the rest as
    for int8_linear.
    """
    check_product(x, weight, weight_scale, bias, "none", None, None)
    check_sampled(x, x_scale)
    return _keys_off(x, x_scale, weight, weight_scale, bias, begin, end)


def check_sampled(x: Tensor, x_scale: Tensor) -> None:
    """Raises ValueError for rows of which no sample can be taken."""
    if x.dim() != 3 or not x.shape[1] or x_scale.shape != x.shape[:-1]:
        raise ValueError(f"x {tuple(x.shape)} and x_scale {tuple(x_scale.shape)} are not (B, L, K) and (B, L), L > 0")


def sampled_operands(
    device: torch.device | str, b: int, length: int, k: int, n: int, **how: Any
) -> tuple[Tensor | None, ...]:
    """Of a case: x (b, length, k) int8 and its scales, n rows of weight, their scales and a bias."""
    noise = torch.Generator().manual_seed(0)
    x = torch.randint(-127, 128, (b, length, k), dtype=torch.int8, generator=noise).to(device)
    x_scale = torch.rand(b, length, generator=noise).to(device) / 64
    return x, x_scale, *product_operands(device, b * length, k, n, **how)[:3]


def keys_off_cases() -> list[Case]:
    def make(*shape: int, begin: int, end: int, **how: Any):
        return lambda device: (*sampled_operands(device, *shape, **how), begin, end)

    return [
        Case("MAR at 1024, both guidance halves", make(2, 4160, 1280, 3840, begin=1280, end=2560), "aot gpu"),
        Case("MAR, keys and values", make(2, 4160, 1280, 2560, begin=0, end=1280), "aot gpu"),
        Case("a block with both, and one with none", make(2, 70, 144, 200, begin=40, end=130)),
        Case("one row, no bias", make(1, 1, 64, 96, begin=0, end=48, bias=False, dtype=torch.float32)),
    ]
