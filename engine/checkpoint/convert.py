"""A released checkpoint -> our folder: `config.json`, safetensors shards, tokenizers, `manifest.json`.

What an update was merged into is kept as it was before as well, in shards of their own in the folder `untuned`.

One pass, tensor by tensor, types kept. The shards are planned from shapes alone and their headers written first, so
memory holds one tensor part at a time; parts of a fused tensor simply follow each other in the file, in the widest of
their types. With `quant`, what that changes is in memory whole, with its float32 copies, one tensor at a time.
"""

import json
import math
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import nn

from ...quant.recipe import Recipe
from ...quant.swap import Change
from .. import families
from ..errors import CorruptWeightsError, ModelMissingError, OutputError, UsageError
from ..weights import all_finite, prepared
from . import manifest
from .config_file import write_config_file
from .differences import SHOWN
from .json_files import DOWNLOAD_AGAIN
from .manifest import Progress
from .parts import ReleasedTensor
from .safe_files import TYPES
from .shards import INT8, UNTUNED

SHARD = 2 * 10**9  # bytes
SPARE = 16 * 2**20  # bytes of disk besides the tensors

Check = Callable[[Path], dict[str, Any]]  # a folder's manifest, or an error: manifest.check or manifest.verify

_NAMES = {dtype: name for name, dtype in TYPES.items()}


@dataclass(frozen=True)
class Shard:
    """A safetensors file to be: its name and the tensors in it, in file order."""

    name: str
    tensors: tuple[str, ...]


