"""A DeepGen 1.0 with small random weights in its released layouts, written from the names that the originals have.

`python tests/deepgen_release.py FOLDER` writes that for diffusers.
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor

Tensors = dict[str, Tensor]

VOCAB, WIDTH, LAYERS, HEAD, MLP = 288, 32, 6, 16, 48  # of the language model; two query heads, one of keys
BLOCKS, VISION, VISION_MLP = 2, 32, 44
SCB, ENCODER, SCB_MLP, QUERIES, TAPS = 32, 2, 94, 4, 3
DIT, DIT_BLOCKS, DUAL, TEXT, POOLED, TABLE = 64, 3, 1, 40, 36, 24  # two heads
CHANNELS = (8, 8, 16, 16)
RANK = 4
SPECIAL = ("endoftext", "im_start", "im_end", "vision_start", "vision_end", "image_pad")


def release(folder: Path) -> Path:
    """The layout for diffusers, with the language model whole."""
    torch.manual_seed(7)
    for name, tensors in (("transformer", transformer()), ("vae", vae()), ("vlm", vlm()), ("connector", connector())):
        save(tensors, folder / name / "model.safetensors")
    return with_small_files(folder, "vlm")


def native(folder: Path) -> Path:
    """The training code's layout: one file, with an update of a language model that lies beside it."""
    torch.manual_seed(7)
    trained = {f"transformer.{name}": tensor for name, tensor in transformer().items()}
    save(vae(), folder / "vae" / "model.safetensors")
    base = vlm()
    save(base, folder / "vlm_base" / "model.safetensors")
    save(trained | connector() | update(base), folder / "model.safetensors")
    return with_small_files(folder, "vlm_base")


def save(tensors: Tensors, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path)


def normal(*shape: int) -> Tensor:
    return torch.randn(shape) * shape[-1] ** -0.5


def linear(name: str, inputs: int, outputs: int, bias: bool = True) -> Tensors:
    return {f"{name}.weight": normal(outputs, inputs)} | ({f"{name}.bias": normal(outputs)} if bias else {})


def norm(name: str, width: int, bias: bool = False) -> Tensors:
    return {f"{name}.weight": 1 + normal(width)} | ({f"{name}.bias": normal(width)} if bias else {})


def conv(name: str, inputs: int, outputs: int, side: int) -> Tensors:
    return {f"{name}.weight": normal(outputs, inputs, side, side) / inputs**0.5, f"{name}.bias": normal(outputs)}


def vlm() -> Tensors:
    made = {"model.embed_tokens.weight": normal(VOCAB, WIDTH)} | norm("model.norm", WIDTH)
    for layer in (f"model.layers.{i}" for i in range(LAYERS)):
        made |= norm(f"{layer}.input_layernorm", WIDTH) | norm(f"{layer}.post_attention_layernorm", WIDTH)
        for name, outputs in (("q", 2 * HEAD), ("k", HEAD), ("v", HEAD)):
            made |= linear(f"{layer}.self_attn.{name}_proj", WIDTH, outputs)
        made |= linear(f"{layer}.self_attn.o_proj", 2 * HEAD, WIDTH, bias=False)
        for name in ("gate", "up"):
            made |= linear(f"{layer}.mlp.{name}_proj", WIDTH, MLP, bias=False)
        made |= linear(f"{layer}.mlp.down_proj", MLP, WIDTH, bias=False)
    made["visual.patch_embed.proj.weight"] = normal(VISION, 3, 2, 14, 14) / 10
    for block in (f"visual.blocks.{i}" for i in range(BLOCKS)):
        made |= norm(f"{block}.norm1", VISION) | norm(f"{block}.norm2", VISION)
        made |= linear(f"{block}.attn.qkv", VISION, 3 * VISION) | linear(f"{block}.attn.proj", VISION, VISION)
        for name in ("gate", "up"):
            made |= linear(f"{block}.mlp.{name}_proj", VISION, VISION_MLP)
        made |= linear(f"{block}.mlp.down_proj", VISION_MLP, VISION)
    made |= norm("visual.merger.ln_q", VISION) | linear("visual.merger.mlp.0", 4 * VISION, 4 * VISION)
    return made | linear("visual.merger.mlp.2", 4 * VISION, WIDTH)


def connector() -> Tensors:
    made = {"meta_queries": normal(QUERIES, WIDTH)} | linear("projector_1", TAPS * WIDTH, SCB)
    made |= linear("projector_2", SCB, POOLED) | linear("projector_3", SCB, TEXT)
    for layer in (f"connector.layers.{i}" for i in range(ENCODER)):
        made |= norm(f"{layer}.layer_norm1", SCB, bias=True) | norm(f"{layer}.layer_norm2", SCB, bias=True)
        for name in ("q", "k", "v", "out"):
            made |= linear(f"{layer}.self_attn.{name}_proj", SCB, SCB)
        made |= linear(f"{layer}.mlp.fc1", SCB, SCB_MLP) | linear(f"{layer}.mlp.fc2", SCB_MLP, SCB)
    return made


