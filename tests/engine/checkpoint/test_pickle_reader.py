"""Well-formed checkpoints are read as torch reads them; broken ones raise one typed error, quickly."""

import random
import struct
import time
import zipfile

import pytest
import torch
from unipic_run.engine.checkpoint import pickle_machine
from unipic_run.engine.checkpoint.pickle_reader import TorchCheckpoint
from unipic_run.engine.errors import CorruptWeightsError, ModelMissingError, UnipicError


def read_all(path):
    with TorchCheckpoint(path) as checkpoint:
        return {name: checkpoint.read(record) for name, record in checkpoint.records.items()}


def refused(path, match=None):
    with pytest.raises(CorruptWeightsError, match=match):
        read_all(path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "kl16.ckpt"])
def test_reads_what_torch_reads(tiny, name):
    ours, theirs = read_all(tiny / name), torch.load(tiny / name, weights_only=True)
    theirs = theirs.get("model", theirs)
    assert list(ours) == list(theirs)
    for key, tensor in theirs.items():
        assert ours[key].dtype == tensor.dtype and torch.equal(ours[key], tensor), key


@pytest.mark.parametrize("protocol", [2, 3, 4])
@pytest.mark.parametrize("wrapper", [None, "model", "state_dict"])
def test_views_types_parameters_and_metadata(tmp_path, protocol, wrapper):
    base = torch.arange(24.0).reshape(4, 6)
    module = torch.nn.Linear(3, 2).to(torch.bfloat16)
    state = module.state_dict()  # an OrderedDict with a `_metadata` attribute
    state.update(transposed=base.t(), column=base[:, 2:4], empty=torch.zeros(0, 3), scalar=torch.tensor(3.0))
    state.update(parameter=torch.nn.Parameter(base), tied=base, flags=torch.tensor([True, False]))
    for dtype in (torch.float64, torch.float16, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8):
        state[str(dtype)] = torch.arange(5).to(dtype)
    path = tmp_path / "any.name"
    torch.save({wrapper: state, "epoch": 3} if wrapper else state, path, pickle_protocol=protocol)
    ours = read_all(path)
    assert list(ours) == list(state)
    for name, tensor in state.items():
        assert ours[name].dtype == tensor.dtype and torch.equal(ours[name], tensor.detach()), name
        assert ours[name].is_contiguous()


def test_other_formats_are_named(tmp_path, tiny):
    from safetensors.torch import save_file

    path = tmp_path / "pytorch_model.bin"
    save_file({"a": torch.zeros(2)}, path)
    refused(path, "safetensors")
    torch.save({"a": torch.zeros(2)}, path, _use_new_zipfile_serialization=False)
    refused(path, "before 1.6")
    for head, word in {
        b"7z\xbc\xaf\x27\x1c": "7z",
        b"\x1f\x8b": "gzip",
        b"GGUF": "GGUF",
        b"version https://git-lfs.github.com/spec/v1\n": "Git LFS",
        b"<!DOCTYPE html>": "web page",
        b"": "empty",
        b"\x00" * 64: "no known format",
    }.items():
        path.write_bytes(head)
        refused(path, word)
    with pytest.raises(ModelMissingError):
        TorchCheckpoint(tmp_path / "absent.bin")


def test_storages_must_lie_inside_the_file(pk, torch_zip):
    for what, tensor in {
        "past the end": pk.tensor(shape=(3,)),
        "offset past the end": pk.tensor(offset=1),
        "stride past the end": pk.tensor(strides=(2,)),
        "negative stride": pk.tensor(strides=(-1,)),
        "negative size": pk.tensor(shape=(-2,)),
        "negative offset": pk.tensor(offset=-1),
        "huge size": pk.tensor(shape=(2**62,)),
        "sizes whose product overflows": pk.tensor(shape=(2**40, 2**40), strides=(0, 0)),
        "expanded view": pk.tensor(shape=(2**30,), strides=(0,)),
        "nine dimensions": pk.tensor(shape=(1,) * 9, strides=(1,) * 9),
        "more strides than sizes": pk.tensor(strides=(1, 1)),
        "storage length that lies": pk.tensor(numel=4),
        "negative storage length": pk.tensor(numel=-2),
        "storage that is not there": pk.tensor(key="7"),
        "storage key that climbs": pk.tensor(key="../data.pkl"),
        "another element size": pk.tensor(kind="DoubleStorage"),
    }.items():
        with pytest.raises(CorruptWeightsError):
            read_all(torch_zip(pk.dict(w=tensor), {"0": bytes(8)}))
            pytest.fail(f"{what} was read")
    assert read_all(torch_zip(pk.dict(w=pk.tensor()), {"0": bytes(8)}))["w"].shape == (2,)


def test_containers_that_torch_would_not_write(pk, torch_zip):
    good = pk.dict(w=pk.tensor())
    storages = {"0": bytes(8)}
    refused(torch_zip(good, storages, method=zipfile.ZIP_DEFLATED), "compressed")
    refused(torch_zip(good, storages, {"x/byteorder": b"big"}), "big-endian")
    refused(torch_zip(good, storages, {"y/data.pkl": good}), "data.pkl")
    refused(torch_zip(good, storages, {"x/" + "n" * 2000: b""}), "damaged")
    path = torch_zip(good, storages)
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("x/data/0", bytes(8))
    refused(path, "twice")
    path = torch_zip(good, storages)
    path.write_bytes(path.read_bytes() + b"trailing")
    refused(path, "end with a zip directory")
    path = torch_zip(b"\x80\x02].")  # a list
    refused(path, "list")
    refused(torch_zip(pk.dict(w=pk.text("no tensor"))), "not a named tensor")


