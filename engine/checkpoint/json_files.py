"""Small files of a released checkpoint, of bounded size."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import CorruptWeightsError, ModelMissingError

MAX_BYTES = 64 * 2**20
DOWNLOAD_AGAIN = "download the checkpoint again"


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises CorruptWeightsError."""
    try:
        data = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise CorruptWeightsError(f"{path} is not JSON ({error})", DOWNLOAD_AGAIN) from None
    if not isinstance(data, dict):
        raise CorruptWeightsError(f"{path} is not a JSON object", DOWNLOAD_AGAIN)
    return data


def read_text(path: Path) -> str:
    """UTF-8 text. Raises CorruptWeightsError."""
    if path.stat().st_size > MAX_BYTES:
        raise CorruptWeightsError(f"{path} has {path.stat().st_size} bytes, more than {MAX_BYTES}", DOWNLOAD_AGAIN)
    try:
        return path.read_text(encoding="utf-8")
    except ValueError:
        raise CorruptWeightsError(f"{path} is not UTF-8 text", DOWNLOAD_AGAIN) from None


def instead_of_tokenizer(folder: Path, names: Sequence[str]) -> list[Path]:
    """The files that a tokenizer is made of where there is no tokenizer.json, for libraries that read them by path.

    Raises ModelMissingError, CorruptWeightsError.
    """
    for path in (paths := [folder / name for name in names]):
        if not path.is_file():
            raise ModelMissingError(f"{folder} holds neither tokenizer.json nor {path.name}", DOWNLOAD_AGAIN)
        if path.stat().st_size > MAX_BYTES:
            raise CorruptWeightsError(f"{path} has more than {MAX_BYTES} bytes", DOWNLOAD_AGAIN)
    return paths
