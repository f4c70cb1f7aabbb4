"""The safetensors of a folder in our format, opened together: names, shapes, the scheme, and one tensor at a time.

Every file's metadata says how linear layers are stored: `quant` (absent: as they were released) and `quant_format`.
"""

from contextlib import ExitStack
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from ...quant.int8 import FORMAT
from ..errors import CorruptWeightsError, ModelMissingError
from .cache import again

INT8 = {"quant": "int8", "quant_format": str(FORMAT)}  # the metadata of a file with int8 weights
_UNREADABLE = (SafetensorError, OSError, ValueError, RuntimeError, TypeError)


class Shards:
    """A context manager. Opening and reading raise CorruptWeightsError, a folder without files ModelMissingError."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: dict[str, tuple[Path, Any]] = {}  # of every tensor: where it is
        paths = sorted(folder.glob("*.safetensors"))
        if not paths:
            raise ModelMissingError(f"{folder} holds no safetensors", again(folder))
        with ExitStack() as stack:
            opened = {path: stack.enter_context(self._opened(path)) for path in paths}
            for path, file in opened.items():
                for name in file.keys():  # noqa: SIM118 (not a dict)
                    if name in self._files:
                        raise self._corrupt(f"tensor {name} is in two files, the second {path}")
                    self._files[name] = path, file
            self.scheme = self._scheme({path.name: file.metadata() or {} for path, file in opened.items()})
            self._stack = stack.pop_all()

    def __enter__(self) -> "Shards":
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of every tensor, in file order, from the headers alone."""
        return {name: tuple(file.get_slice(name).get_shape()) for name, (_, file) in self._files.items()}

    def where(self, name: str) -> str:
        """The tensor, as an error names it."""
        return f"{self._files[name][0]}: tensor {name}"

    def read(self, name: str) -> Tensor:
        """The tensor as it is stored; it may lie in the mapped file, so copy what is kept."""
        try:
            return self._files[name][1].get_tensor(name)
        except _UNREADABLE as error:
            raise self._corrupt(f"{self.where(name)} cannot be read ({str(error)[:200]})") from None

    def _opened(self, path: Path) -> Any:
        try:
            return safe_open(path, framework="pt", device="cpu")
        except (SafetensorError, OSError, ValueError) as error:
            raise self._corrupt(f"{path} is not a whole safetensors file ({str(error)[:200]})") from None

    def _scheme(self, told: dict[str, dict[str, str]]) -> str:
        """What all files say: none or int8."""
        said = {name: {key: data[key] for key in INT8 if key in data} for name, data in told.items()}
        first, *others = said.values()
        if any(other != first for other in others):
            raise self._corrupt(f"{self.folder} mixes schemes ({str(said)[:300]}), and a checkpoint has one")
        if first not in ({}, INT8):
            what = f"{self.folder} is stored as {str(first)[:100]}, and this version reads {INT8} or neither"
            raise CorruptWeightsError(what, "convert the original checkpoint again, or update unipic-run")
        return first.get("quant", "none")

    def _corrupt(self, what: str) -> CorruptWeightsError:
        return CorruptWeightsError(what, again(self.folder))
