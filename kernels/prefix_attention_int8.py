"""Causal attention behind cached prompts with its scores in whole numbers, and whole numbers for the product behind it.

    q, k      int8 with a scale a row, mixed by R, of keys `off` taken off: what kernels/int8_to_rotary.py leaves
    v         float16
    prefix    as in kernels/prefix_attention.py, in the model's dtype and not mixed
    result    int8 and a scale for each head of a row, float32: the groups that kernels/int8_of_groups.py reads

Softmax does not see what all keys share, so `off` is taken off the prefix as well. Its keys are neither mixed nor
quantised: every program mixes its queries back once, and scores with them are products of float16. A prompt is short,
but a picture to edit has about 1100 keys, and the cost counts them as if they were int8.
The rest as in kernels/attention_int8.py: within 2e-2 of float64, relative. Called for the language model of an 8-bit
UniPic. Letters as in kernels/prefix_attention.py.
"""

import torch
from torch import Tensor

from ._attend import LOG2_E, add_halves, attend_int8, empty_state, load_rows
from ._device import to_half, walsh_hadamard_rows
from ._op import Case, Cost, Operator, cdiv, launch, tl, triton, unit_rows
from ._product import store_whole
from ._tuned import tuned
from .int8_to_rotary import WIDTH
from .prefix_attention import prefix_attention_ref, prefix_attention_torch, random_behind_prompts
from .quantise import quantise_rows, turned

HALF = WIDTH // 2
FEW = 16  # keys of a prompt at once: with more, registers do not suffice on sm_120


def prefix_attention_int8_ref(
    numbers, scale, v, off, prefix_k, prefix_v, prefix_of, lengths, dtype=torch.float64
) -> Tensor:
    """What the results stand for, on the dequantised operands in float64."""
    q, k = _queries_and_keys(numbers.double() * scale.double()[..., None], off.double())
    prefix = prefix_k.double(), prefix_v.double(), prefix_of, lengths
    return prefix_attention_ref(q, k, v.double(), *prefix).transpose(1, 2)


def prefix_attention_int8_torch(
    numbers, scale, v, off, prefix_k, prefix_v, prefix_of, lengths
) -> tuple[Tensor, Tensor]:
    """On the dequantised operands in the dtype of the prefixes; on CUDA it waits for the device."""
    q, k = (x.to(prefix_k.dtype) for x in _queries_and_keys(numbers * scale[..., None], off))
    y = prefix_attention_torch(q, k, v.to(prefix_k.dtype), prefix_k, prefix_v, prefix_of, lengths)
    return quantise_rows(y.transpose(1, 2))


def _queries_and_keys(mixed: Tensor, off: Tensor) -> tuple[Tensor, Tensor]:
    """q (R, H, L, 128) and k (R, K, L, 128) as they were; the matrix is its own inverse."""
    heads = mixed.shape[1] - off.shape[1]
    q, k = turned(mixed, WIDTH).tensor_split([heads], dim=1)
    return q, k + off[:, :, None]


