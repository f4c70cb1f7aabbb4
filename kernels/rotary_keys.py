"""One vector near the mean of a head's rotated keys, before a product in 8 bits makes any of them.

    off = mean over a sample of rows of rope(x_scale (q_x q_W^T) w_scale + bias)

As kernels/keys_off.py, for keys that are rotated by their position: there a bias is no longer the same for all of them,
but that of the slow channels nearly is, and it is there that language models have keys tens of times larger than what
tells them apart. kernels/int8_to_rotary.py takes it off. Letters: R rows, L tokens, K key heads of 128, D inputs.
"""

import torch
from torch import Tensor

from ._op import Case, Cost, Operator, launch, tl, triton
from ._product import check_product, dequantised, halves, whole_sums
from .int8_linear import int8_linear_ref, int8_linear_torch
from .int8_to_rotary import WIDTH
from .keys_off import check_sampled, sample, sampled_operands
from .quantise_qkv import SAMPLE
from .rope import rope

PAIRS = 16  # of a head's columns i and i + 64, a program's


def rotary_keys_off_ref(x, x_scale, weight, weight_scale, bias, cos, sin) -> Tensor:
    """On the dequantised operands in float64."""
    y = int8_linear_ref(sample(x), sample(x_scale), weight, weight_scale, bias, "none", None, None)
    return _mean(y, sample(cos).double(), sample(sin).double())


def rotary_keys_off_torch(x, x_scale, weight, weight_scale, bias, cos, sin) -> Tensor:
    given = sample(x), sample(x_scale), weight, weight_scale, bias
    return _mean(int8_linear_torch(*given, "none", None, None, torch.float32), sample(cos).float(), sample(sin).float())


def _mean(y: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Over rows of y (R, SAMPLE, K 128), rotated: (R, K, 128)."""
    cos, sin = (torch.cat([x, x], dim=-1)[:, :, None] for x in (cos, sin))
    return rope(y.unflatten(-1, (-1, WIDTH)), cos, sin).mean(1)


@triton.jit(do_not_specialize=["length"])
def _rotary_keys_kernel(
    x_ptr,  # (R, L, D) int8 contiguous
    x_scale_ptr,  # (R, L)
    weight_ptr,  # (N, D) int8 contiguous
    scale_ptr,  # (N) float32, bias alike
    bias_ptr,
    cos_ptr,  # (R, L, WIDTH / 2) contiguous, sin alike
    sin_ptr,
    y_ptr,  # (R, N) float32
    length,
    N: tl.constexpr,
    K: tl.constexpr,  # D
    WIDTH: tl.constexpr,
    SAMPLE: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BIAS: tl.constexpr,
):
    HALF: tl.constexpr = WIDTH // 2
    whose = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) % (HALF // PAIRS) * PAIRS + tl.arange(0, PAIRS)  # within the head
    left = tl.program_id(0) // (HALF // PAIRS) * WIDTH
    which = whose * length + tl.arange(0, SAMPLE).to(tl.int64) * length // SAMPLE
    at = tl.arange(0, 2 * PAIRS)
    column = left + tl.program_id(0) % (HALF // PAIRS) * PAIRS + at % PAIRS + at // PAIRS * HALF
    sums = whole_sums(
        x_ptr, weight_ptr, which, column, whose * length + length, K, K, SAMPLE, 2 * PAIRS, BLOCK_K
    )  # fmt: skip
    a, b = halves(sums)
    x_scale = tl.load(x_scale_ptr + which)
    a = dequantised(a, x_scale, left + i, N, scale_ptr, bias_ptr, BIAS)
    b = dequantised(b, x_scale, left + HALF + i, N, scale_ptr, bias_ptr, BIAS)
    angle = which[:, None] * HALF + i[None, :]
    cos, sin = tl.load(cos_ptr + angle).to(tl.float32), tl.load(sin_ptr + angle).to(tl.float32)
    to = y_ptr + whose * N + left + i
    tl.store(to, tl.sum(a * cos - b * sin, axis=0) / SAMPLE)
    tl.store(to + HALF, tl.sum(b * cos + a * sin, axis=0) / SAMPLE)


def _rotary_keys_off_triton(x, x_scale, weight, weight_scale, bias, cos, sin) -> Tensor:
    (rows, length, k), n = x.shape, len(weight)
    y = torch.empty((rows, n // WIDTH, WIDTH), dtype=torch.float32, device=x.device)
    launch(
        _rotary_keys_kernel,
        (n // (2 * PAIRS), rows),
        *(x.contiguous(), x_scale.contiguous(), weight, weight_scale, weight_scale if bias is None else bias),
        *(cos.contiguous(), sin.contiguous(), y, length),
        N=n,
        K=k,
        WIDTH=WIDTH,
        SAMPLE=SAMPLE,
        PAIRS=PAIRS,
        BLOCK_K=128,
        BIAS=bias is not None,
        num_warps=4,  # heuristic
        num_stages=3,
    )
    return y


def rotary_keys_off_cost(x, x_scale, weight, weight_scale, bias, cos, sin) -> Cost:
    (rows, _, k), n = x.shape, len(weight)
    angles = 2 * cos.shape[-1] * cos.element_size()
    read = rows * SAMPLE * (k + 4 + angles) + n * (k + 4) + (0 if bias is None else n * bias.element_size())
    return Cost(2 * rows * SAMPLE * n * k, read + 4 * rows * n)


_rotary_keys_off = Operator(
    "rotary_keys_off(Tensor x, Tensor x_scale, Tensor weight, Tensor weight_scale, Tensor? bias, Tensor cos, "
    "Tensor sin) -> Tensor",
    torch=rotary_keys_off_torch,
    triton=_rotary_keys_off_triton,
    cost=rotary_keys_off_cost,
)


def rotary_keys_off(
    x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, cos: Tensor, sin: Tensor
) -> Tensor:
    """(R, K, 128) float32. x (R, L, D) int8 with at least one token, weight (K * 128, D) the keys' alone, cos and sin
    (R, L, 64), the rest as for int8_linear.
    """
    check_product(x, weight, weight_scale, bias, "none", None, None)
    check_sampled(x, x_scale)
    if len(weight) % WIDTH:
        raise ValueError(f"{len(weight)} outputs are not whole heads of {WIDTH}")
    if not cos.shape == sin.shape == (*x.shape[:2], WIDTH // 2):
        raise ValueError(f"cos {tuple(cos.shape)} and sin {tuple(sin.shape)} are not (R, L, {WIDTH // 2})")
    return _rotary_keys_off(x, x_scale, weight, weight_scale, bias, cos, sin)


def rotary_keys_off_cases() -> list[Case]:
    def make(rows: int, length: int, k: int, kv_heads: int, dtype: torch.dtype = torch.bfloat16, bias: bool = True):
        def arguments(device):
            angle = torch.rand(rows, length, WIDTH // 2, generator=torch.Generator().manual_seed(2)).to(device)
            operands = sampled_operands(device, rows, length, k, kv_heads * WIDTH, dtype=dtype, bias=bias)
            return *operands, angle.cos().to(dtype), angle.sin().to(dtype)

        return arguments

    return [
        Case("LLM at 1024, both guidance halves", make(2, 4160, 1536, 2), "aot gpu"),
        Case("two rows, two heads", make(2, 70, 144, 2)),
        Case("one token, no bias, float32", make(1, 1, 64, 1, bias=False, dtype=torch.float32)),
    ]
