"""Fast attention against materialised float32 scores, and the optional backends' calling conventions."""

import math
import sys
from types import ModuleType

import pytest
import torch
from unipic_run.engine.errors import UnsupportedDeviceError, UsageError
from unipic_run.engine.kv_cache import KVCache, Prompts
from unipic_run.engine.layers.attention import Attention, prefix_attention, resolve
from unipic_run.kernels.attention import attention, attention_ref

CASES = [  # heads, key heads, queries, keys, head dim, causal; why
    (16, 16, 67, 67, 80, False),  # MAR
    (12, 2, 33, 33, 128, True),  # LLM prefill
    (12, 2, 33, 90, 128, True),  # a block behind its prompt
    (12, 2, 1, 90, 128, True),  # one token of an answer
    (1, 1, 25, 25, 512, False),  # VAE
    (4, 4, 9, 65, 80, False),  # a pruned last block: few queries, all keys
]


def tensors(heads: int, key_heads: int, queries: int, keys: int, dim: int) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    return torch.randn(2, heads, queries, dim), *torch.randn(2, 2, key_heads, keys, dim)


@pytest.mark.parametrize(("heads", "key_heads", "queries", "keys", "dim", "causal"), CASES)
def test_attention_equals_reference(
    heads: int, key_heads: int, queries: int, keys: int, dim: int, causal: bool
) -> None:
    q, k, v = tensors(heads, key_heads, queries, keys, dim)
    torch.testing.assert_close(attention(q, k, v, causal), attention_ref(q, k, v, causal), atol=2e-6, rtol=1e-5)


def test_reference_by_hand() -> None:
    q, k = torch.zeros(1, 1, 2, 4), torch.zeros(1, 1, 3, 4)
    v = torch.tensor([1.0, 2.0, 6.0]).view(1, 1, 3, 1)
    assert attention_ref(q, k, v, causal=True).flatten().tolist() == [1.5, 3.0]  # query 0 sees keys 0 and 1


def fake_flash() -> ModuleType:
    module = ModuleType("flash_attn")

    def flash_attn_func(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> torch.Tensor:
        return attention_ref(*(x.transpose(1, 2) for x in (q, k, v)), causal).transpose(1, 2)

    module.flash_attn_func = flash_attn_func
    return module


def fake_xformers() -> ModuleType:
    module = ModuleType("xformers.ops")

    class LowerTriangularFromBottomRightMask:
        pass

    def memory_efficient_attention(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, attn_bias: object
    ) -> torch.Tensor:
        assert q.shape[2] == k.shape[2], "no grouped queries in this layout"
        causal = isinstance(attn_bias, LowerTriangularFromBottomRightMask)
        return attention_ref(*(x.transpose(1, 2) for x in (q, k, v)), causal).transpose(1, 2)

    module.LowerTriangularFromBottomRightMask = LowerTriangularFromBottomRightMask
    module.memory_efficient_attention = memory_efficient_attention
    return module


@pytest.mark.parametrize("backend", ["flash-attn", "xformers"])
@pytest.mark.parametrize(("heads", "key_heads", "queries", "keys", "dim", "causal"), CASES)
def test_optional_backends_are_called_as_they_expect(
    backend: str, heads: int, key_heads: int, queries: int, keys: int, dim: int, causal: bool, monkeypatch
) -> None:
    monkeypatch.setitem(sys.modules, "flash_attn", fake_flash())
    monkeypatch.setitem(sys.modules, "xformers.ops", fake_xformers())
    q, k, v = tensors(heads, key_heads, queries, keys, dim)
    got = Attention(backend)(q, k, v, causal)
    torch.testing.assert_close(got, attention_ref(q, k, v, causal), atol=2e-6, rtol=1e-5)


def prompts_of(*lengths: int, rows: tuple[int, ...]) -> tuple[Prompts, list[tuple[torch.Tensor, torch.Tensor]]]:
    """Prompts of two layers with room to spare, and the keys and values (K, S, d) of the second."""
    caches = [KVCache.empty(2, 2, length + 3, 8, torch.float32, torch.device("cpu")) for length in lengths]
    for cache, length in zip(caches, lengths, strict=True):
        cache.keys.fill_(math.nan), cache.values.fill_(math.nan)
        for layer in range(2):
            for x in cache.room(layer, length):
                x.normal_()
        cache.advance(length)
    return Prompts.of(list(zip(caches, rows, strict=True))), [cache.upto(1, 0) for cache in caches]


def test_whole_numbers_are_for_bidirectional_attention_only() -> None:
    torch.manual_seed(0)
    q, k, v = tensors(16, 16, 67, 67, 80)
    exact, whole = Attention(), Attention("int8-qk")
    assert torch.equal(whole(q, k, v, causal=True), exact(q, k, v, causal=True))
    error = (whole(q, k, v) - exact(q, k, v)).norm() / exact(q, k, v).norm()
    assert 1e-5 < error < 2e-2


@pytest.mark.parametrize("backend", ["sdpa", "flash-attn"])
def test_rows_of_different_prompts_see_their_own_prefix_only(backend: str, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "flash_attn", fake_flash())
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 4, 5, 8), torch.randn(3, 2, 5, 8), torch.randn(3, 2, 5, 8)
    prompts, (short, long) = prompts_of(3, 11, rows=(1, 2))
    got = prefix_attention(Attention(backend), prompts, 1, q, k, v)
    for row, (keys, values) in enumerate((short, long, long)):
        all_k, all_v = torch.cat([keys[None], k[row : row + 1]], 2), torch.cat([values[None], v[row : row + 1]], 2)
        torch.testing.assert_close(got[row : row + 1], attention_ref(q[row : row + 1], all_k, all_v, causal=True))
    assert prompts.positions(2).tolist() == [[3, 4], [11, 12], [11, 12]]


def test_a_lone_prompt_is_read_where_it_lies() -> None:
    prompts, ((keys, _),) = prompts_of(4, rows=(2,))
    assert prompts.keys.data_ptr() == keys.data_ptr() - keys.storage_offset() * 4


def test_resolving_names_the_reason() -> None:
    cpu = torch.device("cpu")
    assert resolve("auto", cpu, torch.float32) == Attention("sdpa")
    with pytest.raises(UnsupportedDeviceError, match="flash"):
        resolve("flash-attn", cpu, torch.bfloat16)
    with pytest.raises(UsageError, match="choose from auto, sdpa, int8-qk"):
        resolve("magic", cpu, torch.bfloat16)


def test_a_broken_package_is_named_or_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    from unipic_run.engine.layers import attention as door

    monkeypatch.setattr(door, "installed", lambda name: True)
    monkeypatch.setitem(sys.modules, "flash_attn", None)  # importing it fails
    cuda = torch.device("cuda")
    with pytest.warns(UserWarning, match="installed but broken"):
        assert resolve("auto", cuda, torch.bfloat16) == Attention("sdpa")
    with pytest.raises(UnsupportedDeviceError, match="installed but broken"):
        resolve("flash-attn", cuda, torch.bfloat16)
    with pytest.raises(UnsupportedDeviceError, match="not float32 on cuda"):
        resolve("flash-attn", cuda, torch.float32)
