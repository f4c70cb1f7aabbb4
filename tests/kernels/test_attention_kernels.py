"""What the cases of the attention kernels leave out: who runs what, layouts, lengths that change behind a launch."""

import os
import subprocess
import sys

import pytest
import torch
from unipic_run.bench.interpreter import exact_bfloat16
from unipic_run.kernels import attention_int8 as int8
from unipic_run.kernels._attend import head_blocks
from unipic_run.kernels._op import HAS_TRITON, OPERATORS, interpreted, recording
from unipic_run.kernels.attention import attention, attention_ref, prefers_triton, random_qkv
from unipic_run.kernels.attention_int8 import attention_int8
from unipic_run.kernels.decode_attention import decode_attention, decode_attention_cases
from unipic_run.kernels.prefix_attention import prefix_attention, prefix_attention_cases, prefix_attention_ref
from unipic_run.kernels.prefix_attention_int8 import (
    prefix_attention_int8,
    prefix_attention_int8_cases,
    prefix_attention_int8_ref,
)
from unipic_run.kernels.quantise_qkv import quantise_qkv

needs_the_interpreter = pytest.mark.skipif(
    not HAS_TRITON or os.environ.get("TRITON_INTERPRET") != "1", reason="needs triton and TRITON_INTERPRET=1"
)


