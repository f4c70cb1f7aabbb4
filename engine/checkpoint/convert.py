"""A released checkpoint -> our folder: `config.json`, safetensors shards, `tokenizer.json`, `manifest.json`.

One pass, tensor by tensor, types kept. The shards are planned from shapes alone and their headers written first, so
memory holds one tensor part at a time; parts of a fused tensor simply follow each other in the file, in the widest of
their types.
"""

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import torch

from .. import families
from ..errors import CorruptWeightsError, ModelMissingError, OutputError
from . import manifest
from .config_file import write_config_file
from .differences import SHOWN
from .manifest import Progress

SHARD = 2 * 10**9  # bytes
SPARE = 16 * 2**20  # bytes of disk besides the tensors
FINITE_CHUNK = 2**22  # elements looked at at once

Check = Callable[[Path], dict[str, Any]]  # a folder's manifest, or an error: manifest.check or manifest.verify

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
    replace: Check | None = None,
) -> Path:
    """Convert the released folder `src` into the new folder `dst`; returns `dst`.

    If `dst` is the conversion of `src` already, every file of it is verified and it is kept; anything else that is
    there is an error. With `replace`, a `dst` that this check refuses, or that was made of something else, stays
    visible until the new folder takes its place. `origin` is added to what the manifest says of the source.
    Raises OutputError (exists, damaged, no space, not writable), ModelMissingError, CorruptWeightsError.
    """
    src, dst = Path(src), Path(dst).absolute()
    released = families.released(family)
    source = state(src, family)
    if replace is None and _is_done(dst, source, partial(manifest.verify, on_progress=on_progress)):
        return dst
    with manifest.locked(dst):
        if _may_stay(dst, source, replace) if replace else _is_done(dst, source, manifest.check):
            return dst  # another process was faster
        with released.Released(src) as checkpoint:
            total = sum(nbytes(tensor) for tensor in checkpoint.tensors.values())
            _check_space(dst.parent, total)
            told = {**(origin or {}), **source, **_ignored(checkpoint.ignored)}
            with manifest.publishing(dst, told, on_progress, replace is not None) as folder:
                _write_small_files(folder, family, checkpoint)
                _write_shards(folder, checkpoint, total, on_progress)
    return dst


def state(src: Path, family: str) -> dict[str, Any]:
    """What a conversion is made of: the folder, and of each file [name, bytes, modification time in nanoseconds]."""
    files = [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in families.released(family).files(src)]
    return {"folder": str(src.resolve()), "files": files}


def is_made_of(found: dict[str, Any], source: dict[str, Any]) -> bool:
    """Whether the manifest `found` is that of a conversion of `source`, and nobody has touched the source since."""
    return all(found["source"].get(key) == value for key, value in source.items())


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


def _is_done(dst: Path, source: dict[str, Any], check: Check) -> bool:
    """Whether `dst` is the conversion of `source` and passes `check`. Raises OutputError if it is anything else."""
    if not dst.exists():
        return False
    try:
        if is_converted(dst) and is_made_of(manifest.read(dst), source):
            check(dst)
            return True
    except (CorruptWeightsError, ModelMissingError) as error:
        raise OutputError(f"{dst} exists and is damaged ({error.what})", "delete it and convert again") from None
    raise OutputError(f"{dst} exists and is not the conversion of this checkpoint", "delete it or choose another name")


def _may_stay(dst: Path, source: dict[str, Any], check: Check) -> bool:
    try:
        return dst.exists() and is_made_of(check(dst), source)
    except (CorruptWeightsError, ModelMissingError):
        return False


def _ignored(names: list[str]) -> dict[str, list[str]]:
    """What the manifest says of tensors that have no place in the model: some of them, and how many more."""
    told = [name[:200] for name in names[:SHOWN]] + [f"and {len(names) - SHOWN} more"] * (len(names) > SHOWN)
    return {"ignored": told} if told else {}


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
        values = checkpoint.read(record).reshape(-1).to(tensor.dtype)  # a fused part may be of a narrower type
        if not all(torch.isfinite(chunk).all() for chunk in values.split(FINITE_CHUNK)):
            raise CorruptWeightsError(
                f"tensor {record.name} ({name}) holds NaN or Inf", "download the checkpoint again"
            )
        file.write(memoryview(values.view(torch.uint8).numpy()))
