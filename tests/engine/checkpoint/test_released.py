"""The released folder: names, sizes, tokenizer; and what is said when something is missing, extra or misshapen."""

import json
import shutil

import pytest
import torch
from safetensors import safe_open
from unipic_run.engine.checkpoint.convert import convert
from unipic_run.engine.errors import CorruptWeightsError, ModelMissingError
from unipic_run.engine.models.unipic import keys, released


@pytest.fixture
def copy(tiny, tmp_path):
    return shutil.copytree(tiny, tmp_path / "copy")


def edit(folder, change, name="pytorch_model.bin", wrapper=None):
    state = torch.load(folder / name, weights_only=True)
    change(state[wrapper] if wrapper else state)
    torch.save(state, folder / name)


def refused(folder, *words, error=CorruptWeightsError):
    with pytest.raises(error) as caught:
        released.Released(folder)
    for word in words:
        assert word in str(caught.value), caught.value


def test_the_tiny_checkpoint(tiny):
    with released.Released(tiny) as checkpoint:
        config = checkpoint.config
        assert (config.llm.layers, config.llm.heads, config.llm.kv_heads, config.llm.head_dim) == (3, 4, 2, 16)
        assert (config.mar.grid, config.mar.buffer, config.mar.heads, config.mar.mlp) == (8, 64, 4, 256)
        assert (config.head.depth, config.head.steps, config.head.train_steps, config.head.max_beta) == (
            2,
            100,
            1000,
            0.2,
        )
        assert (config.vae.base, config.vae.multipliers, config.vae.latent) == (32, (1, 1, 2, 2, 4), 16)
        assert (config.image_token, config.eos_token, config.repetition_penalty) == (422, 402, 1.1)
        assert (config.resolution, config.rounds, config.guidance, config.vae_scale) == (128, 32, 3.0, 0.2325)
        assert type(config).from_json(json.loads(json.dumps(config.to_json()))) == config
        assert checkpoint.tensors["vae_decoder.conv_in.weight"].dtype == torch.bfloat16
        assert checkpoint.tensors["llm.layers.0.qkv.weight"].shape == (128, 64)


def test_the_released_sizes(tiny, copy):
    """Without tiny_config.json the released hyper-parameters hold; 16 heads happen to divide the tiny width too."""
    (copy / "tiny_config.json").unlink()
    with released.Released(copy) as checkpoint:
        assert (checkpoint.config.mar.heads, checkpoint.config.resolution, checkpoint.config.mar.buffer) == (
            16,
            1024,
            64,
        )


def test_every_released_name_has_exactly_one_place():
    """28 LLM layers, 20 + 20 blocks, 12 head blocks: of the released 1403 tensors, 454 are of no use to us."""
    rows = keys.table(28, 20, 20, 12)
    names = [name for parts in rows.values() for name in parts]
    assert len(names) == len(set(names))
    assert len(names) == 949
    assert rows["llm.layers.27.qkv.bias"] == tuple(f"llm.model.layers.27.self_attn.{x}_proj.bias" for x in "qkv")
    assert rows["llm.layers.0.gate_up.weight"][0].endswith("gate_proj.weight")
    assert keys.vae_name("quant_conv.weight") == "vae_encoder.quant_conv.weight"
    assert keys.vae_name("post_quant_conv.bias") == "vae_decoder.post_quant_conv.bias"
    assert keys.vae_name("loss.weight") is None


def test_a_download_may_nest_the_folder(copy, tmp_path):
    outer = tmp_path / "outer"
    outer.mkdir()
    copy.rename(outer / "checkpoint")
    assert released.is_released(outer)
    with released.Released(outer) as checkpoint:
        assert checkpoint.folder.name == "checkpoint"


def test_optional_tensors_may_be_absent(copy):
    def drop(state):
        for name in [n for n in state if keys.is_ignored(n)]:
            del state[name]

    edit(copy, drop)
    (copy / "Qwen2.5-1.5B-Instruct" / "generation_config.json").unlink()
    with released.Released(copy) as checkpoint:
        assert checkpoint.config.repetition_penalty == 1.0


def test_vae_in_the_main_file_wins(copy):
    edit(copy, lambda state: state.update({"vae.quant_conv.bias": torch.full((32,), 7.0)}))
    with released.Released(copy) as checkpoint:
        ((archive, record),) = checkpoint.tensors["vae_encoder.quant_conv.bias"].parts
        assert torch.equal(archive.read(record), torch.full((32,), 7.0))


