"""Both released layouts of DeepGen: the same tensors under our names, and one typed error for what is wrong."""

import json
import math
import os
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from unipic_run.engine import families, hub, weights
from unipic_run.engine.checkpoint import manifest
from unipic_run.engine.checkpoint.convert import convert
from unipic_run.engine.checkpoint.parts import Centre, Merged, Shaped
from unipic_run.engine.errors import CorruptWeightsError, ModelMissingError
from unipic_run.engine.info import checkpoint_info
from unipic_run.engine.models.deepgen.released import Released, is_released
from unipic_run.engine.models.deepgen.released_config import kept_rows
from unipic_run.engine.models.deepgen.tokenizer import read_tokenizer
from unipic_run.quant.recipe import NONE

ROOT = Path(__file__).resolve().parents[3]
GOLDENS = Path(os.environ.get("UNIPIC_RUN_GOLDENS", ROOT.parent / "shared" / "goldens")) / "deepgen"
recorded = pytest.mark.skipif(not GOLDENS.is_dir(), reason="needs the recorded runs of DeepGen beside the checkout")


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path_factory):
    monkeypatch.setenv("UNIPIC_RUN_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def copy(tiny_deepgen, tmp_path):
    return shutil.copytree(tiny_deepgen, tmp_path / "src")


@pytest.fixture
def trained(deepgen_layouts, tmp_path):
    return deepgen_layouts.native(tmp_path / "trained")


def stored(folder: Path, component: str) -> dict[str, torch.Tensor]:
    return load_file(folder / component / "model.safetensors")


def edit(folder: Path, component: str, change) -> None:
    path = folder / component / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def edit_json(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | values), encoding="utf-8")


def tensors_of(released: Released) -> dict[str, torch.Tensor]:
    return {
        name: torch.cat([part.read().reshape(-1) for part in tensor.parts]).view(tensor.shape).clone()
        for name, tensor in released.tensors.items()
    }


def read(folder: Path) -> dict[str, torch.Tensor]:
    with Released(folder) as released:
        assert released.ignored == []
        return tensors_of(released)


def refused(folder: Path, *said: str, error: type[Exception] = CorruptWeightsError) -> None:
    with pytest.raises(error) as caught:
        Released(folder)
    for words in said:
        assert words in str(caught.value), str(caught.value)
    assert caught.value.remedy


def equal(found: torch.Tensor, *parts: torch.Tensor) -> bool:
    return torch.equal(found, torch.cat(parts))


def test_tensors_are_joined_shaped_and_padded(tiny_deepgen):
    ours = read(tiny_deepgen)
    vlm, connector, dit, vae = (stored(tiny_deepgen, name) for name in ("vlm", "connector", "transformer", "vae"))
    q, k, v = (f"self_attn.{x}_proj.weight" for x in "qkv")
    assert equal(ours["llm.layers.5.qkv.weight"], *(vlm[f"model.layers.5.{name}"] for name in (q, k, v)))
    assert equal(ours["connector.encoder.1.qkv.weight"], *(connector[f"connector.layers.1.{x}"] for x in (q, k, v)))
    names = [f"transformer_blocks.2.attn.add_{x}_proj.bias" for x in "qkv"]
    assert equal(ours["dit.blocks.2.text.qkv.bias"], *(dit[name] for name in names))
    assert equal(ours["modulation.blocks.2.text.weight"], dit["transformer_blocks.2.norm1_context.linear.weight"])
    assert equal(ours["vision.patch_embed.weight"], vlm["visual.patch_embed.proj.weight"].flatten(1))
    assert equal(ours["dit.patch_embed.weight"], dit["pos_embed.proj.weight"].flatten(1))
    assert equal(ours["dit.pos_table"], dit["pos_embed.pos_embed"].view(24, 24, 64))
    # diffusers counts a decoder's levels from the smallest map on
    assert equal(ours["vae_decoder.up.3.block.1.conv2.weight"], vae["decoder.up_blocks.0.resnets.1.conv2.weight"])
    shortcut = vae["decoder.up_blocks.2.resnets.0.conv_shortcut.weight"]
    assert equal(ours["vae_decoder.up.1.block.0.nin_shortcut.weight"], shortcut)
    assert equal(ours["vae_encoder.mid.attn_1.q.weight"][..., 0, 0], vae["encoder.mid_block.attentions.0.to_q.weight"])
    gate, up = (vlm[f"visual.blocks.0.mlp.{name}_proj.bias"] for name in ("gate", "up"))
    zeros = torch.zeros(128 - 44)
    assert equal(ours["vision.blocks.0.gate_up.bias"], gate, zeros, up, zeros)
    narrow = ours["connector.encoder.0.fc2.weight"]
    assert equal(narrow[:, :94], connector["connector.layers.0.mlp.fc2.weight"])
    assert narrow.shape == (32, 128) and not narrow[:, 94:].any()


