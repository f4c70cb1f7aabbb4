"""A released DeepGen 1.0 in either of its layouts (layout.py): configuration, tokenizer, tensors under our names."""

import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...checkpoint.differences import refuse, refuse_differences
from ...checkpoint.json_files import DOWNLOAD_AGAIN
from ...checkpoint.parts import Centre, Merged, Padded, Part, ReleasedTensor, Shaped, Stored, joined
from ...checkpoint.pickle_reader import TorchCheckpoint
from ...checkpoint.safe_files import SafeFiles
from ...errors import CorruptWeightsError
from . import keys, layout
from .layout import Layout
from .released_config import SIZES, Shapes, aligned, positions, read_config, table_side
from .tokenizer import read_tokenizer

LORA_SCALE = 2.0  # alpha / rank of the update: 128 / 64 in the training code, which the file does not tell
PATCHES = "transformer.pos_embed.proj.weight"
Records = dict[str, Part]  # by released name


class Released:
    """An open released folder: `config`, `tensors` by our name, `tokenizers` as JSON text by file. A context manager.

    `untuned`: where an update of the language model lies apart from it, the tensors of the updated parts without it.
    `ignored` lists the tensors of a native file that belong to none of the components. Raises ModelMissingError,
    CorruptWeightsError.
    """

    sizes = SIZES
    unused = keys.IGNORED

    def __init__(self, folder: Path) -> None:
        found = self.locate(folder)
        self.folder, self.files = found.folder, found.files()
        with ExitStack() as stack:
            records, self.ignored = _records(found, stack)
            self.tokenizers, ids = self.read_tokenizers(found)
            refuse("the checkpoint", missing=[name for name in self.sizes if name not in records])
            try:
                if keys.POSITIONS not in records:
                    config = found.small()["transformer"]
                    records[keys.POSITIONS] = positions(config, records[PATCHES].shape)
                self.config = self.read_config(found, {name: record.shape for name, record in records.items()}, ids)
                rows, updated = self.table(records), found.native is not None
                self.tensors = _tensors(rows, self.config, records, self.unused, updated)
                tuned = {name: names for name, names in rows.items() if name.partition(".")[0] in keys.TUNED}
                self.untuned = _joined(tuned, self.config, records) if updated else {}
                expected = self.expected()
            except ValueError as error:
                raise CorruptWeightsError(f"{folder}: {error}", DOWNLOAD_AGAIN) from None
            except (KeyError, IndexError, TypeError, AttributeError, ArithmeticError, RuntimeError) as error:
                what = f"{folder}: the sizes do not fit together ({error!r:.200})"
                raise CorruptWeightsError(what, DOWNLOAD_AGAIN) from None
            refuse_differences(expected, {name: t.shape for name, t in self.tensors.items()}, str(folder))
            self._stack = stack.pop_all()

    def __enter__(self) -> "Released":
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    # What the relatives do otherwise.
    def locate(self, folder: Path) -> Any:
        return layout.locate(folder)

    def read_tokenizers(self, found: Layout) -> tuple[dict[str, str], dict[str, Any]]:
        tokenizer, ids = read_tokenizer(found.tokenizer)
        return {"tokenizer.json": tokenizer}, ids

    def read_config(self, found: Layout, shapes: Shapes, ids: dict[str, Any]) -> Any:
        return read_config(found, shapes, ids)

    def table(self, records: Records) -> keys.Rows:
        """Our name -> released names."""
        return keys.table(self.config)

    def expected(self) -> dict[str, tuple[int, ...]]:
        from .model import build  # the verbs' module is heavy, and only a conversion needs it here

        return shapes_of(build, self.config)


def is_released(folder: Path) -> bool:
    """Whether the folder, or a sub-folder of it, holds a released checkpoint."""
    return layout.find(folder) is not None


def files(folder: Path) -> list[Path]:
    """The files of a released folder that a conversion reads."""
    return layout.locate(folder).files()