def test_extra_names_are_left_out_and_listed(copy):
    """Nobody has seen the released file: a key more must not refuse it, wherever it stands and whatever it holds."""
    extra = ["mar.surprise", "mar.encoder_blocks.7.lora.weight", "llm.model.layers.0.self_attn.rotary_emb.inv_freq"]

    def change(state):
        state.update({name: torch.zeros(2, dtype=torch.int64) for name in extra})

    edit(copy, change)
    vae = ["encoder.down.5.block.0.norm1.weight", "decoder.surprise", "loss.logvar"]
    edit(copy, lambda state: state.update({name: torch.zeros(3) for name in vae}), "kl16.ckpt", "model")
    with released.Released(copy) as checkpoint:
        assert set(checkpoint.ignored) == {*extra, *(f"vae.{name}" for name in vae)}
        assert not any("surprise" in name for name in checkpoint.tensors)
        assert checkpoint.config.mar.encoder_depth == 2


def test_a_block_or_layer_that_is_not_whole_is_no_extra(copy):
    edit(copy, lambda state: state.update({"mar.encoder_blocks.2.norm1.weight": torch.zeros(64)}))
    refused(copy, "11 missing", "mar.encoder_blocks.2.attn.qkv.weight")


def test_a_fused_tensor_of_mixed_types_becomes_the_wider(copy, tmp_path):
    name = "llm.model.layers.0.self_attn.{}_proj.weight"
    parts = []

    def change(state):
        state[name.format("k")] = state[name.format("k")].bfloat16()
        parts.extend(state[name.format(x)].float() for x in "qkv")

    edit(copy, change)
    with safe_open(convert(copy, tmp_path / "out") / "model.safetensors", "pt") as file:
        assert torch.equal(file.get_tensor("llm.layers.0.qkv.weight"), torch.cat(parts))


def test_one_error_lists_all_missing_and_unexpected(copy):
    def change(state):
        del state["llm.model.layers.1.self_attn.k_proj.bias"], state["mar.fake_latent"], state["proj_out.2.weight"]
        state["mar.surprise"] = state["llm.model.layers.9.mlp.up_proj.weight"] = torch.zeros(2)

    edit(copy, change)
    refused(copy, "3 missing", "llm.model.layers.1.self_attn.k_proj.bias", "mar.fake_latent", "proj_out.2.weight")
    refused(copy, "1 unexpected: llm.model.layers.9.mlp.up_proj.weight")  # a layer that config.json denies


def test_one_error_lists_all_misshapen(copy):
    def change(state):
        state["mar.encoder_blocks.1.mlp.fc2.weight"] = torch.zeros(64, 255)
        state["llm.model.layers.2.self_attn.q_proj.weight"] = torch.zeros(60, 64)

    edit(copy, change)
    refused(copy, "2 misshapen", "mar_encoder.blocks.1.fc2.weight [64, 255], not [64, 256]", "llm.layers.2.qkv.weight")


def test_a_vae_tensor_that_is_missing(copy):
    edit(copy, lambda state: state.pop("decoder.mid.attn_1.k.bias"), "kl16.ckpt", "model")
    refused(copy, "vae_decoder.mid.attn_1.k.bias")
    edit(copy, lambda state: state.pop("encoder.conv_in.weight"), "kl16.ckpt", "model")
    refused(copy, "vae.encoder.conv_in.weight")
    (copy / "kl16.ckpt").unlink()
    refused(copy, "kl16.ckpt", error=ModelMissingError)


def test_missing_and_broken_small_files(copy):
    qwen = copy / "Qwen2.5-1.5B-Instruct"
    good = (qwen / "config.json").read_text()
    for broken in ("", "[]", "{", "[" * 100_000, good.replace('layers": 3', 'layers": 1000000000'), "\xff"):
        (qwen / "config.json").write_bytes(broken.encode("latin1"))
        refused(copy)
    (qwen / "config.json").write_text(good.replace('"rope_theta": 1000000.0', '"rope_theta": NaN'))
    refused(copy, "rope_theta")
    (qwen / "config.json").write_text(good.replace('heads": 4', 'heads": 1000'))
    refused(copy)
    (qwen / "config.json").write_text(good.replace('heads": 2', 'heads": 3'))
    refused(copy, "llm.heads is 4, which is not a multiple of llm.kv_heads, 3")
    (qwen / "config.json").write_text(good)
    (qwen / "tokenizer.json").write_text('{"model": 3}')
    refused(copy, "not a tokenizer")
    (qwen / "tokenizer.json").unlink()
    refused(copy, "tokenizer.json", error=ModelMissingError)
    shutil.rmtree(qwen)
    refused(copy, "Qwen2.5-1.5B-Instruct", error=ModelMissingError)


def test_integer_weights_are_refused(copy):
    edit(copy, lambda state: state.update({"mar.fake_latent": torch.zeros(1, 64, dtype=torch.int64)}))
    refused(copy, "fake_latent")
