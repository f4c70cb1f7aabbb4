"""Safetensors files opened together: names, shapes and types from their headers, and one tensor at a time."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import CorruptWeightsError

TYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I8": torch.int8}
_UNREADABLE = (SafetensorError, OSError, ValueError, RuntimeError, TypeError)


@dataclass(frozen=True)
class SafeRecord:
    """One tensor. `dtype` is None for a type that no model here has."""

    name: str
    dtype: torch.dtype | None
    shape: tuple[int, ...]


class SafeFiles:
    """A context manager. Opening and reading raise CorruptWeightsError, with the remedy given."""

    def __init__(self, paths: Sequence[Path], remedy: str) -> None:
        self.remedy = remedy
        self.metadata: dict[str, dict[str, str]] = {}  # of every file
        self.records: dict[str, SafeRecord] = {}  # by name, in file order
        self._files: dict[str, tuple[Path, Any]] = {}  # of every tensor: where it is
        with ExitStack() as stack:
            for path, file in {path: stack.enter_context(self._opened(path)) for path in paths}.items():
                self.metadata[path.name] = file.metadata() or {}
                for name in file.keys():  # noqa: SIM118 (not a dict)
                    if name in self._files:
                        raise self._corrupt(f"tensor {name} is in two files, the second {path}")
                    self._files[name] = path, file
                    header = file.get_slice(name)
                    self.records[name] = SafeRecord(name, TYPES.get(header.get_dtype()), tuple(header.get_shape()))
            self._stack = stack.pop_all()

    def __enter__(self) -> "SafeFiles":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        self._stack.close()

    def where(self, name: str) -> str:
        """The tensor, as an error names it."""
        return f"{self._files[name][0]}: tensor {name}"

    def read(self, record: SafeRecord) -> Tensor:
        """The tensor as it is stored; it may lie in the mapped file, so copy what is kept."""
        try:
            return self._files[record.name][1].get_tensor(record.name)
        except _UNREADABLE as error:
            raise self._corrupt(f"{self.where(record.name)} cannot be read ({str(error)[:200]})") from None

    def _opened(self, path: Path) -> Any:
        try:
            return safe_open(path, framework="pt", device="cpu")
        except (SafetensorError, OSError, ValueError) as error:
            raise self._corrupt(f"{path} is not a whole safetensors file ({str(error)[:200]})") from None

    def _corrupt(self, what: str) -> CorruptWeightsError:
        return CorruptWeightsError(what, self.remedy)