@pytest.mark.parametrize(
    ("shape", "ours"),
    [
        ((2, 16, 16, 4160, 4160, 80), True),  # MAR: the library computes 96 columns
        ((2, 16, 16, 40, 4160, 80), False),  # few queries: the library splits the keys
        ((2, 24, 24, 4250, 4250, 64), False),  # DiT
        ((2, 12, 2, 4160, 4160, 128), False),  # LLM
        ((1, 1, 1, 4096, 4096, 512), False),  # VAE
    ],
)
def test_on_meta_every_attention_is_one_launch_that_makes_only_its_output(
    shape: tuple[int, ...], ours: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch, heads, kv_heads, lq, lk, width = shape
    q = torch.empty(batch, lq, heads, width, dtype=torch.bfloat16, device="meta").transpose(1, 2)
    k, v = torch.empty(2, batch, lk, kv_heads, width, dtype=torch.bfloat16, device="meta").transpose(2, 3)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", None)  # it would make all scores
    with recording() as launches:
        out = attention(q, k, v)
    library = 0 if ours else OPERATORS["unipic::attention_sdpa"].cost(q, k, v, False).launches
    assert prefers_triton(q, k) is ours and len(launches) + library == 1
    assert out.shape == q.shape and out.transpose(1, 2).is_contiguous()


def test_blocks_of_columns_cover_a_head_and_little_more() -> None:
    assert [head_blocks(width) for width in (12, 64, 80, 128)] == [(16, 0), (64, 0), (64, 16), (64, 64)]
    for width in range(1, 129):
        for least in (16, 32):
            first, second = head_blocks(width, least)
            assert width <= first + second <= max(least, 2 * width) and first <= 64, width


@needs_the_interpreter
@pytest.mark.parametrize("spread", [1.0, 4.0])
def test_int8_scores_are_close_where_all_keys_share_a_large_vector(spread: float) -> None:
    torch.manual_seed(0)
    q, k, v = random_qkv("cpu", 1, 1, 1, 33, 70, 80, layout="apart")
    q, k = spread * q, k + 30 * torch.randn(80)  # what the keys share has 30 times the size of what tells them apart
    exact = attention_ref(q.double(), k.double(), v.double())

    def error(x: torch.Tensor) -> float:
        return ((x - exact).norm() / exact.norm()).item()

    with interpreted(), exact_bfloat16(), recording() as launches:
        assert error(attention_int8(q.bfloat16(), k, v)) < 2e-2
    assert [launch.kernel.__name__ for launch in launches] == ["_quantise_qkv_kernel", "_attention_int8_kernel"]
    q8, q_scale, _, _, half = quantise_qkv(q, k, v)
    scale = k.abs().amax(-1) / 127
    plain = (k / scale[..., None]).round().to(torch.int8)
    assert error(int8.operator(q8, q_scale, plain, scale, half, torch.float32)) > 2e-2  # without taking it off


@needs_the_interpreter
def test_sums_of_halves_do_not_overflow() -> None:
    q, k = torch.zeros(2, 1, 1, 32, 80)
    v = torch.full((1, 1, 32, 80), 60000.0)
    with interpreted():
        out = attention_int8(q, k, v)
    torch.testing.assert_close(out, torch.full_like(v, 60000.0), rtol=1e-3, atol=0)


@needs_the_interpreter
def test_one_launch_serves_all_prompts_and_whatever_their_buffers_hold_then() -> None:
    case = next(case for case in prefix_attention_cases() if case.why.startswith("grouped"))
    q, k, v, prefix_k, prefix_v, prefix_of, lengths = (
        x.float() if x.is_floating_point() else x for x in case.make("cpu")
    )
    with interpreted():
        for refill in ([19, 2], [7, 0]):
            lengths.copy_(torch.tensor(refill))
            with recording() as launches:
                got = prefix_attention(q, k, v, prefix_k, prefix_v, prefix_of, lengths)
            assert len(launches) == 1 and got.transpose(1, 2).is_contiguous()
            expected = prefix_attention_ref(q, k, v, prefix_k, prefix_v, prefix_of, lengths)
            torch.testing.assert_close(got, expected, atol=2e-6, rtol=1e-5)


@needs_the_interpreter
def test_so_does_the_one_in_whole_numbers() -> None:
    case = next(case for case in prefix_attention_int8_cases() if case.why.startswith("grouped"))
    *given, lengths = case.make("cpu")
    with interpreted(), exact_bfloat16():
        for refill in ([19, 2], [7, 0]):
            lengths.copy_(torch.tensor(refill))
            with recording() as launches:
                found, scale = prefix_attention_int8(*given, lengths)
            assert len(launches) == 1
            exact = prefix_attention_int8_ref(*given, lengths)
            assert (found * scale[..., None] - exact).norm() / exact.norm() < 2e-2


@needs_the_interpreter
def test_a_token_is_decoded_at_whatever_length_the_cache_has_by_then() -> None:
    q, (k, v) = torch.randn(1, 6, 1, 32), torch.randn(2, 1, 2, 70, 32)
    lengths = torch.tensor([64], dtype=torch.int32)
    with interpreted():
        for length in (64, 65, 66):
            got = decode_attention(q, k, v, lengths)
            expected = attention_ref(q, k[:, :, :length], v[:, :, :length])
            torch.testing.assert_close(got, expected, atol=2e-6, rtol=1e-5)
            lengths.add_(1)


def test_decoding_work_depends_on_capacities_only_and_its_workspace_stays_small() -> None:
    for case in decode_attention_cases():
        if "interp" in case.marks:
            continue
        q, *caches = case.make("meta")
        with recording() as launches:
            decode_attention(q, *caches)
        (_, first), (join, last) = ((launch.kernel.__name__, launch) for launch in launches)
        workspace = sum(x.numel() * 4 for x in last.arguments[:3])
        assert join == "_join_kernel" and first.grid[0] * first.grid[1] <= 260 and workspace < 2 << 20, case.why


BINARIES = """
import torch
from unipic_run.bench.aot_compile import specialised
from unipic_run.kernels._op import recording
from unipic_run.kernels.attention import flash_attention, random_qkv
from unipic_run.kernels.attention_int8 import attention_int8
from unipic_run.kernels.decode_attention import decode_attention
from unipic_run.kernels.prefix_attention import prefix_attention
from unipic_run.kernels.prefix_attention_int8 import prefix_attention_int8

found = {}
for length in (1, 16, 33, 48, 70):
    q, k, v = random_qkv("cpu", 2, 2, 2, length, length, 80)
    q, k, v = (x.to("meta") for x in (q, k, v))
    counts = torch.empty(2, dtype=torch.int32, device="meta")
    with recording() as launches:
        flash_attention(q, k, v, False)
        attention_int8(q, k, v)
        prefix_attention(q, k, v, k, v, counts, counts)
        decode_attention(q[:, :, :1], k, v, counts)
        whole, halves = (torch.empty(2, n, length, 128, device="meta") for n in (4, 2))
        scale, off = whole[..., 0].contiguous(), halves[:, :, 0].contiguous()
        whole, halves = whole.to(torch.int8), halves.half()
        prefix_attention_int8(whole, scale, halves, off, halves, halves, counts, counts)
    for launch in launches:
        found.setdefault(launch.kernel.__name__, set()).add(specialised(launch, "here").key)
print({name: len(keys) for name, keys in found.items()})
assert {"_attention_kernel", "_attention_int8_kernel", "_prefix_attention_kernel", "_decode_kernel",
        "_prefix_attention_int8_kernel"} <= found.keys()
assert all(len(found[name]) == 1 for name in found if "attention" in name or "decode" in name)
"""


@pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")
def test_one_binary_serves_all_lengths() -> None:
    """Triton makes another one for a number that is 1 or a multiple of 16, unless it is told not to."""
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", BINARIES], capture_output=True, text=True, env=kept)
    assert done.returncode == 0, done.stdout + done.stderr
