"""The files of recorded runs, in `cases` and `unit`: NAME.json with settings, NAME.safetensors with tensors."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor
from unipic_run.bench.parity_ledger import Ledger

# What cases hold that do not say their kind.
BY_TENSOR = {
    "scb_in": "deepgen",
    "query_hidden": "unipic2_metaquery",
    "prompt_embeds": "unipic2_kontext",
    "pad.scb_row": "deepgen_units",
}


@dataclass(frozen=True)
class Case:
    """One recorded case. `settings` is its JSON: an object with a `kind`, or a list of entries."""

    name: str
    folder: Path
    settings: Any
    tensors: dict[str, Tensor]
    kept_by: type[Ledger] = Ledger

    def ledger(self) -> Ledger:
        """An empty account of its tensors."""
        return self.kept_by(self.tensors)

    @property
    def kind(self) -> str:
        """The recorded kind; the two lists have none and are known by what their entries hold."""
        if isinstance(self.settings, dict):
            return self.settings.get("kind") or next(
                (BY_TENSOR[name] for name in BY_TENSOR if name in self.tensors), "unknown"
            )
        first = self.settings[0] if self.settings else {}
        if "ids" in first:
            return "tokenizer"
        return "mask_schedule" if "predicted_per_iter" in first else "unknown"

    @property
    def batch(self) -> int:
        """Images made together."""
        return self.settings["batch"]

    @property
    def source(self) -> Path:
        """The picture of an edit or a question."""
        return self.folder / self.settings["source"]


def read_cases(folder: Path) -> dict[str, Case]:
    """Every case of `folder`, which holds `cases` or `unit`, by name; tensors without settings make a case too."""
    paths = [path for name in ("cases", "unit") for path in (folder / name).glob("*")]
    found = {path.stem: path.parent for path in paths if path.suffix in (".json", ".safetensors")}
    return {name: _read(found[name], name) for name in sorted(found)}


def _read(folder: Path, name: str) -> Case:
    settings, tensors = folder / f"{name}.json", folder / f"{name}.safetensors"
    return Case(
        name,
        folder,
        json.loads(settings.read_text("utf-8")) if settings.is_file() else {},
        load_file(tensors) if tensors.is_file() else {},
    )