def test_overlapping_and_misplaced_entries(pk, torch_zip):
    """Directory records are rewritten by hand: field 16 is the place of the entry, fields 8 and 9 its length."""
    good = torch_zip(pk.dict(w=pk.tensor()), {"0": bytes(8), "1": bytes(8)}).read_bytes()
    first = good.index(b"PK\x01\x02")
    second = good.index(b"PK\x01\x02", first + 1)
    path = torch_zip(b"")

    def patched(at: int, form: str, *values: int) -> None:
        changed = bytearray(good)
        struct.pack_into(form, changed, at, *values)
        path.write_bytes(changed)

    patched(first + 20, "<LL", 200, 200)
    refused(path, "overlap")
    patched(first + 20, "<LL", 2**31, 2**31)
    refused(path, "past the last data byte")
    patched(second + 42, "<L", 0)
    refused(path, "named differently")
    patched(second + 42, "<L", 5)
    refused(path, "no header")
    patched(second + 42, "<L", 2**32 - 1)  # says: see the zip64 field, which is not there
    refused(path, "64-bit")
    end = good.index(b"PK\x05\x06")
    patched(end + 8, "<HH", 3, 3)
    refused(path)
    patched(end + 16, "<L", 2**31)
    refused(path)
    path.write_bytes(good)
    assert list(read_all(path)) == ["w"]


def test_zip64_directories_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 100)
    monkeypatch.setattr(zipfile, "ZIP_FILECOUNT_LIMIT", 1)
    source, path = tmp_path / "source.bin", tmp_path / "zip64.bin"
    torch.save({"w": torch.arange(100.0)}, source)
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(path, "w") as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    assert b"PK\x06\x06" in path.read_bytes()
    assert torch.equal(read_all(path)["w"], torch.arange(100.0))


def test_bombs_end_quickly(pk, torch_zip):
    deep = b")" + b"\x85" * 300_000  # a tuple in a tuple in a tuple ...
    doubling = b"]" + b"".join(b"q\x01]h\x01ah\x01a" for _ in range(60))  # 2^60 leaves if anybody walked it
    for what, pickle in {
        "too many opcodes": b"\x80\x02" + b"N" * (pickle_machine.MAX_OPCODES + 1) + b".",
        "too large": bytes(pickle_machine.MAX_PICKLE + 1),
        "deep value": pk.dict(w=deep),
        "deep key": b"\x80\x02}(" + deep + pk.text("x") + b"u.",
        "doubling list": pk.dict(w=doubling),
        "huge integer": pk.dict(w=b"\x8b" + (2**20).to_bytes(4, "little") + b"\x7f" * 2**20),
        "long decimal": pk.dict(w=b"L" + b"9" * 100_000 + b"L\n"),
        "announced length": pk.dict(w=b"\x8d" + (2**60).to_bytes(8, "little")),
        "dict in itself": b"\x80\x02}q\x01" + pk.text("model") + b"h\x01s.",
        "no stop": b"\x80\x02}",
        "empty": b"",
        "stack underflow": b"\x80\x02u.",
        "unknown memo": b"\x80\x02h\x05.",
    }.items():
        start = time.process_time()
        with pytest.raises(CorruptWeightsError):
            read_all(torch_zip(pickle))
            pytest.fail(f"{what} was read")
        assert time.process_time() - start < 3, what


def test_truncation_anywhere_is_noticed(tiny, tmp_path):
    data = (tiny / "pytorch_model.bin").read_bytes()
    path = tmp_path / "cut.bin"
    points = [*range(0, 200, 7), *range(0, len(data), len(data) // 60), *range(len(data) - 200, len(data), 7)]
    for length in points:
        path.write_bytes(data[:length])
        refused(path)


def test_a_file_that_shrinks_after_opening_is_noticed(pk, torch_zip):
    n = 2**20  # larger than any read-ahead
    path = torch_zip(pk.dict(w=pk.tensor(shape=(n,), numel=n)), {"0": bytes(4 * n)})
    with TorchCheckpoint(path) as checkpoint:
        path.write_bytes(b"")
        with pytest.raises(CorruptWeightsError, match="ends inside"):
            checkpoint.read(checkpoint.records["w"])


def test_byte_flips_raise_typed_errors_or_nothing(tmp_path):
    """Seeded, so that a failure can be repeated."""
    path = tmp_path / "flipped.bin"
    torch.save({"w": torch.arange(6.0).reshape(2, 3), "b": torch.zeros(2, dtype=torch.bfloat16)}, path)
    good = path.read_bytes()
    rng = random.Random(0)
    outcomes = {"read": 0, "refused": 0}
    for _ in range(400):
        changed = bytearray(good)
        for _ in range(rng.choice((1, 1, 2, 8))):
            changed[rng.randrange(len(changed))] = rng.randrange(256)
        path.write_bytes(changed)
        try:
            read_all(path)
            outcomes["read"] += 1
        except UnipicError:
            outcomes["refused"] += 1
    assert min(outcomes.values()) > 30, outcomes
