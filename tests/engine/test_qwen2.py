"""Qwen2 against transformers on random weights, and the cache's promises."""

import pytest
import torch
from unipic_run.engine.kv_cache import KVCache, Prompts
from unipic_run.engine.layers.attention import Attention
from unipic_run.engine.layers.qwen2 import Qwen2, Qwen2Config

CONFIG = Qwen2Config(
    vocab=50, width=48, layers=3, heads=6, kv_heads=2, head_dim=8, mlp=80, rope_theta=1e6, norm_eps=1e-6,
    max_positions=512,
)  # fmt: skip


@pytest.fixture(scope="module")
def pair() -> tuple[Qwen2, torch.nn.Module]:
    """Ours and transformers', with the same random weights."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    theirs = transformers.Qwen2Model(
        transformers.Qwen2Config(
            vocab_size=CONFIG.vocab,
            hidden_size=CONFIG.width,
            num_hidden_layers=CONFIG.layers,
            num_attention_heads=CONFIG.heads,
            num_key_value_heads=CONFIG.kv_heads,
            intermediate_size=CONFIG.mlp,
            rope_parameters={"rope_type": "default", "rope_theta": CONFIG.rope_theta},
            rms_norm_eps=CONFIG.norm_eps,
            attn_implementation="eager",
        )
    ).eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    ours = Qwen2(CONFIG, Attention(), round_inv_freq=True).requires_grad_(False)
    ours.norm.load_state_dict(theirs.norm.state_dict())
    for mine, layer in zip(ours.layers, theirs.layers, strict=True):
        attn, mlp = layer.self_attn, layer.mlp
        mine.qkv.weight.copy_(torch.cat([attn.q_proj.weight, attn.k_proj.weight, attn.v_proj.weight]))
        mine.qkv.bias.copy_(torch.cat([attn.q_proj.bias, attn.k_proj.bias, attn.v_proj.bias]))
        mine.o.weight.copy_(attn.o_proj.weight)
        mine.gate_up.weight.copy_(torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]))
        mine.down.weight.copy_(mlp.down_proj.weight)
        mine.input_norm.weight.copy_(layer.input_layernorm.weight)
        mine.post_norm.weight.copy_(layer.post_attention_layernorm.weight)
    return ours, theirs


def cache(capacity: int, base: KVCache | None = None) -> KVCache:
    cpu = torch.device("cpu")
    return KVCache.empty(CONFIG.layers, CONFIG.kv_heads, capacity, CONFIG.head_dim, torch.float32, cpu, base)


def reference(theirs: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return theirs(inputs_embeds=x).last_hidden_state


def test_prefill_in_pieces_and_token_by_token(pair: tuple[Qwen2, torch.nn.Module]) -> None:
    ours, theirs = pair
    x = torch.randn(1, 17, CONFIG.width)
    expected, kept = reference(theirs, x), cache(17)
    pieces = [ours.extend(part, kept) for part in x.split([5, 9, 1, 1, 1], dim=1)]
    torch.testing.assert_close(torch.cat(pieces, 1), expected, atol=1e-4, rtol=1e-4)


def test_a_token_with_nothing_but_tensors_is_the_next_one_of_a_text(pair: tuple[Qwen2, torch.nn.Module]) -> None:
    ours, theirs = pair
    x, kept = torch.randn(1, 8, CONFIG.width), cache(11)
    expected = reference(theirs, x)
    ours.extend(x[:, :5], kept)
    for at in range(5, 8):
        step = ours.step(x[:, at : at + 1], *kept.next())
        torch.testing.assert_close(step, expected[:, at : at + 1], atol=1e-4, rtol=1e-4)
        kept.advance(1)
    assert kept.length == 8
    with pytest.raises(ValueError, match="12 positions do not fit a cache of 11"):
        kept.advance(3), kept.next()
    with pytest.raises(ValueError, match="with a base"):
        cache(3, base=kept).next()


def test_a_block_behind_prompts_of_different_length_leaves_the_caches_alone(
    pair: tuple[Qwen2, torch.nn.Module],
) -> None:
    ours, theirs = pair
    prompts, block = [torch.randn(1, length, CONFIG.width) for length in (4, 9)], torch.randn(3, 6, CONFIG.width)
    caches = []
    for prompt in prompts:
        caches.append(cache(prompt.shape[1]))
        ours.extend(prompt, caches[-1])
    got = ours(block, Prompts.of([(caches[0], 1), (caches[1], 1), (caches[0], 1)]))
    for row, i in enumerate((0, 1, 0)):
        expected = reference(theirs, torch.cat([prompts[i], block[row : row + 1]], 1))[:, -6:]
        torch.testing.assert_close(got[row : row + 1], expected, atol=1e-4, rtol=1e-4)
    assert [c.length for c in caches] == [4, 9]


def test_layers_leave_alone_what_they_are_given(pair: tuple[Qwen2, torch.nn.Module]) -> None:
    ours, _ = pair
    given = torch.randn(1, 6, CONFIG.width), torch.randn(1, 1, CONFIG.width)
    rows, positions = [x.clone() for x in given], [torch.arange(6)[None], None]
    with torch.inference_mode():
        layers = list(ours.outputs(rows, positions))
    assert all(map(torch.equal, rows, given))
    for layer, with_gradients in zip(layers, ours.outputs(rows, positions), strict=True):
        for x, expected in zip(layer, with_gradients, strict=True):
            torch.testing.assert_close(x, expected, atol=1e-4, rtol=1e-4)


def test_cutting_back_forgets_without_touching_memory(pair: tuple[Qwen2, torch.nn.Module]) -> None:
    ours, _ = pair
    x, other = torch.randn(2, 1, 8, CONFIG.width)
    kept = cache(16)
    first = ours.extend(x, kept)
    before = kept.keys.data_ptr()
    ours.extend(other, kept)
    kept.cut(0)
    assert torch.equal(ours.extend(x, kept), first) and kept.keys.data_ptr() == before
    with pytest.raises(ValueError, match="cannot cut"):
        kept.cut(9)


def test_prompts_share_what_they_have_in_common(pair: tuple[Qwen2, torch.nn.Module]) -> None:
    ours, theirs = pair
    picture, tail = torch.randn(1, 7, CONFIG.width), torch.randn(1, 3, CONFIG.width)
    base = cache(7)
    ours.extend(picture, base)
    kept = cache(3, base)
    got = torch.cat([ours.extend(part, kept) for part in tail.split([2, 1], dim=1)], 1)  # the last one by itself
    torch.testing.assert_close(got, reference(theirs, torch.cat([picture, tail], 1))[:, -3:], atol=1e-4, rtol=1e-4)
    assert kept.length == 10 and base.length == 7 and kept.upto(0, 0)[0].shape[1] == 10
    kept.cut(7)
    torch.testing.assert_close(ours.extend(tail, kept), got, atol=1e-5, rtol=1e-5)
    block = torch.randn(2, 4, CONFIG.width)
    behind = ours(block, Prompts.of([(kept, 2)]))
    for row in range(2):
        expected = reference(theirs, torch.cat([picture, tail, block[row : row + 1]], 1))[:, -4:]
        torch.testing.assert_close(behind[row : row + 1], expected, atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="cannot cut"):
        kept.cut(6)


def test_cache_refuses_what_does_not_fit() -> None:
    small = cache(3)
    with pytest.raises(ValueError, match="4 positions do not fit a cache of 3"):
        small.room(0, 4)
    with pytest.raises(ValueError, match="cannot cut"):
        small.cut(1)


def test_rounded_frequencies_only_in_bfloat16() -> None:
    ours = Qwen2(CONFIG, Attention(), round_inv_freq=True)
    exact = Qwen2(CONFIG, Attention(), round_inv_freq=False)
    positions = torch.tensor([[4000]])
    assert torch.equal(ours.rotary(positions, torch.float32)[0], exact.rotary(positions, torch.float32)[0])
    assert not torch.equal(ours.rotary(positions, torch.bfloat16)[0], exact.rotary(positions, torch.bfloat16)[0])
