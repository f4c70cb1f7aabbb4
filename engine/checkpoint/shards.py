"""The safetensors of a folder in our format: tensors, and the scheme that their files' metadata tell.

That says how linear layers are stored: `quant` (absent: as they were released) and `quant_format`.
"""

from pathlib import Path

from ...quant.int8 import FORMAT
from ..errors import CorruptWeightsError, ModelMissingError
from .cache import again
from .safe_files import SafeFiles

UNTUNED = "untuned"  # the folder inside it with some parts' weights as they were before an update was merged in
INT8 = {"quant": "int8", "quant_format": str(FORMAT)}  # the metadata of a file with int8 weights


class Shards(SafeFiles):
    """A context manager. Opening and reading raise CorruptWeightsError, a folder without files ModelMissingError."""

    def __init__(self, folder: Path, which: str = "") -> None:
        """`which` set of weights: UNTUNED or, by default, what the model is."""
        self.folder = folder
        paths = sorted((folder / which).glob("*.safetensors"))
        if not paths:
            raise ModelMissingError(f"{folder / which} holds no safetensors", again(folder))
        super().__init__(paths, again(folder))
        try:
            self.scheme = self._scheme()
        except CorruptWeightsError:
            self.close()
            raise

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of every tensor, in file order, from the headers alone."""
        return {name: record.shape for name, record in self.records.items()}

    def _scheme(self) -> str:
        """What all files say: none or int8."""
        said = {name: {key: data[key] for key in INT8 if key in data} for name, data in self.metadata.items()}
        first, *others = said.values()
        if any(other != first for other in others):
            raise self._corrupt(f"{self.folder} mixes schemes ({str(said)[:300]}), and a checkpoint has one")
        if first not in ({}, INT8):
            what = f"{self.folder} is stored as {str(first)[:100]}, and this version reads {INT8} or neither"
            raise CorruptWeightsError(what, "convert the original checkpoint again, or update unipic-run")
        return first.get("quant", "none")