def test_no_value_is_lost(tiny_deepgen):
    """Each released number is stored once; nothing but zeros is added."""
    total = {name: stored(tiny_deepgen, name) for name in ("vlm", "connector", "transformer", "vae")}
    theirs = [tensor for tensors in total.values() for tensor in tensors.values()]
    ours = [*read(tiny_deepgen).values()]
    sums = [sum(float(tensor.double().sum()) for tensor in tensors) for tensors in (ours, theirs)]
    counts = [sum(int(tensor.count_nonzero()) for tensor in tensors) for tensors in (ours, theirs)]
    assert sums[0] == pytest.approx(sums[1], rel=1e-12) and counts[0] == counts[1]


@pytest.mark.parametrize("old", [False, True])
def test_the_native_file_updates_what_lies_beside_it(deepgen_layouts, trained, old):
    base = stored(trained, "vlm_base")
    lora = deepgen_layouts.update(base, old)
    edit(trained, ".", lambda t: [t.pop(name) for name in [*t] if name.startswith("lmm.")] and t.update(lora))
    ours = read(trained)
    module = "lmm.model.layers.3.mlp.{}_proj.lora_{}.default.weight"
    module = module if old else module.replace("layers", "language_model.layers")
    parts = [
        base[f"model.layers.3.mlp.{x}_proj.weight"] + 2 * lora[module.format(x, "B")] @ lora[module.format(x, "A")]
        for x in ("gate", "up")
    ]
    assert torch.allclose(ours["llm.layers.3.gate_up.weight"], torch.cat(parts), rtol=0, atol=1e-6)
    a, b = (next(t for name, t in lora.items() if f"lora_embedding_{x}" in name) for x in "AB")
    assert torch.allclose(ours["embed.weight"], base["model.embed_tokens.weight"] + 2 * (b @ a).T, rtol=0, atol=1e-6)
    assert equal(ours["llm.norm.weight"], base["model.norm.weight"])


def test_a_torch_file_is_the_same_and_other_tensors_are_told(trained):
    expected = read(trained)
    tensors = load_file(trained / "model.safetensors")
    (trained / "model.safetensors").unlink()
    torch.save({"state_dict": tensors | {"ema.step": torch.zeros(1)}}, trained / "model.pt")
    with Released(trained) as released:
        assert released.ignored == ["ema.step"]
        found = tensors_of(released)
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


def test_an_update_is_added_in_float32_and_rounded_once(trained):
    with Released(trained) as released:
        (part,) = released.tensors["vision.blocks.1.down.weight"].parts
        merged = part.part
        weight = merged.weight.read().bfloat16()
        half = Merged(Constant(weight), merged.a, merged.b, merged.scale, transposed=False)
        exact = weight.float() + 2 * merged.b.read() @ merged.a.read()
        assert half.read().dtype == torch.bfloat16 and torch.equal(half.read(), exact.bfloat16())


class Constant:
    name = "constant"

    def __init__(self, values: torch.Tensor) -> None:
        self.values, self.dtype, self.shape = values, values.dtype, tuple(values.shape)

    def read(self) -> torch.Tensor:
        return self.values


def test_a_picture_finds_its_own_middle_in_the_middle_that_is_kept():
    for side in (384, 24, 129, 130, 131):
        kept = kept_rows(side)
        rows = torch.arange(side * side).view(1, -1, 1)
        table = Centre(Shaped(Constant(rows), (side, side, 1)), (kept, kept, 1)).read()
        assert kept == side or 127 <= kept <= 128
        for grid in (1, 16, 23, min(side, 126)):
            whole, middle = (side - grid) // 2, (kept - grid) // 2
            expected = rows.view(side, side, 1)[whole : whole + grid, whole : whole + grid]
            assert torch.equal(table[middle : middle + grid, middle : middle + grid], expected)


