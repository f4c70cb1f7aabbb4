"""Matrix products of whole numbers of two streams that leave joint attention's operands for kernels/attention_int8.py.

    y = x_scale (q_x q_W^T) w_scale + bias,   N = 3 H 64 columns: heads of queries, keys, values; W of each stream
    queries    norm(y) weight            keys    norm(y) weight - off            values    y

    norm    y / sqrt(mean y^2 + eps) of a head, weights of queries and of keys for each stream (kernels/joint_qkv.py)
    off     one vector for all keys of a head, near their mean (kernels/joint_keys.py): softmax does not see it

Queries and keys become int8 with a scale a row of a head, float32; values float16. Of token t they are image's where
t < n, else text's of t - n. One launch for both streams; a tile is of one of them, and of four heads.
Called for the DiT in 8 bits (engine/layers/joint_attention.py). Letters: B pictures, n, m tokens of the streams, L of
both, K inputs, H heads.
"""

from typing import Any

import torch
from torch import Tensor

from ._device import rounded_to_int8, row_scale, to_half
from ._op import Case, Cost, Operator, cdiv, launch, tl, triton
from ._product import (
    GROUP_M,
    INSTRUCTION,
    check_product,
    dequantised,
    halves,
    place,
    product_cost,
    product_operands,
    product_options,
    whole_sums,
)
from .int8_linear import int8_linear_ref, int8_linear_torch
from .norms import norm_ref
from .quantise import quantise_rows
from .quantise_qkv import to_float16

WIDTH = 64  # of a head
WRITTEN = 20  # instructions that a value takes beyond those of kernels/int8_linear.py, at most, as compiled for sm_89

# Rows, columns, and K of one of a step's two products; warps, stages.
TILES = ((64, 256, 64, 4, 3), (32, 256, 64, 8, 3), (16, 256, 64, 4, 3))

Stream = tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor, Tensor]
_STREAM = "x", "x_scale", "weight", "weight_scale", "bias", "q_norm", "k_norm"


def int8_linear_to_joint_ref(*arguments) -> tuple[Tensor, Tensor]:
    """What the results stand for, on the dequantised operands in float64."""
    return _joined(lambda *given: int8_linear_ref(*given, "none", None, None), *arguments)


def int8_linear_to_joint_torch(*arguments) -> tuple[Tensor, Tensor, Tensor]:
    numbers, values = _joined(lambda *given: int8_linear_torch(*given, "none", None, None, torch.float32), *arguments)
    whole = (part.contiguous() for part in quantise_rows(numbers))
    return *whole, to_float16(values).contiguous()


def _joined(product, *arguments) -> tuple[Tensor, Tensor]:
    """Queries and keys (2, B, H, L, 64), values (B, H, L, 64)."""
    *streams, off, heads, eps = arguments
    parts = []
    for stream in (streams[:7], streams[7:]):
        if stream[0] is not None:
            *given, q_norm, k_norm = stream
            q, k, v = product(*given).unflatten(-1, (3, heads, WIDTH)).permute(2, 0, 3, 1, 4)
            q, k = normed(q, q_norm, eps), normed(k, k_norm, eps) - off[:, :, None]
            parts.append(torch.stack([q, k, v]))
    joint = torch.cat(parts, dim=3)
    return joint[:2], joint[2]


