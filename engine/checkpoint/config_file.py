"""`config.json` of our folder: {"format", "family", "config"}, and "quant" where that is not none."""

import json
from pathlib import Path
from typing import Any

from ..errors import CorruptWeightsError, ModelMissingError
from .cache import again

FORMAT = 1


def write_config_file(folder: Path, family: str, config: dict[str, Any], quant: str = "none") -> None:
    """`quant` tells people; what counts is the metadata of the weights (engine/checkpoint/shards.py)."""
    told = {} if quant == "none" else {"quant": quant}
    text = json.dumps({"format": FORMAT, "family": family, **told, "config": config}, indent=1)
    (folder / "config.json").write_text(text + "\n", encoding="utf-8")


def read_config_file(folder: Path) -> dict[str, Any]:
    """`family` (a known name or not) and `config`, a dict. Raises ModelMissingError, CorruptWeightsError."""
    path = folder / "config.json"
    try:
        if path.stat().st_size > 2**20:
            raise ValueError("too large")
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["format"] != FORMAT or type(data["family"]) is not str or type(data["config"]) is not dict:
            raise ValueError(f"format {str(data['format'])[:20]}, this version reads {FORMAT}")
    except FileNotFoundError:
        raise ModelMissingError(
            f"{folder} holds no config.json", "give a folder that `convert` or `pull` made"
        ) from None
    except (ValueError, KeyError, TypeError, RecursionError, OSError) as error:
        raise CorruptWeightsError(f"{path} is damaged ({error})", again(folder)) from None
    return data