def _records(found: Layout, stack: ExitStack) -> tuple[Records, list[str]]:
    """All records by released name, and the names of those that have none."""
    records, ignored = [], []
    for component, paths in found.weights().items():
        file = stack.enter_context(SafeFiles(paths, f"{DOWNLOAD_AGAIN}, each tensor in one file"))
        records += [(keys.spelled(component, name), Stored(file, record)) for name, record in file.records.items()]
    if found.native is not None:
        native = stack.enter_context(_opened(found.native))
        named = [(keys.native(name), name, Stored(native, record)) for name, record in native.records.items()]
        records += [(released, record) for released, _, record in named if released is not None]
        ignored = [name for released, name, _ in named if released is None]
    by_name = dict(records)
    if len(by_name) < len(records):
        twice = sorted({name for name, record in records if by_name[name] is not record})
        refuse("the checkpoint", **{"stored twice": twice})
    return by_name, ignored


def _opened(path: Path) -> TorchCheckpoint | SafeFiles:
    return SafeFiles([path], DOWNLOAD_AGAIN) if path.suffix == ".safetensors" else TorchCheckpoint(path)


def _tensors(
    rows: keys.Rows, config: Any, records: Records, unused: Iterable[str], updated: bool
) -> dict[str, ReleasedTensor]:
    """Our tensors. Raises one error for all names that are missing or unexpected."""
    changed = keys.expanded(keys.UPDATED, rows) if updated else ()
    updates = {part: keys.update(part) for name in changed for part in rows[name]}
    used = {part for parts in rows.values() for part in parts} | {name for pair in updates.values() for name in pair}
    refuse(
        "the checkpoint",
        missing=[name for name in sorted(used) if name not in records],
        unexpected=[name for name in records if name not in used and name not in unused],
    )
    merged = {name: _merged(name, records[name], records[a], records[b]) for name, (a, b) in updates.items()}
    return _joined(rows, config, {**records, **merged})


def _joined(rows: keys.Rows, config: Any, parts: Mapping[str, Part]) -> dict[str, ReleasedTensor]:
    shaped = _shapes(config, rows)
    return {
        name: joined(name, [shaped.get(name, _as_it_is)(parts[theirs]) for theirs in names])
        for name, names in rows.items()
    }


def _as_it_is(part: Part) -> Part:
    return part


def _merged(name: str, weight: Part, a: Part, b: Part) -> Merged:
    """Raises ValueError where the update does not fit the weight."""
    transposed = "lora_embedding_" in a.name
    (rank, inputs), (outputs, inner) = a.shape, b.shape
    shape = (inputs, outputs) if transposed else (outputs, inputs)
    floating = all(each.dtype is not None and each.dtype.is_floating_point for each in (weight, a, b))
    if rank != inner or shape != weight.shape or not floating:
        found = f"{[*a.shape]} and {[*b.shape]} of {a.dtype} and {b.dtype}"
        raise ValueError(f"{name} is {[*weight.shape]} of {weight.dtype}, which an update of {found} does not fit")
    return Merged(weight, a, b, LORA_SCALE, transposed)


def _shapes(config: Any, names: keys.Rows) -> dict[str, Callable[[Part], Part]]:
    """What is done to each part of our tensors, where anything is; a relative may lack some of the model's parts."""
    parts = {name.partition(".")[0] for name in names}
    changes: list[tuple[Callable[[Part], Part], tuple[str, ...]]] = [
        (_flat, keys.FLAT),
        (_convolution, keys.CONVOLUTIONS),
        (_taller, keys.PADDED_ROWS),
        (_wider, keys.PADDED_COLUMNS),
        (partial(_centre, config.dit.table), (keys.CENTRED,)),
    ]
    known = [(change, [p for p in patterns if p.partition(".")[0] in parts]) for change, patterns in changes]
    return {name: change for change, patterns in known for name in keys.expanded(patterns, names)}


def _flat(part: Part) -> Part:
    return Shaped(part, (part.shape[0], math.prod(part.shape[1:])))


def _convolution(part: Part) -> Part:
    return Shaped(part, (*part.shape, 1, 1))


def _taller(part: Part) -> Part:
    return Padded(part, (aligned(part.shape[0]), *part.shape[1:]))


def _wider(part: Part) -> Part:
    return Padded(part, (*part.shape[:-1], aligned(part.shape[-1])))


def _centre(side: int, part: Part) -> Part:
    whole, width = table_side(part.shape), part.shape[-1]
    return Centre(Shaped(part, (whole, whole, width)), (side, side, width))


def shapes_of(build: Callable[[Any], nn.Module], config: Any) -> dict[str, tuple[int, ...]]:
    """By name, of all tensors that the model wants."""
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in build(config).state_dict().items()}
