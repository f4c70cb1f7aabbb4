"""A released checkpoint -> our folder: `config.json`, safetensors shards, `tokenizer.json`, `manifest.json`.

One pass, tensor by tensor, types kept. The shards are planned from shapes alone and their headers written first, so
memory holds one tensor part at a time; parts of a fused tensor simply follow each other in the file.
"""

import hashlib
import json
import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from .. import families
from ..errors import CorruptWeightsError, OutputError
from . import manifest
from .config_file import write_config_file
from .manifest import Progress

SHARD = 2 * 10**9  # bytes
SPARE = 16 * 2**20  # bytes of disk besides the tensors
FINITE_CHUNK = 2**22  # elements looked at at once

_NAMES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


@dataclass(frozen=True)
class Shard:
    """A safetensors file to be: its name and the tensors in it, in file order."""

    name: str
    tensors: tuple[str, ...]


def is_converted(folder: Path) -> bool:
    """Whether `folder` is in our format (it may still be damaged)."""
    return (folder / "config.json").is_file() and (folder / manifest.NAME).is_file()


def convert(
    src: Path,
    dst: Path,
    on_progress: Progress | None = None,
    family: str = "unipic",
    origin: dict[str, Any] | None = None,
) -> Path:
    """Convert the released folder `src` into the new folder `dst`; returns `dst`.

    If `dst` already is the conversion of `src`, it is kept. `origin` is added to what the manifest says of the source.
    Raises OutputError (exists, no space, not writable), ModelMissingError, CorruptWeightsError.
    """
    src, dst = Path(src), Path(dst).absolute()
    released = families.released(family)
    source = {**(origin or {}), "folder": str(src.resolve()), "files": fingerprint(released.files(src))}
    if _is_done(dst, source):
        return dst
    with manifest.locked(dst):
        if _is_done(dst, source):  # another process was faster
            return dst
        with released.Released(src) as checkpoint:
            total = sum(nbytes(tensor) for tensor in checkpoint.tensors.values())
            _check_space(dst.parent, total)
            with manifest.publishing(dst, source, on_progress) as folder:
                _write_small_files(folder, family, checkpoint)
                _write_shards(folder, checkpoint, total, on_progress)
    return dst


def fingerprint(paths: list[Path]) -> list[list[Any]]:
    """[name, bytes, modification time in nanoseconds] of each file: equal only if nobody touched them."""
    return [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in paths]


def cache_key(src: Path, family: str) -> str:
    """A name for the conversion of `src` as it is now: changes with its place, sizes and modification times."""
    state = [str(src.resolve()), fingerprint(families.released(family).files(src))]
    return hashlib.sha256(json.dumps(state).encode()).hexdigest()[:16]


def plan_shards(tensors: dict[str, Any], limit: int = SHARD) -> list[Shard]:
    """Tensors in file order, cut into shards of at most `limit` bytes (or one tensor)."""
    # Wide types first: with a header of 8 n bytes every tensor then starts at a multiple of its element size.
    order = sorted(tensors, key=lambda name: -tensors[name].dtype.itemsize)
    groups: list[list[str]] = []
    room = 0
    for name in order:
        size = nbytes(tensors[name])
        if not groups or size > room:
            groups.append([])
            room = limit
        groups[-1].append(name)
        room -= size
    if len(groups) == 1:
        return [Shard("model.safetensors", tuple(groups[0]))]
    return [Shard(f"model-{i:05}-of-{len(groups):05}.safetensors", tuple(group)) for i, group in enumerate(groups, 1)]


def nbytes(tensor: Any) -> int:
    return math.prod(tensor.shape) * tensor.dtype.itemsize


def _is_done(dst: Path, source: dict[str, Any]) -> bool:
    """Whether `dst` is the conversion of `source`. Raises OutputError if it is anything else."""
    if not dst.exists():
        return False
    if is_converted(dst) and manifest.check(dst)["source"] == source:
        return True
    raise OutputError(f"{dst} exists and is not the conversion of this checkpoint", "delete it or choose another name")


def _check_space(folder: Path, total: int) -> None:
    free = shutil.disk_usage(folder).free
    needed = total + total // 20 + SPARE
    if free < needed:
        raise OutputError(f"{folder} has {free / 1e9:.1f} GB free, {needed / 1e9:.1f} GB are needed", "make room there")


def _write_small_files(folder: Path, family: str, checkpoint: Any) -> None:
    write_config_file(folder, family, checkpoint.config.to_json())
    (folder / "tokenizer.json").write_text(checkpoint.tokenizer, encoding="utf-8")


def _write_shards(folder: Path, checkpoint: Any, total: int, on_progress: Progress | None) -> None:
    shards = plan_shards(checkpoint.tensors)
    done = 0
    for shard in shards:
        with (folder / shard.name).open("xb") as file:
            file.write(_header(shard, checkpoint.tensors))
            for name in shard.tensors:
                _write_tensor(file, name, checkpoint.tensors[name])
                done += nbytes(checkpoint.tensors[name])
                if on_progress is not None:
                    on_progress("convert", done, total)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": {n: s.name for s in shards for n in s.tensors}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")


def _header(shard: Shard, tensors: dict[str, Any]) -> bytes:
    """A safetensors header: its length in 8 bytes, then JSON, padded with spaces to a multiple of 8."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name in shard.tensors:
        tensor = tensors[name]
        end = at + nbytes(tensor)
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _write_tensor(file: BinaryIO, name: str, tensor: Any) -> None:
    for checkpoint, record in tensor.parts:
        values = checkpoint.read(record).reshape(-1)
        if not all(torch.isfinite(chunk).all() for chunk in values.split(FINITE_CHUNK)):
            raise CorruptWeightsError(
                f"tensor {record.name} ({name}) holds NaN or Inf", "download the checkpoint again"
            )
        file.write(memoryview(values.view(torch.uint8).numpy()))