def transformer() -> Tensors:
    made = {"pos_embed.pos_embed": normal(1, TABLE * TABLE, DIT)} | conv("pos_embed.proj", 16, DIT, 2)
    for name, inputs in (("timestep", 256), ("text", POOLED)):
        embedder = f"time_text_embed.{name}_embedder"
        made |= linear(f"{embedder}.linear_1", inputs, DIT) | linear(f"{embedder}.linear_2", DIT, DIT)
    made |= linear("context_embedder", TEXT, DIT) | linear("norm_out.linear", DIT, 2 * DIT)
    made |= linear("proj_out", DIT, 64)
    for i in range(DIT_BLOCKS):
        last, dual, block = i == DIT_BLOCKS - 1, i < DUAL, f"transformer_blocks.{i}"
        made |= linear(f"{block}.norm1.linear", DIT, (9 if dual else 6) * DIT)
        made |= linear(f"{block}.norm1_context.linear", DIT, (2 if last else 6) * DIT)
        names = [f"attn.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0", *([] if last else ["to_add_out"]))]
        names += [f"attn.add_{name}_proj" for name in "qkv"]
        names += [f"attn2.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0")] if dual else []
        for name in names:
            made |= linear(f"{block}.{name}", DIT, DIT)
        norms = [f"attn.norm_{name}" for name in ("q", "k", "added_q", "added_k")]
        for name in norms + (["attn2.norm_q", "attn2.norm_k"] if dual else []):
            made |= norm(f"{block}.{name}", DIT // 2)
        for name in ("ff",) if last else ("ff", "ff_context"):
            made |= linear(f"{block}.{name}.net.0.proj", DIT, 4 * DIT) | linear(f"{block}.{name}.net.2", 4 * DIT, DIT)
    return made


def vae() -> Tensors:
    made: Tensors = {}
    first, last = CHANNELS[0], CHANNELS[-1]
    for half, (start, end), (before, after) in (
        ("encoder", (first, last), (3, 32)),
        ("decoder", (last, first), (16, 3)),
    ):
        made |= conv(f"{half}.conv_in", before, start, 3) | conv(f"{half}.conv_out", end, after, 3)
        made |= norm(f"{half}.conv_norm_out", end, bias=True)
        for name in (f"{half}.mid_block.resnets.{i}" for i in (0, 1)):
            made |= resnet(name, last, last)
        attention = f"{half}.mid_block.attentions.0"
        made |= norm(f"{attention}.group_norm", last, bias=True)
        for name in ("to_q", "to_k", "to_v", "to_out.0"):
            made |= linear(f"{attention}.{name}", last, last)
        down, width = half == "encoder", start
        for level, wide in enumerate(CHANNELS if down else CHANNELS[::-1]):
            block = f"{half}.{'down' if down else 'up'}_blocks.{level}"
            for i in range(1 if down else 2):
                made |= resnet(f"{block}.resnets.{i}", wide if i else width, wide)
            if level < len(CHANNELS) - 1:
                made |= conv(f"{block}.{'down' if down else 'up'}samplers.0.conv", wide, wide, 3)
            width = wide
    return made


def resnet(name: str, inputs: int, outputs: int) -> Tensors:
    made = norm(f"{name}.norm1", inputs, bias=True) | norm(f"{name}.norm2", outputs, bias=True)
    made |= conv(f"{name}.conv1", inputs, outputs, 3) | conv(f"{name}.conv2", outputs, outputs, 3)
    return made | (conv(f"{name}.conv_shortcut", inputs, outputs, 1) if inputs != outputs else {})


def update(base: Tensors, old: bool = False) -> Tensors:
    """A low-rank update of every linear layer and of the table; `old` names are those of an earlier transformers."""
    made = linear("lmm.lm_head.lora_A.default", WIDTH, RANK, bias=False)
    made |= linear("lmm.lm_head.lora_B.default", RANK, VOCAB, bias=False)
    for name, weight in base.items():
        module, kind = name.rpartition(".")[::2]
        if weight.dim() != 2 or kind == "bias":
            continue
        if not old:
            module = module.replace("model.", "model.language_model.") if "visual" not in module else f"model.{module}"
        outputs, inputs = weight.shape
        if "embed" in module:
            made[f"lmm.{module}.lora_embedding_A.default"] = normal(RANK, outputs)
            made[f"lmm.{module}.lora_embedding_B.default"] = normal(inputs, RANK)
        else:
            made |= linear(f"lmm.{module}.lora_A.default", inputs, RANK, bias=False)
            made |= linear(f"lmm.{module}.lora_B.default", RANK, outputs, bias=False)
    return made


def with_small_files(folder: Path, language_model: str) -> Path:
    """The configurations, and a tokenizer of single bytes and one pair."""
    letters = sorted(ByteLevel.alphabet())
    ids = {f"<|{name}|>": len(letters) + 1 + i for i, name in enumerate(SPECIAL)}
    plain = {"special": True, "normalized": False, "lstrip": False, "rstrip": False, "single_word": False}
    added = {str(token): {"content": text, **plain} for text, token in ids.items()}
    config = {
        "hidden_size": WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "rope_theta": 1000000.0,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 4096,
        "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
        "image_token_id": ids["<|image_pad|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_config": {"depth": BLOCKS, "num_heads": 2, "window_size": 112, "fullatt_block_indexes": [1]},
    }
    autoencoder = {
        "block_out_channels": CHANNELS,
        "layers_per_block": 1,
        "latent_channels": 16,
        "norm_num_groups": 4,
        "scaling_factor": 1.5305,
        "shift_factor": 0.0609,
    }
    files = {
        f"{language_model}/config.json": config,
        f"{language_model}/generation_config.json": {"repetition_penalty": 1.05},
        "vae/config.json": autoencoder,
        "connector/config.json": {"num_attention_heads": 2},
        "scheduler/scheduler_config.json": {"shift": 3.0, "num_train_timesteps": 1000, "use_dynamic_shifting": False},
        "tokenizer/vocab.json": {letter: i for i, letter in enumerate([*letters, "Ġa"])},
        "tokenizer/tokenizer_config.json": {"added_tokens_decoder": added, "eos_token": "<|im_end|>"},
    }
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content), encoding="utf-8")
    (folder / "tokenizer" / "merges.txt").write_text("#version: 0.2\nĠ a\n", encoding="utf-8")
    return folder


if __name__ == "__main__":
    release(Path(sys.argv[1]))
