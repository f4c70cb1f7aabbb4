"""What a few large channels cost in 8 bits, with and without what is done about them: errors beside float64.

    python bench/outliers.py            prints them
    python bench/outliers.py --update   and keeps them in bench/results/outliers-int8.json

Random operands with planted channels, torch's path on the CPU; the tests hold the kernels to the same in Triton's
interpreter. Errors are relative, the norm of the difference over the norm of the exact result. Some seconds.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from unipic_run.bench.checkout import require_this_checkout
from unipic_run.kernels.attention import attention_ref
from unipic_run.kernels.attention_int8 import attention_int8_ref
from unipic_run.kernels.int8_linear import int8_linear
from unipic_run.kernels.int8_of_groups import int8_linear_of_groups
from unipic_run.kernels.int8_to_groups import int8_linear_to_groups
from unipic_run.kernels.int8_to_joint import int8_linear_to_joint, int8_linear_to_joint_ref, random_stream
from unipic_run.kernels.int8_to_rotary import int8_linear_to_rotary
from unipic_run.kernels.joint_keys import joint_keys_off
from unipic_run.kernels.prefix_attention import prefix_attention_ref
from unipic_run.kernels.prefix_attention_int8 import prefix_attention_int8
from unipic_run.kernels.quantise import quantise_rows, turned
from unipic_run.kernels.rope import rope, rotary_halves, split_heads
from unipic_run.kernels.rotary_keys import rotary_keys_off

KEPT = Path("bench/results/outliers-int8.json")
SLOW, FASTER = (60, 62, 124, 126), (30, 94, 20, 84)  # channels of a head of 128 that all keys share, or that turn
Run = Callable[..., Any]  # calls an operator: its function, then its arguments


def directly(function: Callable[..., Any], *given: Any) -> Any:
    return function(*given)


def main(arguments: list[str] | None = None) -> int:
    root = require_this_checkout(__file__)
    parser = argparse.ArgumentParser(prog="outliers", description="What a few large channels cost in 8 bits.")
    parser.add_argument("--update", action="store_true", help=f"keep them in {KEPT}")
    options = parser.parse_args(arguments)
    rows = measured()
    for row in rows:
        print(f"{row['what']:<64} {row['error']:8.2%}   without {row['without']:.2%}")
    result = {"bench": "outliers", "torch": torch.__version__, "device": "cpu", "rows": rows}
    if options.update:
        (root / KEPT).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result))
    return 0


def measured() -> list[dict[str, Any]]:
    """`error`: as it is done; `without`: with neither the mean taken off nor columns mixed, or a scale a row."""
    cases = {
        "language model's attention, slow channels of keys x30": prefix_attention(SLOW),
        "language model's attention, faster channels of keys x30": prefix_attention(FASTER),
        "joint attention, a bias in two channels of keys": joint_attention(),
        "behind SwiGLU, a scale a group": swiglu_groups(1),
        "behind SwiGLU, a scale a group, four channels x100": swiglu_groups(100),
    }
    return [{"what": what, "error": error, "without": without} for what, (error, without) in cases.items()]


def relative(y: Tensor, exact: Tensor) -> float:
    return ((y.double() - exact).norm() / exact.norm()).item()


def prefix_attention(channels: Sequence[int], run: Run = directly) -> tuple[float, float]:
    """Errors of attention behind a prompt to keys with a bias of 30 in some channels: ours, and of keys as they are."""
    torch.manual_seed(0)
    heads, kv_heads, length, before, k = 2, 1, 96, 40, 160
    whole = _integers(1, before + length, k), _scales(1, before + length)
    weight, bias = quantise_rows(torch.randn((heads + 2 * kv_heads) * 128, k) / 2.7), torch.zeros(4 * 128)
    bias[[heads * 128 + channel for channel in channels]] = 30.0
    frequencies = 1e6 ** -(torch.arange(64) / 64)
    cos, sin = rotary_halves(torch.arange(before + length)[None], frequencies, torch.float32)
    full = [torch.cat([x, x], -1)[:, None].double() for x in (cos, sin)]
    q, k, v = split_heads(int8_linear(*whole, *weight, bias, dtype=torch.float32).double(), heads, kv_heads)
    q, k = rope(q, *full), rope(k, *full)
    behind = k[:, :, :before].float(), v[:, :, :before].float(), *torch.tensor([[0], [before]], dtype=torch.int32)
    q, k, v = (x[:, :, before:] for x in (q, k, v))
    prompt = [x.double() if x.is_floating_point() else x for x in behind]
    exact = prefix_attention_ref(q, k, v, *prompt)

    own = [x[:, before:] for x in (*whole, cos, sin)]
    keys = slice(heads * 128, (heads + kv_heads) * 128)
    off = run(rotary_keys_off, *own[:2], *(x[keys] for x in (*weight, bias)), *own[2:])
    mixed, scale, values = run(int8_linear_to_rotary, *own[:2], *weight, bias, *own[2:], off, heads)
    found, found_scale = run(prefix_attention_int8, mixed, scale, values, off, *behind)
    plain = [whole * step[..., None].double() for whole, step in (quantise_rows(q), quantise_rows(k))]
    as_they_are = relative(prefix_attention_ref(*plain, v, *prompt), exact)
    return relative(found * found_scale[..., None], exact.transpose(1, 2)), as_they_are


def joint_attention(run: Run = directly) -> tuple[float, float]:
    """Errors of joint attention to keys of which a bias in few channels is most: with it taken off, and not."""
    heads, width = 2, 128
    image, text = (list(random_stream("cpu", 1, n, 160, heads, n, dtype=torch.float32)) for n in (96, 20))
    for stream in (image, text):
        stream[4].mul_(0.1)[width + 7] = stream[4][width + 64 + 30] = 16.0
        stream[5].fill_(1.0)
        stream[6].fill_(1.0)
    wide = [[x.double() if x.is_floating_point() else x for x in stream] for stream in (image, text)]
    (q, k), v = int8_linear_to_joint_ref(*wide[0], *wide[1], torch.zeros(1, heads, 64).double(), heads, 1e-6)
    exact, keys = attention_ref(q, k, v), slice(width, 2 * width)
    off = run(joint_keys_off, *image[:2], *(x[keys] for x in image[2:5]), image[6], 1e-6)

    def error(taken: Tensor) -> float:
        (q8, k8), (q_scale, k_scale), halves = run(int8_linear_to_joint, image, text, taken, heads, 1e-6)
        return relative(attention_int8_ref(q8, q_scale, k8, k_scale, halves), exact)

    return error(off), error(torch.zeros_like(off))


def swiglu_groups(times: float) -> tuple[float, float]:
    """Errors of a product of SwiGLU's outputs, four channels so many times larger: a scale a group, a scale a row."""
    torch.manual_seed(0)
    wide, narrow = torch.randn(2 * 2048, 256) / 16, turned(torch.randn(128, 2048), 128)
    wide[2048 + torch.randperm(2048)[:4]] *= times
    whole, first, second = quantise_rows(torch.randn(48, 256)), quantise_rows(wide), quantise_rows(narrow)
    y = int8_linear(*whole, *first, activation="swiglu", dtype=torch.float32)
    exact = turned(y.double(), 128) @ narrow.double().T
    rows = int8_linear(*quantise_rows(turned(y, 128)), *second, dtype=torch.float32)
    groups = int8_linear_to_groups(*whole, *first, None, "swiglu", 128)
    return relative(int8_linear_of_groups(*groups, *second, dtype=torch.float32), exact), relative(rows, exact)


def _integers(*shape: int) -> Tensor:
    return torch.randint(-127, 128, shape, dtype=torch.int8)


def _scales(*shape: int) -> Tensor:
    return (torch.rand(shape) + 0.5) / 512


if __name__ == "__main__":
    sys.exit(main())
