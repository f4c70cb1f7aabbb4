"""Loading: every parameter from the file or one error that says all; values must be finite."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from unipic_run.engine import weights
from unipic_run.engine.checkpoint import manifest
from unipic_run.engine.errors import CorruptWeightsError, ModelMissingError, UsageError
from unipic_run.engine.meter import Meter
from unipic_run.quant.int8 import FORMAT, quantise_weight
from unipic_run.quant.recipe import NONE, Recipe
from unipic_run.quant.swap import swap


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(3, 2)
        self.b = nn.LayerNorm(2)
        self.register_buffer("count", torch.zeros(2, dtype=torch.int64))


GOOD = {
    "a.weight": torch.arange(6.0).reshape(2, 3),
    "a.bias": torch.tensor([0.5, -0.5]),
    "b.weight": torch.ones(2),
    "b.bias": torch.zeros(2),
    "count": torch.tensor([3, 4]),
}


def on_meta():
    with torch.device("meta"):
        return Small()


def folder_of(tmp_path: Path, *shards: dict[str, torch.Tensor]) -> Path:
    dst = tmp_path / f"made{len([*tmp_path.iterdir()])}"
    with manifest.publishing(dst, {}) as folder:
        for i, shard in enumerate(shards):
            save_file(shard, folder / f"model-{i}.safetensors")
    return dst


def refused(folder, *words, dtype=torch.float32):
    module = on_meta()
    with pytest.raises(CorruptWeightsError) as caught:
        weights.load(module, folder, "cpu", dtype)
    for word in words:
        assert word in str(caught.value), caught.value
    assert all(p.is_meta for p in module.parameters())  # nothing was assigned


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
def test_values_arrive_in_the_type_asked_for(tmp_path, dtype, stored):
    tensors = {n: t.to(stored) if t.is_floating_point() else t for n, t in GOOD.items()}
    names = list(tensors)
    folder = folder_of(tmp_path, {n: tensors[n] for n in names[:2]}, {n: tensors[n] for n in names[2:]})
    module, seen = on_meta(), []
    weights.load(module, folder, "cpu", dtype, lambda what, done, total: seen.append((what, done / total)))
    for name, tensor in module.state_dict().items():
        expected = GOOD[name].to(dtype) if GOOD[name].is_floating_point() else GOOD[name]
        assert tensor.dtype == expected.dtype and torch.equal(tensor, expected), name
    assert not any(p.requires_grad for p in module.parameters())
    assert seen[-1] == ("load", 1.0) and len(seen) == len(GOOD)


def test_one_error_lists_everything(tmp_path):
    bad = {n: t for n, t in GOOD.items() if n not in ("a.bias", "b.bias")}
    bad |= {"extra.weight": torch.zeros(1), "a.weight": torch.zeros(3, 2)}
    folder = folder_of(tmp_path, bad)
    refused(
        folder, "2 missing: a.bias, b.bias", "1 unexpected: extra.weight", "1 misshapen: a.weight [3, 2], not [2, 3]"
    )


def test_a_tensor_in_two_files(tmp_path):
    refused(folder_of(tmp_path, GOOD, {"b.bias": torch.zeros(2)}), "b.bias is in two files")


def test_the_remedy_is_what_works_for_this_folder(tmp_path, monkeypatch):
    """In the cache a pull of what it was made from repairs it; elsewhere only a new conversion does."""
    monkeypatch.setenv("UNIPIC_RUN_CACHE", str(tmp_path / "cache"))
    bad = {**GOOD, "a.bias": torch.tensor([0.0, float("nan")])}
    refused(folder_of(tmp_path, bad), "convert it again")
    hub = {"hub": {"repo": "org/name", "commit": "c" * 40}, "folder": "/hub/snapshot"}
    for i, (source, what) in enumerate(
        [({"folder": "/my models/x"}, "'/my models/x'"), (hub, "org/name --revision ccc")]
    ):
        with manifest.publishing(tmp_path / "cache" / "models" / f"m{i}", source) as folder:
            save_file(bad, folder / "model.safetensors")
        refused(tmp_path / "cache" / "models" / f"m{i}", "NaN", f"`unipic-run pull {what}")


def test_integers_are_no_floats(tmp_path):
    refused(folder_of(tmp_path, {**GOOD, "a.bias": torch.zeros(2, dtype=torch.int64)}), "a.bias is torch.int64")
    refused(folder_of(tmp_path, {**GOOD, "count": torch.zeros(2)}), "count is torch.float32")


def test_nan_infinity_and_overflow(tmp_path):
    for value in (float("nan"), float("inf")):
        refused(folder_of(tmp_path, {**GOOD, "a.bias": torch.tensor([0.0, value])}), "a.bias holds NaN or Inf", "again")
    large = folder_of(tmp_path, {**GOOD, "a.bias": torch.tensor([0.0, 1e6])})
    refused(large, "do not fit torch.float16", dtype=torch.float16)
    weights.load(on_meta(), large, "cpu", torch.bfloat16)


def test_hostile_files(tmp_path):
    def header(entries: object, data: bytes = bytes(8)) -> bytes:
        text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
        return len(text).to_bytes(8, "little") + text + data

    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    whole = folder_of(tmp_path, GOOD)
    good = (whole / "model-0.safetensors").read_bytes()
    for i, data in enumerate(
        [
            b"",
            b"\x00" * 4,
            (2**63).to_bytes(8, "little"),
            (10**8 + 1).to_bytes(8, "little") + b"{}",
            header(b"{"),
            header(b"[]"),
            header(b"\xff\xfe"),
            header(b"[" * 50_000),
            header({"a": {**entry, "data_offsets": [0, 2**60]}}),
            header({"a": {**entry, "data_offsets": [8, 0]}}),
            header({"a": {**entry, "shape": [2**62, 2**62]}}),
            header({"a": {**entry, "shape": [-1]}}),
            header({"a": {**entry, "dtype": "EVIL"}}),
            header({"a": entry, "b": entry}),
            header({"a": {**entry, "data_offsets": [4, 12]}}, bytes(12)),
            good[:-1],
            good + b"more",
            b"PK\x03\x04" + bytes(100),
            b"\x80\x02}q\x00.",
        ]
    ):
        dst = tmp_path / f"hostile{i}"
        with manifest.publishing(dst, {}) as folder:
            (folder / "model.safetensors").write_bytes(data)
        refused(dst)


def test_folders_without_manifest_or_weights(tmp_path):
    with pytest.raises(ModelMissingError, match=r"manifest\.json"):
        weights.load(on_meta(), tmp_path, "cpu", torch.float32)
    with pytest.raises(ModelMissingError, match="no safetensors"):
        weights.load(on_meta(), folder_of(tmp_path), "cpu", torch.float32)
    folder = folder_of(tmp_path, GOOD)
    (folder / "model-0.safetensors").write_bytes(b"short")
    refused(folder, "has 5 bytes")


class Layers(nn.Module):
    """As many linear layers as a memory test needs; the first may be quantised, or all of them."""

    def __init__(self, count: int = 2, width: int = 32):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(count))


INT8 = Recipe("int8", ("layers.*",))


def stored_layers(tmp_path: Path, count: int = 2, width: int = 32, **metadata: str) -> Path:
    noise = torch.Generator().manual_seed(0)
    shapes = {f"layers.{i}.{kind}": (width,) * n for i in range(count) for kind, n in (("weight", 2), ("bias", 1))}
    dst = tmp_path / f"made{len([*tmp_path.iterdir()])}"
    with manifest.publishing(dst, {}) as folder:
        for shard in range(2):  # every second tensor
            tensors = {name: torch.randn(shapes[name], generator=noise) for name in [*shapes][shard::2]}
            save_file(tensors, folder / f"model-{shard}.safetensors", metadata or None)
    return dst


def assembled(folder: Path, recipe: Recipe, dtype: torch.dtype = torch.float32, **size: int) -> nn.Module:
    model = weights.prepared(lambda: Layers(**size), recipe)
    weights.load(model, folder, "cpu", dtype, recipe=recipe)
    return model


def test_a_float_checkpoint_is_quantised_as_it_streams_by(tmp_path):
    folder = stored_layers(tmp_path)
    plain, half = assembled(folder, NONE), assembled(folder, INT8, torch.bfloat16)
    for layer, quantised in zip(plain.layers, half.layers, strict=True):
        whole, scale = quantise_weight(layer.weight)  # from float32, whatever the model's type is
        assert torch.equal(quantised.weight, whole) and torch.equal(quantised.scale, scale)
        assert quantised.bias.dtype == torch.bfloat16


def test_quantising_needs_the_quantised_model_and_one_tensor(tmp_path):
    size = {"count": 24, "width": 128}
    folder = stored_layers(tmp_path, **size)
    with torch.device("meta"):
        model = Layers(**size)
    swap(model, INT8)
    with torch.inference_mode(), Meter() as meter:
        weights.load(model, folder, "cpu", torch.float32, recipe=INT8)
    made, one = sum(tensor.nbytes for tensor in model.state_dict().values()), 4 * 128 * 128
    assert made < meter.peak < made + 6 * one < 24 * one / 1.5


def test_a_scheme_that_the_files_do_not_have_is_refused(tmp_path):
    folder = stored_layers(tmp_path, quant="int8", quant_format=str(FORMAT))
    assert weights.stored_scheme(folder) == "int8"
    for recipe in (NONE, Recipe("nf4", ("layers.*",))):
        with pytest.raises(UsageError, match=f"stored in int8, which cannot become {recipe.scheme}: leave quant out"):
            weights.load(Layers(), folder, "cpu", torch.float32, recipe=recipe)
    with pytest.raises(CorruptWeightsError, match=r"2 missing: layers.0.scale, layers.1.scale"):
        assembled(folder, INT8)  # says int8, and is not


@pytest.mark.parametrize("metadata", [{"quant": "int5", "quant_format": "1"}, {"quant": "int8", "quant_format": "99"}])
def test_schemes_of_later_versions(tmp_path, metadata):
    with pytest.raises(CorruptWeightsError, match=f"{metadata['quant']}.*this version reads.*update unipic-run"):
        weights.stored_scheme(stored_layers(tmp_path, **metadata))


def test_files_of_two_schemes(tmp_path):
    folder = stored_layers(tmp_path)
    other = stored_layers(tmp_path, quant="int8", quant_format=str(FORMAT))
    shutil.copy(other / "model-1.safetensors", folder)
    (folder / "manifest.json").unlink()
    manifest.write(folder, {})
    with pytest.raises(CorruptWeightsError, match=r"mixes schemes .*model-1.safetensors.*int8"):
        weights.stored_scheme(folder)


def test_int8_weights_are_int8(tmp_path):
    """Numbers of another type would lose their upper bits in silence; a scale of NaN would spread."""
    whole = torch.zeros(32, 32, dtype=torch.int8)
    good = {"weight": whole, "scale": torch.ones(32), "bias": torch.zeros(32)}
    for bad, message in (
        ({"weight": whole.short()}, "int16, which is no torch.int8"),
        ({"weight": whole.float()}, "float32, which is no torch.int8"),
        ({"scale": torch.full((32,), float("nan"))}, "layers.0.scale holds NaN"),
    ):
        dst = tmp_path / f"made{len([*tmp_path.iterdir()])}"
        with manifest.publishing(dst, {}) as folder:
            tensors = {f"layers.0.{name}": tensor for name, tensor in (good | bad).items()}
            save_file(tensors, folder / "model.safetensors", {"quant": "int8", "quant_format": str(FORMAT)})
        with pytest.raises(CorruptWeightsError, match=message):
            assembled(dst, INT8, count=1)