@triton.jit(do_not_specialize=["length"])
def _prefix_attention_int8_kernel(
    numbers_ptr,  # (R, H + K, L, D) int8 contiguous
    scale_ptr,  # (R, H + K, L) float32
    v_ptr,  # (R, K, L, D) float16 contiguous
    off_ptr,  # (R, K, D) float32
    prefix_k_ptr,  # (P, K, capacity, D), last dimension contiguous
    prefix_v_ptr,
    prefix_of_ptr,  # (R) int32
    lengths_ptr,  # (P) int32
    y_ptr,  # (R, L, H, D) int8 contiguous
    y_scale_ptr,  # (R, L, H) float32
    pk_batch,  # strides
    pk_head,
    pk_row,
    pv_batch,
    pv_head,
    pv_row,
    length,
    score_scale,  # log2(e) / sqrt(d)
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    HALF: tl.constexpr,
    FEW: tl.constexpr,  # keys of a prompt at once
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SHIFT: tl.constexpr,
):
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M  # the longest first
    row = (tl.program_id(1) // HEADS).to(tl.int64)
    head = tl.program_id(1) % HEADS
    kv_head = head // (HEADS // KV_HEADS)
    prompt = tl.load(prefix_of_ptr + row).to(tl.int64)
    before = tl.load(lengths_ptr + prompt)
    at = (row * (HEADS + KV_HEADS) + head) * length + first
    q0 = load_rows(numbers_ptr + at * D, D, length - first, BLOCK_M, 0, HALF, D, True)
    q1 = load_rows(numbers_ptr + at * D, D, length - first, BLOCK_M, HALF, HALF, D, True)
    query = tl.arange(0, BLOCK_M)
    q_scale = tl.load(scale_ptr + at + query, mask=query < length - first, other=1.0) * score_scale
    query += first

    state = empty_state(BLOCK_M, HALF, HALF)
    prefix_k_ptr += prompt * pk_batch + kv_head * pk_head
    prefix_v_ptr += prompt * pv_batch + kv_head * pv_head
    off_ptr += (row * KV_HEADS + kv_head) * D
    state = _attend_prefix(state, q0, q1, q_scale, off_ptr, prefix_k_ptr, prefix_v_ptr, pk_row, pv_row, before,
                           D, HALF, FEW, SHIFT)  # fmt: skip

    keys = (row * (HEADS + KV_HEADS) + HEADS + kv_head) * length
    v_ptr += (row * KV_HEADS + kv_head) * length * D
    whole, end = first // BLOCK_N * BLOCK_N, tl.minimum(first + BLOCK_M, length)
    k_ptr, k_scale_ptr = numbers_ptr + keys * D, scale_ptr + keys
    state = attend_int8(state, q0, q1, q_scale, k_ptr, k_scale_ptr, v_ptr, first * 0, whole, query,
                        D, HALF, HALF, HALF, HALF, BLOCK_N, SHIFT, False)  # fmt: skip
    state = attend_int8(state, q0, q1, q_scale, k_ptr, k_scale_ptr, v_ptr, whole, end, query,
                        D, HALF, HALF, HALF, HALF, BLOCK_N, SHIFT, True)  # fmt: skip
    share = (1 / state[3])[:, None]
    to = (row * length + query) * HEADS + head
    store_whole(state[0] * share, state[1] * share, y_ptr + to * D, y_scale_ptr + to, query < length, 1.0)


@triton.jit
def _attend_prefix(
    state,
    q0,
    q1,
    q_scale,
    off_ptr,
    k_ptr,
    v_ptr,
    k_stride,
    v_stride,
    count,
    D: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SHIFT: tl.constexpr,
):
    """Over `count` keys that are neither whole nor mixed nor have anything taken off."""
    low, high = q0.to(tl.float32), q1.to(tl.float32)
    UNIT: tl.constexpr = D**-0.5
    f0 = (walsh_hadamard_rows(low + high, HALF) * UNIT).to(tl.float16)
    f1 = (walsh_hadamard_rows(low - high, HALF) * UNIT).to(tl.float16)
    i, key = tl.arange(0, HALF), tl.arange(0, BLOCK_N)
    off0, off1 = tl.load(off_ptr + i)[None, :], tl.load(off_ptr + HALF + i)[None, :]
    for start in tl.range(0, count, BLOCK_N):
        left = count - start
        k0 = load_rows(k_ptr, k_stride, left, BLOCK_N, 0, HALF, D, True).to(tl.float32) - off0
        k1 = load_rows(k_ptr, k_stride, left, BLOCK_N, HALF, HALF, D, True).to(tl.float32) - off1
        scores = tl.dot(f0, tl.trans(k0.to(tl.float16)))
        scores = tl.dot(f1, tl.trans(k1.to(tl.float16)), scores)
        scores = tl.where((key < left)[None, :], scores, float("-inf"))
        v0 = to_half(load_rows(v_ptr, v_stride, left, BLOCK_N, 0, HALF, D, True).to(tl.float32))
        v1 = to_half(load_rows(v_ptr, v_stride, left, BLOCK_N, HALF, HALF, D, True).to(tl.float32))
        state = add_halves(state, scores, q_scale, v0, v1, SHIFT, True)
        k_ptr += BLOCK_N * k_stride
        v_ptr += BLOCK_N * v_stride
    return state


def _prefix_attention_int8_triton(numbers, scale, v, off, prefix_k, prefix_v, prefix_of, lengths):
    rows, kv_heads, length, width = v.shape
    heads = numbers.shape[1] - kv_heads
    prefix_k, prefix_v = unit_rows(prefix_k), unit_rows(prefix_v)
    y = torch.empty((rows, length, heads, width), dtype=torch.int8, device=v.device)
    y_scale = torch.empty(y.shape[:-1], dtype=torch.float32, device=v.device)
    heuristic = {"BLOCK_M": 64, "BLOCK_N": 32, "num_warps": 4, "num_stages": 3}
    step = 3 * width  # bytes of a key and a value
    tile = tuned("prefix_attention_int8", f"d{width}", heuristic, v.device, lambda tile: tile["BLOCK_N"] * step)
    launch(
        _prefix_attention_int8_kernel,
        (cdiv(length, tile["BLOCK_M"]), rows * heads),
        *(numbers.contiguous(), scale.contiguous(), v.contiguous(), off.contiguous()),
        *(prefix_k, prefix_v, prefix_of, lengths, y, y_scale),
        *(stride for x in (prefix_k, prefix_v) for stride in x.stride()[:3]),
        *(length, LOG2_E / width**0.5),
        HEADS=heads,
        KV_HEADS=kv_heads,
        D=width,
        HALF=HALF,
        FEW=FEW,
        SHIFT=tile["BLOCK_N"].bit_length() - 1,
        **tile,
    )
    return y, y_scale


def prefix_attention_int8_cost(numbers, scale, v, off, prefix_k, prefix_v, prefix_of, lengths) -> Cost:
    """By shapes: each row's prefix counts as long as the capacity, each prompt is read once."""
    rows, kv_heads, length, width = v.shape
    queries = rows * (numbers.shape[1] - kv_heads) * length
    flop = 4 * width * queries * prefix_k.shape[2] + 2 * width * queries * (length + 1)
    read = sum(x.nbytes for x in (numbers, scale, v, off, prefix_k, prefix_v))
    return Cost(flop, read + queries * (width + 4))


operator = Operator(
    "prefix_attention_int8(Tensor numbers, Tensor scale, Tensor v, Tensor off, Tensor prefix_k, Tensor prefix_v, "
    "Tensor prefix_of, Tensor lengths) -> (Tensor, Tensor)",
    torch=prefix_attention_int8_torch,
    triton=_prefix_attention_int8_triton,
    cost=prefix_attention_int8_cost,
)


def prefix_attention_int8(
    numbers: Tensor,
    scale: Tensor,
    v: Tensor,
    off: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    prefix_of: Tensor,
    lengths: Tensor,
) -> tuple[Tensor, Tensor]:
    """int8 (R, L, H, 128) and scales (R, L, H) of attention's result.

    numbers (R, H + K, L, 128), scale (R, H + K, L) and v (R, K, L, 128) as `int8_linear_to_rotary` leaves them, off
    (R, K, 128) float32; the rest as for `prefix_attention`.
    """
    return operator(numbers, scale, v, off, prefix_k, prefix_v, prefix_of, lengths)


def prefix_attention_int8_cases() -> list[Case]:
    def case(why: str, shape: tuple[int, ...], *how, marks: str = "interp aot gpu") -> Case:
        def make(device: torch.device | str) -> tuple[Tensor, ...]:
            q, k, v, prefix_k, *rest = random_behind_prompts(device, (*shape, WIDTH), *how)
            shared = 5 * torch.randn(WIDTH, generator=torch.Generator().manual_seed(2)).to(device)  # by all keys
            mixed = turned(torch.cat([q.float(), k.float()], dim=1), WIDTH)
            off = shared.expand(*k.shape[:2], -1).contiguous()
            numbers = (x.contiguous() for x in quantise_rows(mixed))
            return *numbers, v.half().contiguous(), off, prefix_k + shared.to(prefix_k.dtype), *rest

        return Case(why, make, marks)

    real = "aot gpu"
    return [
        case("LLM block at 1024 behind two prompts", (2, 12, 2, 4160), 64, [60, 7], [0, 1], marks=real),
        case("edit at 1024, a picture in the prompt", (2, 12, 2, 4160), 1152, [1130, 1090], [0, 1], marks=real),
        case("grouped, prompts of different lengths", (2, 4, 2, 67), 40, [33, 5], [1, 0]),
        case("one prompt is empty, float32", (2, 2, 1, 9), 3, [0, 3], [0, 1], torch.float32),
        case("one query a row, whole blocks of a prompt", (2, 3, 1, 1), 70, [64, 70], [0, 1]),
        case("no rows", (0, 2, 2, 5), 3, [3], []),
    ]
