"""Tensors of a torch zip checkpoint (`.bin`, `.ckpt`, `.pt`), without unpickling it.

The container is decided by its first bytes, never by its suffix. Tensors are read one at a time with plain file reads:
a memory map would count as ours in every memory report and would crash the process if the file shrank meanwhile.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch

from ..errors import CorruptWeightsError, ModelMissingError
from .pickle_machine import MAX_NAME, MAX_PICKLE, Described, read_pickle
from .zip_directory import stored_entries

WRAPPERS = ("model", "state_dict")  # keys under which training scripts nest the weights

_OTHER_FORMATS = {
    b"7z\xbc\xaf\x27\x1c": "a 7z archive",
    b"\x1f\x8b": "a gzip file",
    b"\x80": "a bare pickle in torch's format of before 1.6",
    b"GGUF": "a GGUF file",
    b"version https://git-lfs": "a Git LFS pointer, not the weights themselves",
    b"<": "a web page",
}


@dataclass(frozen=True)
class TensorRecord:
    """Where one tensor lies. `strides` count elements; bytes `offset .. offset + nbytes` of the file hold it."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int
    nbytes: int


class TorchCheckpoint:
    """An open checkpoint: `records` by name, and `read`. A context manager. Raises CorruptWeightsError."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file: BinaryIO = path.open("rb")
        except OSError as error:
            raise ModelMissingError(f"cannot read {path}: {error.strerror}", "check the path") from None
        try:
            _check_format(self._file)
            self.records = _records(self._file)
        except CorruptWeightsError as error:
            self._file.close()
            raise CorruptWeightsError(f"{path.name}: {error.what}", error.remedy) from None
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> "TorchCheckpoint":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        self._file.close()

    def read(self, record: TensorRecord) -> torch.Tensor:
        """The tensor, contiguous, in memory of its own."""
        data = torch.empty(record.nbytes, dtype=torch.uint8)
        self._file.seek(record.offset)
        if self._file.readinto(memoryview(data.numpy())) != record.nbytes:
            raise CorruptWeightsError(f"{self.path.name} ends inside tensor {record.name}", "download it again")
        # A byte other than 0 and 1 would not be a valid bool.
        values = data != 0 if record.dtype == torch.bool else data.view(record.dtype)
        if 0 in record.shape:
            return values.reshape(record.shape)
        return values.as_strided(record.shape, record.strides).contiguous()


def _check_format(file: BinaryIO) -> None:
    head = file.read(64)
    if head.startswith(b"PK\x03\x04"):
        return
    kind = next((kind for magic, kind in _OTHER_FORMATS.items() if head.startswith(magic)), "in no known format")
    if len(head) > 8 and head[8:9] == b"{":
        kind = "a safetensors file under another name"
    if not head:
        kind = "empty"
    raise CorruptWeightsError(
        f"the file is {kind}, not a torch zip file", "download it again, or save it again with torch 1.6 or later"
    )


def _records(file: BinaryIO) -> dict[str, TensorRecord]:
    entries = stored_entries(file)
    pickles = [name for name in entries if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise CorruptWeightsError(f"{len(pickles)} entries are named */data.pkl, not one", "download the file again")
    prefix = pickles[0].removesuffix("data.pkl")
    if _entry(file, entries, prefix + "byteorder", limit=16) not in (b"", b"little"):
        raise CorruptWeightsError("the tensors are big-endian", "save them again on a little-endian machine")
    top = read_pickle(_entry(file, entries, pickles[0], limit=MAX_PICKLE))
    described = next((top[key] for key in WRAPPERS if type(top.get(key)) is dict), top)
    records = {}
    for name, tensor in described.items():
        if type(name) is not str or len(name) > MAX_NAME or type(tensor) is not Described:
            raise CorruptWeightsError(f"{str(name)[:80]!r} is not a named tensor", "only dicts of tensors are read")
        records[name] = _located(name, tensor, entries.get(f"{prefix}data/{tensor.storage.key}"))
    return records


def _entry(file: BinaryIO, entries: dict[str, tuple[int, int]], name: str, limit: int) -> bytes:
    offset, nbytes = entries.get(name, (0, 0))
    if nbytes > limit:
        raise CorruptWeightsError(f"entry {name!r} has {nbytes} bytes, more than {limit}", "download the file again")
    file.seek(offset)
    return file.read(nbytes)


def _located(name: str, tensor: Described, entry: tuple[int, int] | None) -> TensorRecord:
    """The record of a tensor, once it is certain that it lies inside its storage and its storage inside the file."""
    if entry is None:
        raise CorruptWeightsError(f"tensor {name}: storage {tensor.storage.key[:80]!r} is missing", "download it again")
    dtype = getattr(torch, tensor.storage.dtype)
    numel = math.prod(tensor.shape)
    span = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.strides, strict=True)) if numel else 0
    if tensor.storage.numel * dtype.itemsize != entry[1]:
        raise CorruptWeightsError(
            f"tensor {name}: its storage has {entry[1]} bytes, not {tensor.storage.numel} x {dtype.itemsize}",
            "download the file again",
        )
    # The second bound stops an expanded view (stride 0) from becoming far larger in memory than in the file.
    if tensor.offset + span > tensor.storage.numel or numel > tensor.storage.numel:
        raise CorruptWeightsError(f"tensor {name} reaches beyond its storage", "download the file again")
    start = entry[0] + tensor.offset * dtype.itemsize
    return TensorRecord(name, dtype, tensor.shape, tensor.strides, start, span * dtype.itemsize)