@dataclass(frozen=True)
class Output:
    """A tensor to be, and the name of the checkpoint's tensor that it is made of."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    source: str


def is_converted(folder: Path) -> bool:
    """Whether `folder` is in our format (it may still be damaged)."""
    return (folder / "config.json").is_file() and (folder / manifest.NAME).is_file()


def convert(
    src: Path,
    dst: Path,
    on_progress: Progress | None = None,
    family: str | None = None,
    origin: dict[str, Any] | None = None,
    replace: Check | None = None,
    quant: str = "none",
) -> Path:
    """Convert the released folder `src` into the new folder `dst`; returns `dst`. `quant` is none or int8.

    `family`: by default the one whose layout it has.

    If `dst` is the conversion of `src` already, every file of it is verified and it is kept; anything else that is
    there is an error. With `replace`, a `dst` that this check refuses, or that was made of something else, stays
    visible until the new folder takes its place. `origin` is added to what the manifest says of the source.
    Raises OutputError (exists, damaged, no space, not writable), ModelMissingError, CorruptWeightsError, UsageError.
    """
    if quant not in ("none", "int8"):
        raise UsageError(
            f"quant {quant!r:.80} cannot be stored", "convert for none or int8; others are made on loading"
        )
    src, dst = Path(src), Path(dst).absolute()
    family = family or _family_of(src)
    released = families.released(family)
    source = state(src, family, quant)
    if replace is None and _is_done(dst, source, partial(manifest.verify, on_progress=on_progress)):
        return dst
    with manifest.locked(dst):
        if _may_stay(dst, source, replace) if replace else _is_done(dst, source, manifest.check):
            return dst  # another process was faster
        with released.Released(src) as checkpoint:
            sets = {"": checkpoint.tensors, UNTUNED: checkpoint.untuned}
            build = partial(families.model(family).build, checkpoint.config)
            recipe = families.recipe(family, quant)
            writers = {name: _Writer(tensors, build, recipe, on_progress) for name, tensors in sets.items() if tensors}
            _check_space(dst.parent, sum(writer.total for writer in writers.values()))
            told = {**(origin or {}), **source, **_ignored(checkpoint.ignored)}
            with manifest.publishing(dst, told, on_progress, replace is not None) as folder:
                write_config_file(folder, family, checkpoint.config.to_json(), quant)
                for name, text in checkpoint.tokenizers.items():
                    (folder / name).write_text(text, encoding="utf-8")
                for name, writer in writers.items():
                    writer.write(folder / name)
    return dst


def _family_of(src: Path) -> str:
    found = families.of_released(src)
    if found is None and is_converted(src):
        raise UsageError(f"{src} is converted already", "give it to --model as it is")
    if found is None:
        remedy = f"give the folder of one of {', '.join(families.FAMILIES)}, or finish its download"
        raise ModelMissingError(families.unrecognised(src), remedy)
    return found.name


def state(src: Path, family: str, quant: str = "none") -> dict[str, Any]:
    """What a conversion is made of: the folder, and of each file [name, bytes, modification time in nanoseconds]."""
    files = [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in families.released(family).files(src)]
    return {"folder": str(src.resolve()), "files": files, "quant": quant}


def is_made_of(found: dict[str, Any], source: dict[str, Any]) -> bool:
    """Whether the manifest `found` is that of a conversion of `source`, and nobody has touched the source since."""
    return all(({"quant": "none"} | found["source"]).get(key) == value for key, value in source.items())


def plan_shards(tensors: dict[str, Output], limit: int = SHARD) -> list[Shard]:
    """Tensors in file order, cut into shards of at most `limit` bytes, or what is made of one tensor."""
    groups: list[list[str]] = []
    room = 0
    for names in _by_source(tensors, sorted(tensors, key=lambda name: -tensors[name].dtype.itemsize)).values():
        size = sum(nbytes(tensors[name]) for name in names)
        if not groups or size > room:
            groups.append([])
            room = limit
        groups[-1] += names
        room -= size
    # Wide types first: with a header of 8 n bytes every tensor then starts at a multiple of its element size.
    ordered = [tuple(sorted(group, key=lambda name: -tensors[name].dtype.itemsize)) for group in groups]
    if len(ordered) == 1:
        return [Shard("model.safetensors", ordered[0])]
    return [Shard(f"model-{i:05}-of-{len(ordered):05}.safetensors", group) for i, group in enumerate(ordered, 1)]


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
    raise OutputError(f"{dst} exists and is not the conversion of this checkpoint", "choose another name, or delete it")


def _may_stay(dst: Path, source: dict[str, Any], check: Check) -> bool:
    try:
        return dst.exists() and is_made_of(check(dst), source)
    except (CorruptWeightsError, ModelMissingError):
        return False


def _ignored(names: list[str]) -> dict[str, list[str]]:
    """What the manifest says of tensors that have no place in the model: some of them, and how many more."""
    told = [name[:200] for name in names[:SHOWN]] + [f"and {len(names) - SHOWN} more"] * (len(names) > SHOWN)
    return {"ignored": told} if told else {}


def left_out(folder: Path) -> str | None:
    """A sentence about the tensors that a conversion into `folder` had no place for."""
    ignored = manifest.read(folder)["source"].get("ignored")
    return f"left out, since the model has no place for them: {', '.join(map(ascii, ignored))}" if ignored else None


def _check_space(folder: Path, total: int) -> None:
    free = shutil.disk_usage(folder).free
    needed = total + total // 20 + SPARE
    if free < needed:
        raise OutputError(f"{folder} has {free / 1e9:.1f} GB free, {needed / 1e9:.1f} GB are needed", "make room there")


def _by_source(tensors: dict[str, Output], names: Iterable[str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(tensors[name].source, []).append(name)
    return found


class _Writer:
    """The shards of one set of weights."""

    def __init__(
        self,
        tensors: Mapping[str, ReleasedTensor],
        build: Callable[[], nn.Module],
        recipe: Recipe,
        on_progress: Progress | None,
    ) -> None:
        self.stored, self.on_progress, self.done = tensors, on_progress, 0
        self.metadata = {"format": "pt", **(INT8 if recipe.scheme == "int8" else {})}
        self.change = Change(prepared(build, recipe), recipe)
        self.change.gains = {name: self.whole(name) for name in self.change.reads}
        self.outputs = {
            made: Output(dtype or tensor.dtype, shape, name)
            for name, tensor in self.stored.items()
            for made, (dtype, shape) in self.change.planned(name, tensor.shape).items()
        }
        self.total = sum(map(nbytes, self.outputs.values()))

    def write(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        shards = plan_shards(self.outputs)
        for shard in shards:
            header, starts = _header(shard, self.outputs, self.metadata)
            with (folder / shard.name).open("xb") as file:
                file.write(header)
                for source, names in _by_source(self.outputs, shard.tensors).items():
                    self.write_tensors(file, source, starts)
                    self.done += sum(nbytes(self.outputs[name]) for name in names)
                    if self.on_progress is not None:
                        self.on_progress("convert", self.done, self.total)
        if len(shards) > 1:
            where = {name: shard.name for shard in shards for name in shard.tensors}
            index = {"metadata": {"total_size": self.total}, "weight_map": where}
            (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")

    def write_tensors(self, file: BinaryIO, source: str, starts: dict[str, int]) -> None:
        """All that is made of one stored tensor, each at its place."""
        if self.change.changes(source):
            for name, values in self.change(source, self.whole(source)).items():
                file.seek(starts[name])
                file.write(_bytes(values))
        else:
            file.seek(starts[source])
            for values in self.parts(source):
                file.write(_bytes(values))

    def whole(self, name: str) -> torch.Tensor:
        return torch.cat([*self.parts(name)]).view(self.stored[name].shape)

    def parts(self, name: str) -> Iterator[torch.Tensor]:
        """A stored tensor's parts, flat and finite, in its type: a fused part may be of a narrower one."""
        for part in self.stored[name].parts:
            values = part.read().reshape(-1).to(self.stored[name].dtype)
            if not all_finite(values):
                what = f"tensor {part.name} ({name}) holds NaN or Inf"
                raise CorruptWeightsError(what, DOWNLOAD_AGAIN)
            yield values


def _header(shard: Shard, tensors: dict[str, Output], metadata: dict[str, str]) -> tuple[bytes, dict[str, int]]:
    """A safetensors header, and where in the file each tensor starts.

    Its length in 8 bytes, then JSON, padded with spaces to a multiple of 8.
    """
    header: dict[str, Any] = {"__metadata__": metadata}
    at, starts = 0, {}
    for name in shard.tensors:
        tensor = tensors[name]
        starts[name], end = at, at + nbytes(tensor)
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, {name: 8 + len(text) + start for name, start in starts.items()}


def _bytes(values: torch.Tensor) -> memoryview:
    return memoryview(values.contiguous().view(torch.uint8).numpy())