def closed_form(row: int, column: int, scale: float, width: int) -> list[float]:
    """Position of a place of the table: `scale` is its side by the side that the waves were made for."""
    waves = [10000 ** (-i / (width // 4)) for i in range(width // 4)]
    halves = ((wave, at / scale * w) for at in (column, row) for wave in (math.sin, math.cos) for w in waves)
    return [wave(angle) for wave, angle in halves]


@pytest.mark.parametrize("told", [None, {"pos_embed_max_size": 24, "sample_size": 16}])
def test_positions_that_were_not_saved_are_made(tiny_deepgen, copy, told):
    """By the transformer's own config, or else as the released ones: 384 rows for waves of 64, the middle 128 kept."""
    edit(copy, "transformer", lambda t: t.pop("pos_embed.pos_embed"))
    if told:
        (copy / "transformer" / "config.json").write_text(json.dumps(told), encoding="utf-8")
    side, base, kept = (24, 8, 24) if told else (384, 64, 128)
    found, first = read(copy), (side - kept) // 2
    table = found["dit.pos_table"]
    assert table.shape == (kept, kept, 64) and table.dtype == torch.float32
    for row, column in ((0, 0), (3, 11), (kept - 1, 5)):
        expected = torch.tensor(closed_form(first + row, first + column, side / base, 64))
        assert torch.allclose(table[row, column], expected, rtol=0, atol=1e-6)
    others = read(tiny_deepgen)
    assert found.keys() == others.keys()
    assert all(torch.equal(found[name], others[name]) for name in found if name != "dit.pos_table")


def test_positions_that_cannot_be_made_are_refused(copy):
    edit(copy, "transformer", lambda t: t.pop("pos_embed.pos_embed"))
    config = copy / "transformer" / "config.json"
    for told, said in (
        ({"pos_embed_max_size": 10**6}, "dit.table is 1000000"),
        ({"sample_size": "64"}, "dit.table is '64'"),
        ({"sample_size": 1}, "transformer.pos_embed.pos_embed is missing, and cannot be made of"),
    ):
        config.write_text(json.dumps(told), encoding="utf-8")
        refused(copy, said)


def test_a_converted_folder_loads_and_says_what_it_is(tiny_deepgen, tmp_path):
    dst = convert(tiny_deepgen, tmp_path / "out")  # which sees what it is
    family, config = families.read(dst)
    assert family.name == "deepgen" and config.connector.taps == 3 and manifest.verify(dst)
    model = weights.prepared(partial(families.model("deepgen").build, config), NONE)
    weights.load(model, dst, "cpu", torch.float32)
    expected = read(tiny_deepgen)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
    assert hub.resolve(tiny_deepgen).parent.name == "models"
    told = checkpoint_info(tiny_deepgen)
    assert (told["family"], told["layout"], told["resolution"]) == ("deepgen", "released", 512)


def test_the_language_model_without_its_update_is_refused(copy, trained):
    shutil.rmtree(copy / "vlm")
    refused(copy, "vlm holds no safetensors", "merged", "no other Qwen2.5-VL will do", error=ModelMissingError)
    (trained / "vlm_base").rename(trained / "vlm")
    refused(trained, "vlm_base", "Qwen2.5-VL-3B-Instruct", error=ModelMissingError)
    (trained / "vlm").rename(trained / "Qwen2.5-VL-3B-Instruct")
    assert is_released(trained) and len(read(trained)) > 300
    edit(trained, ".", lambda t: [t.pop(name) for name in [*t] if name.startswith("lmm.")])
    refused(trained, "lmm.model.embed_tokens.lora_embedding_A.default", "missing", "...")
    shutil.rmtree(trained / "vae")
    refused(trained, "vae holds no safetensors", error=ModelMissingError)
    assert not is_released(trained / "connector")


def test_one_error_lists_all_missing_unexpected_and_misshapen(copy):
    edit(copy, "transformer", lambda t: (t.pop("transformer_blocks.1.attn2.to_q.bias", 0), t.pop("proj_out.bias")))
    edit(copy, "vlm", lambda t: t.update({"model.layers.6.mlp.up_proj.weight": t.pop("visual.blocks.1.norm2.weight")}))
    edit(copy, "connector", lambda t: t.update({"surprise": torch.zeros(1)}))
    refused(copy, "2 missing", "transformer.proj_out.bias", "vlm.visual.blocks.1.norm2.weight")
    refused(copy, "2 unexpected", "vlm.model.layers.6.mlp.up_proj.weight", "connector.surprise")


def test_misshapen_and_integer_tensors(copy):
    edit(copy, "connector", lambda t: t.update({"projector_2.bias": torch.zeros(35)}))
    refused(copy, "1 misshapen: connector.projector_2.bias [35], not [36]")
    edit(copy, "connector", lambda t: t.update({"projector_2.bias": torch.zeros(36, dtype=torch.int64)}))
    refused(copy, "connector.projector_2.bias", "not floating")
    edit(copy, "transformer", lambda t: t.update({"pos_embed.pos_embed": torch.zeros(1, 575, 64)}))
    refused(copy, "[1, 575, 64], which is not that of a square")


def test_an_update_that_does_not_fit(trained):
    name = "lmm.model.visual.blocks.0.attn.qkv.lora_{}.default.weight"
    edit(trained, ".", lambda t: t.update({name.format("A"): torch.zeros(3, 32)}))
    refused(trained, "vlm.visual.blocks.0.attn.qkv.weight is [96, 32]", "does not fit")
    edit(trained, ".", lambda t: (t.pop(name.format("A")), t.update({"lmm.model.visual.pos.weight": torch.zeros(2)})))
    refused(trained, "1 missing: lmm.visual.blocks.0.attn.qkv.lora_A", "1 unexpected: lmm.visual.pos.weight")


def test_spellings_of_other_versions(copy):
    expected = read(copy)

    def newer(tensors):
        for name in [*tensors]:
            visual = name.startswith("visual.")
            tensors[f"model.{name}" if visual else name.replace("model.", "model.language_model.")] = tensors.pop(name)
        tensors["lm_head.weight"] = torch.zeros(2)

    edit(copy, "vlm", newer)
    for prefix in ("", "connector.connector."):
        edit(copy, "connector", partial(_rename_layers, prefix))
        found = read(copy)
        assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
    edit(copy, "connector", lambda t: t.update({"connector.meta_queries": t["meta_queries"] + 1}))
    refused(copy, "1 stored twice: connector.meta_queries")


def _rename_layers(prefix: str, tensors: dict[str, torch.Tensor]) -> None:
    for name in [name for name in tensors if "layers" in name]:
        tensors[prefix + name[name.index("layers") :]] = tensors.pop(name)


def test_the_tokenizer_is_made_of_what_is_there(tiny_deepgen, copy):
    folder = copy / "tokenizer"
    text, ids = read_tokenizer(folder)
    made = Tokenizer.from_str(text)
    assert made.encode("<|im_start|>user\né a<|im_end|>").tokens[:2] == ["<|im_start|>", "u"]
    assert made.encode("e\u0301").ids == made.encode("é").ids and made.decode(made.encode("é 狐 a").ids) == "é 狐 a"
    assert ids["image_token"] == 262 and made.encode("x a").ids[-1] == 256
    (folder / "tokenizer.json").write_text(text, encoding="utf-8")
    assert read_tokenizer(folder) == (text, ids)
    shutil.rmtree(folder)
    (copy / "vlm" / "tokenizer.json").write_text(text, encoding="utf-8")
    assert read(copy).keys() == read(tiny_deepgen).keys()


def test_broken_small_files(copy):
    config, tokenizer = copy / "vlm" / "config.json", copy / "tokenizer"
    good = config.read_text("utf-8")
    for broken in ("", "[]", "{", "[" * 100_000, good.replace('layers": 6', 'layers": 1000000000'), "\xff"):
        config.write_bytes(broken.encode("latin1"))
        refused(copy)
    for change, said in (
        ({"rope_scaling": None}, "mrope is None"),
        ({"rope_scaling": {"mrope_section": [2, 3, 4]}}, "not twice the sum of mrope"),
        ({"num_key_value_heads": 3}, "llm.kv_heads"),
        ({"vision_config": {"depth": 2, "num_heads": 3}}, "vision.heads x 4"),
        ({"vision_config": {"depth": 2, "num_heads": 2}}, "vision.full"),
        ({"vision_config": [1]}, "do not fit together"),
        ({"image_token_id": 5}, "image_token is 5 for the language model and 262 for the tokenizer"),
    ):
        config.write_text(good, encoding="utf-8")
        edit_json(config, **change)
        refused(copy, said)
    config.write_text(good, encoding="utf-8")
    edit_json(copy / "vae" / "config.json", shift_factor=None)
    refused(copy, "vae_shift is None")
    edit_json(copy / "vae" / "config.json", shift_factor=0.0609, block_out_channels=[8, 12, 16, 16])
    refused(copy, "[8, 12, 16, 16], which are not multiples of the first")
    edit_json(copy / "vae" / "config.json", block_out_channels=[8, 8, 16, 16])
    edit_json(copy / "scheduler" / "scheduler_config.json", use_dynamic_shifting=True)
    refused(copy, "use_dynamic_shifting True")
    shutil.rmtree(copy / "scheduler")
    (copy / "prompt_template.json").write_text('{"GENERATION": "Draw: {input}"}', encoding="utf-8")
    refused(copy, "GENERATION of prompt_template.json is 'Draw: {input}'")
    (copy / "prompt_template.json").unlink()
    with Released(copy) as released:
        assert released.config.shift == 3.0
    (copy / "connector" / "config.json").unlink()
    refused(copy, "connector.heads is 0")  # 32 channels are not those of a head of 64
    edit_json(tokenizer / "vocab.json", **{"<|im_end|>": 3})
    refused(copy, "the vocabulary leaves it")
    (tokenizer / "vocab.json").unlink()
    refused(copy, "vlm holds neither tokenizer.json nor vocab.json", error=ModelMissingError)
    (tokenizer / "tokenizer.json").write_text('{"model": 3}', encoding="utf-8")
    refused(copy, "holds no tokenizer")


def test_damaged_files_are_told(copy, trained):
    path = copy / "transformer" / "model.safetensors"
    data = path.read_bytes()
    for damaged in (b"", data[:-9], data[:5], b"\xff" * 16 + data[16:]):
        path.write_bytes(damaged)
        refused(copy, "not a whole safetensors file")
    path.write_bytes(data)
    shutil.copy(path, path.with_name("again.safetensors"))
    refused(copy, "is in two files")
    (trained / "model.safetensors").unlink()
    (trained / "model.pt").write_bytes(b"\x80\x02}q\x00.")
    refused(trained, "bare pickle")


def linked(folder: Path, *names: str) -> Path:
    """A folder of links to the recorded runs' weights."""
    folder.mkdir()
    for name in names:
        (folder / name).symlink_to(GOLDENS / "weights" / name)
    (folder / "tokenizer").symlink_to(GOLDENS / "tokenizer")
    return folder


@recorded
def test_both_layouts_of_the_recorded_weights_are_equal(tmp_path):
    whole = linked(tmp_path / "whole", "transformer", "vae", "vlm", "connector", "scheduler", "prompt_template.json")
    parts = linked(tmp_path / "parts", "vae", "vlm_base", "scheduler")
    (parts / "model.safetensors").symlink_to(GOLDENS / "weights" / "native" / "model.safetensors")
    (parts / "connector").mkdir()
    (parts / "connector" / "config.json").symlink_to(GOLDENS / "weights" / "connector" / "config.json")
    found, expected = read(parts), read(whole)
    assert found.keys() == expected.keys() and len(found) == 638
    for name, tensor in expected.items():
        assert (found[name] - tensor).abs().max() <= 1e-6 * tensor.abs().max(), name


@recorded
def test_the_recorded_positions_are_those_that_would_be_made(tmp_path):
    whole = linked(tmp_path / "whole", "vae", "vlm", "connector", "scheduler")
    shutil.copytree(GOLDENS / "weights" / "transformer", whole / "transformer")
    recorded_table = read(whole)["dit.pos_table"]
    (path,) = (whole / "transformer").glob("*.safetensors")
    tensors = load_file(path)
    del tensors["pos_embed.pos_embed"]
    save_file(tensors, path)
    assert torch.allclose(read(whole)["dit.pos_table"], recorded_table, rtol=0, atol=1e-6)


@recorded
def test_the_recorded_tokenizer(tmp_path):
    settings = json.loads((GOLDENS / "settings.json").read_text("utf-8"))
    whole = json.loads((GOLDENS / "tokenizer" / "tokenizer.json").read_text("utf-8"))["model"]
    shutil.copy(GOLDENS / "tokenizer" / "tokenizer_config.json", tmp_path / "tokenizer_config.json")
    (tmp_path / "vocab.json").write_text(json.dumps(whole["vocab"]), encoding="utf-8")
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in whole["merges"]]
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
    for folder in (GOLDENS / "tokenizer", tmp_path):
        text, ids = read_tokenizer(folder)
        assert ids["image_token"] == settings["special_token_ids"]["<|image_pad|>"]
        for check in settings["tokenizer_checks"]:
            assert Tokenizer.from_str(text).encode(check["text"]).ids == check["ids"]
