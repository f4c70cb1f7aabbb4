"""One vector near the mean of a head's normalised keys, before a product in 8 bits makes any of them.

    off = mean over a sample of rows of norm(x_scale (q_x q_W^T) w_scale + bias) weight

As kernels/keys_off.py, for keys with a norm, by which a bias is no longer the same for all of them. Of two streams the
image's keys are most, and any vector is exact: text's are no part of the sample. kernels/int8_to_joint.py takes it off
the keys of both. Letters: B pictures, L tokens, H heads of 64, K inputs.
"""

import torch
from torch import Tensor

from ._op import Case, Cost, Operator, launch, tl, triton
from ._product import check_product, dequantised, whole_sums
from .int8_linear import int8_linear_ref, int8_linear_torch
from .int8_to_joint import WIDTH, normed
from .keys_off import check_sampled, sample, sampled_operands
from .quantise_qkv import SAMPLE


def joint_keys_off_ref(x, x_scale, weight, weight_scale, bias, norm, eps) -> Tensor:
    """On the dequantised operands in float64."""
    return _mean(int8_linear_ref(sample(x), sample(x_scale), weight, weight_scale, bias, "none", None, None), norm, eps)


def joint_keys_off_torch(x, x_scale, weight, weight_scale, bias, norm, eps) -> Tensor:
    given = sample(x), sample(x_scale), weight, weight_scale, bias
    return _mean(int8_linear_torch(*given, "none", None, None, torch.float32), norm, eps)


def _mean(y: Tensor, norm: Tensor, eps: float) -> Tensor:
    """Over rows of y (B, SAMPLE, H 64), normalised: (B, H, 64)."""
    return normed(y.unflatten(-1, (-1, WIDTH)), norm, eps).mean(1)


@triton.jit(do_not_specialize=["length"])
def _joint_keys_kernel(
    x_ptr,  # (B, L, K) int8 contiguous
    x_scale_ptr,  # (B, L)
    weight_ptr,  # (N, K) int8 contiguous
    scale_ptr,  # (N) float32, bias alike
    bias_ptr,
    norm_ptr,  # (D)
    y_ptr,  # (B, N) float32
    length,
    eps,
    N: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    SAMPLE: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BIAS: tl.constexpr,
):
    picture = tl.program_id(1).to(tl.int64)
    i = tl.arange(0, D)
    column = tl.program_id(0) * D + i
    which = picture * length + tl.arange(0, SAMPLE).to(tl.int64) * length // SAMPLE
    sums = whole_sums(x_ptr, weight_ptr, which, column, picture * length + length, K, K, SAMPLE, D, BLOCK_K)
    y = dequantised(sums, tl.load(x_scale_ptr + which), column, N, scale_ptr, bias_ptr, BIAS)
    y *= tl.rsqrt(tl.sum(y * y, axis=1) / D + eps)[:, None]
    tl.store(y_ptr + picture * N + column, tl.sum(y, axis=0) / SAMPLE * tl.load(norm_ptr + i).to(tl.float32))


def _joint_keys_off_triton(x, x_scale, weight, weight_scale, bias, norm, eps) -> Tensor:
    (pictures, length, k), n = x.shape, len(weight)
    y = torch.empty((pictures, n // WIDTH, WIDTH), dtype=torch.float32, device=x.device)
    launch(
        _joint_keys_kernel,
        (n // WIDTH, pictures),
        *(x.contiguous(), x_scale.contiguous(), weight, weight_scale, weight_scale if bias is None else bias),
        *(norm, y, length, eps),
        N=n,
        K=k,
        D=WIDTH,
        SAMPLE=SAMPLE,
        BLOCK_K=128,
        BIAS=bias is not None,
        num_warps=8,  # heuristic
        num_stages=3,
    )
    return y


def joint_keys_off_cost(x, x_scale, weight, weight_scale, bias, norm, eps) -> Cost:
    (pictures, _, k), n = x.shape, len(weight)
    read = pictures * SAMPLE * (k + 4) + n * (k + 4) + (0 if bias is None else n * bias.element_size())
    return Cost(2 * pictures * SAMPLE * n * k, read + 4 * pictures * n)


_joint_keys_off = Operator(
    "joint_keys_off(Tensor x, Tensor x_scale, Tensor weight, Tensor weight_scale, Tensor? bias, Tensor norm, "
    "float eps) -> Tensor",
    torch=joint_keys_off_torch,
    triton=_joint_keys_off_triton,
    cost=joint_keys_off_cost,
)


def joint_keys_off(
    x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, norm: Tensor, eps: float
) -> Tensor:
    """(B, H, 64) float32. x (B, L, K) int8 with at least one token, weight (H 64, K) the keys' alone, norm (64), the
    rest as for int8_linear.
    """
    check_product(x, weight, weight_scale, bias, "none", None, None)
    check_sampled(x, x_scale)
    if len(weight) % WIDTH:
        raise ValueError(f"{len(weight)} outputs are not whole heads of {WIDTH}")
    if norm.shape != (WIDTH,):
        raise ValueError(f"norm is {tuple(norm.shape)}, not ({WIDTH},)")
    return _joint_keys_off(x, x_scale, weight, weight_scale, bias, norm, eps)


def joint_keys_off_cases() -> list[Case]:
    def make(pictures: int, length: int, k: int, heads: int, dtype: torch.dtype = torch.bfloat16, bias: bool = True):
        def arguments(device):
            norm = torch.randn(WIDTH, generator=torch.Generator().manual_seed(2)).to(device, dtype)
            operands = sampled_operands(device, pictures, length, k, heads * WIDTH, dtype=dtype, bias=bias)
            return *operands, norm, 1e-6

        return arguments

    return [
        Case("DiT at 1024, both guidance halves", make(2, 4096, 1536, 24), "aot gpu"),
        Case("two pictures, three heads", make(2, 70, 144, 3)),
        Case("one token, no bias, float32", make(1, 1, 64, 1, bias=False, dtype=torch.float32)),
    ]