def normed(y: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Of heads y (..., 64), in float32 or wider."""
    return norm_ref(y, weight, None, None, None, eps, True)


@triton.jit(do_not_specialize=["n", "m", "image_tiles", "tiles"])  # they change from prompt to prompt
def _to_joint_kernel(
    x_ptr,  # (B, n, K) int8 contiguous
    x_scale_ptr,  # (B, n) float32
    weight_ptr,  # (N, K) int8 contiguous
    scale_ptr,  # (N) float32
    bias_ptr,  # (N)
    q_norm_ptr,  # (D)
    k_norm_ptr,
    text_ptr,  # the same of the text, m tokens
    text_scale_ptr,
    text_weight_ptr,
    text_weight_scale_ptr,
    text_bias_ptr,
    text_q_norm_ptr,
    text_k_norm_ptr,
    off_ptr,  # (B, H, D) float32
    y_ptr,  # (2, B, H, n + m, D) int8
    y_scale_ptr,  # (2, B, H, n + m) float32
    values_ptr,  # (B, H, n + m, D) float16
    n,
    m,
    image_tiles,  # of a picture's rows
    tiles,  # with those of the text
    eps,
    N: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,  # 4 D
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    BIAS: tl.constexpr,
):
    picture = tl.program_id(1).to(tl.int64)
    one, column = place(tiles, tl.cdiv(N, BLOCK_N), 1, GROUP_M)  # tiles in place of rows
    tile, length, begin = tl.sum(one, axis=0), n, n * 0
    if tile >= image_tiles:
        tile, length, begin = tile - image_tiles, m, n
        x_ptr, x_scale_ptr, weight_ptr, scale_ptr = text_ptr, text_scale_ptr, text_weight_ptr, text_weight_scale_ptr
        bias_ptr, q_norm_ptr, k_norm_ptr = text_bias_ptr, text_q_norm_ptr, text_k_norm_ptr
    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    weight_row = tl.minimum(column * BLOCK_N + tl.arange(0, BLOCK_N), N - 1)
    x_ptr += picture * length * K
    sums = whole_sums(x_ptr, weight_ptr, row, weight_row, length, K, K, BLOCK_M, BLOCK_N, BLOCK_K)
    x_scale = tl.load(x_scale_ptr + picture * length + row, mask=row < length, other=0.0)
    left, right = halves(sums)
    a, b = halves(left)
    c, d = halves(right)
    quarters = (a, b, c, d)
    for quarter in tl.static_range(4):
        slot = 4 * column + quarter  # of the heads of queries, keys and values
        _head(quarters[quarter], x_scale, row, slot, picture, length, begin, n + m, scale_ptr, bias_ptr, q_norm_ptr,
              k_norm_ptr, off_ptr, y_ptr, y_scale_ptr, values_ptr, eps, N, D, HEADS, BIAS)  # fmt: skip


@triton.jit
def _head(
    sums,  # (rows, D)
    x_scale,
    row,
    slot,
    picture,
    length,
    begin,  # of the stream among all tokens
    total,
    scale_ptr,
    bias_ptr,
    q_norm_ptr,
    k_norm_ptr,
    off_ptr,
    y_ptr,
    y_scale_ptr,
    values_ptr,
    eps,
    N: tl.constexpr,
    D: tl.constexpr,
    HEADS: tl.constexpr,
    BIAS: tl.constexpr,
):
    i, part, head = tl.arange(0, D), slot // HEADS, picture * HEADS + slot % HEADS
    y = dequantised(sums, x_scale, slot * D + i, N, scale_ptr, bias_ptr, BIAS)
    to = head * total + begin + row
    if part < 2:
        inside = row < length
        y *= tl.rsqrt(tl.sum(y * y, axis=1) / D + eps)[:, None]
        norm_ptr = q_norm_ptr
        if part == 1:
            norm_ptr = k_norm_ptr
        weight = tl.load(norm_ptr + i).to(tl.float32)
        y = y * weight[None, :] - tl.load(off_ptr + head * D + i, mask=(i < D) & (part == 1), other=0.0)[None, :]
        to += part * tl.num_programs(1).to(tl.int64) * HEADS * total
        scale = row_scale(tl.max(tl.abs(y), axis=1))
        tl.store(y_scale_ptr + to, scale, mask=inside)
        at = y_ptr + to[:, None] * D + i[None, :]
        tl.store(at, rounded_to_int8(y * (1.0 / scale)[:, None]), mask=inside[:, None])
    else:
        inside = row < tl.where(part == 2, length, 0)
        tl.store(values_ptr + to[:, None] * D + i[None, :], to_half(y), mask=inside[:, None])


def _int8_linear_to_joint_triton(*arguments) -> tuple[Tensor, Tensor, Tensor]:
    *streams, off, heads, eps = arguments
    image, text = _dense(streams[:7]), streams[7:]
    x, _, weight, *_ = image
    (pictures, n, k), m = x.shape, 0 if text[0] is None else text[0].shape[1]
    numbers = torch.empty((2, pictures, heads, n + m, WIDTH), dtype=torch.int8, device=x.device)
    scale = torch.empty(numbers.shape[:-1], dtype=torch.float32, device=x.device)
    values = torch.empty(numbers.shape[1:], dtype=torch.float16, device=x.device)
    shape = pictures * (n + m), len(weight), k
    options = product_options("int8_to_joint", "", TILES, shape, x.device, fixed=("BLOCK_N",))
    image_tiles, text_tiles = (cdiv(length, options["BLOCK_M"]) for length in (n, m))
    launch(
        _to_joint_kernel,
        ((image_tiles + text_tiles) * cdiv(len(weight), options["BLOCK_N"]), pictures),
        *(*image, *(image if text[0] is None else _dense(text)), off.contiguous(), numbers, scale, values),
        *(n, m, image_tiles, image_tiles + text_tiles, eps),
        N=len(weight),
        K=k,
        D=WIDTH,
        HEADS=heads,
        GROUP_M=GROUP_M,
        BIAS=streams[4] is not None,
        **options,
    )
    return numbers, scale, values


def _dense(stream) -> tuple[Tensor, ...]:
    x, x_scale, weight, weight_scale, bias, q_norm, k_norm = stream
    bias = weight_scale if bias is None else bias
    return x.contiguous(), x_scale.contiguous(), weight, weight_scale, bias, q_norm, k_norm


def int8_linear_to_joint_cost(*arguments) -> Cost:
    """Instructions that a product alone would not have are `beside`."""
    *streams, off, heads, _ = arguments
    flop, beside, nbytes = 0, 0, off.nbytes
    for stream in (streams[:7], streams[7:]):
        if stream[0] is not None:
            rows, weight = stream[1].numel(), stream[2]
            base = product_cost(stream, weight, "none", torch.int8)
            flop, beside = flop + base.flop, beside + WRITTEN * INSTRUCTION * rows * len(weight)
            nbytes += base.nbytes + rows * heads * (WIDTH + 2 * 4)  # values have two bytes, queries and keys scales
    return Cost(flop, nbytes, beside=beside)


def _schema(prefix: str, kind: str) -> str:
    return ", ".join(f"Tensor{'?' if name == 'bias' else kind} {prefix}{name}" for name in _STREAM)


_int8_linear_to_joint = Operator(
    f"int8_linear_to_joint({_schema('', '')}, {_schema('text_', '?')}, Tensor off, int heads, float eps) "
    "-> (Tensor, Tensor, Tensor)",
    torch=int8_linear_to_joint_torch,
    triton=_int8_linear_to_joint_triton,
    cost=int8_linear_to_joint_cost,
)


def int8_linear_to_joint(
    image: Stream, text: Stream | None, off: Tensor, heads: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys int8 (2, B, H, L, 64) with scales (2, B, H, L), values float16 (B, H, L, 64).

    A stream: x (B, n or m, K) int8, its scales (B, n or m), weight (3 H 64, K) int8, its scales, bias or None in both,
    norm weights (64) of queries and of keys. off (B, H, 64) float32.
    """
    for x, x_scale, weight, weight_scale, bias, *norms in (image, *([] if text is None else [text])):
        check_product(x, weight, weight_scale, bias, "none", None, None)
        if x.dim() != 3 or x_scale.shape != x.shape[:-1] or len(weight) != 3 * heads * WIDTH:
            raise ValueError(
                f"x {tuple(x.shape)}, x_scale {tuple(x_scale.shape)} and {len(weight)} outputs are not (B, L, K), "
                f"(B, L) and 3 parts of {heads} heads of {WIDTH} columns"
            )
        if any(norm.shape != (WIDTH,) for norm in norms) or off.shape != (len(x), heads, WIDTH):
            raise ValueError(
                f"norms {[tuple(norm.shape) for norm in norms]} and off {tuple(off.shape)} are not ({WIDTH},) each and "
                f"({len(x)}, {heads}, {WIDTH})"
            )
    if text is not None and (text[2].shape != image[2].shape or (text[4] is None) != (image[4] is None)):
        raise ValueError(
            f"weights {tuple(image[2].shape)} and {tuple(text[2].shape)}: both streams' are alike, biased too"
        )
    return _int8_linear_to_joint(*image, *(text or (None,) * len(_STREAM)), off, heads, eps)


def random_stream(
    device: torch.device | str, pictures: int, length: int, k: int, heads: int, seed: int = 0, **how: Any
) -> tuple[Tensor | None, ...]:
    """Of a case."""
    noise = torch.Generator().manual_seed(seed)
    x = torch.randint(-127, 128, (pictures, length, k), dtype=torch.int8, generator=noise).to(device)
    x_scale = torch.rand(pictures, length, generator=noise).to(device) / 64
    weight, scale, bias, *_, dtype = product_operands(device, pictures * length, k, 3 * heads * WIDTH, **how)
    norms = (torch.randn(WIDTH, generator=noise).to(device, dtype) for _ in range(2))
    return x, x_scale, weight, scale, bias, *norms


def int8_linear_to_joint_cases() -> list[Case]:
    def make(pictures: int, n: int, m: int | None, k: int, heads: int, **how: Any):
        def arguments(device):
            image = random_stream(device, pictures, n, k, heads, **how)
            text = (None,) * len(image) if m is None else random_stream(device, pictures, m, k, heads, 1, **how)
            off = torch.randn(pictures, heads, WIDTH, generator=torch.Generator().manual_seed(2)).to(device)
            return *image, *text, off, heads, 1e-6

        return arguments

    return [
        Case("DiT at 1024, both guidance halves", make(2, 4096, 154, 1536, 24), "aot gpu"),
        Case("the image alone", make(2, 4096, None, 1536, 24), "aot gpu"),
        Case("DiT at 256, few tokens", make(1, 256, 77, 1536, 24), "aot gpu"),
        Case("a DiT's first rows", make(1, 32, 16, 1536, 24), "aot gpu"),
        Case("tails of both streams, two heads", make(2, 19, 5, 144, 2)),
        Case("the image alone, no bias, float32", make(1, 17, None, 272, 5, bias=False, dtype=torch.float32)),
        Case("no text tokens", make(1, 3, 0, 64, 4)),
        Case("no pictures", make(0, 3, 2, 64, 4)),
    ]
