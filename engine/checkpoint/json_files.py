"""Small files of a released checkpoint, of bounded size."""

import json
from pathlib import Path
from typing import Any

from ..errors import CorruptWeightsError

MAX_BYTES = 64 * 2**20
_AGAIN = "download the checkpoint again"


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises CorruptWeightsError."""
    try:
        data = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise CorruptWeightsError(f"{path} is not JSON ({error})", _AGAIN) from None
    if not isinstance(data, dict):
        raise CorruptWeightsError(f"{path} is not a JSON object", _AGAIN)
    return data


def read_text(path: Path) -> str:
    """UTF-8 text. Raises CorruptWeightsError."""
    if path.stat().st_size > MAX_BYTES:
        raise CorruptWeightsError(f"{path} has {path.stat().st_size} bytes, more than {MAX_BYTES}", _AGAIN)
    try:
        return path.read_text(encoding="utf-8")
    except ValueError:
        raise CorruptWeightsError(f"{path} is not UTF-8 text", _AGAIN) from None
