"""What `info` and `verify` tell: the settings a PNG carries, what a checkpoint folder holds, what a name means here."""

import math
from collections import Counter
from pathlib import Path
from typing import Any

from . import families, hub
from .checkpoint.cache import cached, folder_named, path_named, slug
from .errors import CorruptWeightsError, ModelMissingError, UsageError
from .families import Family


def info(what: str) -> dict[str, Any]:
    """Of a PNG, a checkpoint folder, or a model's name. Raises UnipicError."""
    if not what:
        raise UsageError("the name '' is empty", "name a PNG, a checkpoint folder or a model")
    if what not in families.short_names() and (folder := folder_named(what)):
        return checkpoint_info(folder)
    path = path_named(what)
    if found := cached(what):
        return checkpoint_info(found)
    if what not in families.FAMILIES and (not hub.is_hub_id(what) or path.exists()):
        return picture_info(path)
    try:
        return checkpoint_info(on_disk(what)[-1])
    except ModelMissingError:
        if what not in families.FAMILIES:
            return picture_info(path)  # whose message is that there is no such file
    family = families.FAMILIES[what]
    known = {"family": family.name, "layout": "not on this machine", "hub": family.hub, "licence": family.licence}
    return known | {"card": family.card, "note": family.note}


def picture_info(path: Path) -> dict[str, Any]:
    """The settings of a PNG that we wrote. Raises ImageError."""
    from .png_metadata import read_settings

    return {"path": str(path), "settings": read_settings(path)}


def checkpoint_info(folder: Path) -> dict[str, Any]:
    """A converted or a released folder; reads names, shapes and types, no weights.

    Raises ModelMissingError, CorruptWeightsError.
    """
    from .checkpoint.convert import is_converted
    from .checkpoint.shards import UNTUNED

    if is_converted(folder):
        row = hub.describe(folder)
        family, config = families.read(folder)
        sizes, types = _stored(folder)
        apart = (
            {"answers": "with the language model as it was before its update"} if (folder / UNTUNED).is_dir() else {}
        )
        return (
            _described(folder, "converted", family, config, sizes, types, row.nbytes)
            | apart
            | {
                "source": row.source,
                "licence": row.licence,
                "note": row.note,
            }
        )
    family = families.of_released(folder)
    if family is None:
        raise ModelMissingError(families.unrecognised(folder), hub.works_now())
    released = families.released(family.name)
    with released.Released(folder) as found:
        sizes = [math.prod(tensor.shape) for tensor in found.tensors.values()]
        types = [str(tensor.dtype).removeprefix("torch.") for tensor in found.tensors.values()]
        nbytes = sum(path.stat().st_size for path in released.files(folder))
        described = _described(folder, "released", family, found.config, sizes, types, nbytes)
        return described | {"card": family.card}


def on_disk(model: str) -> list[Path]:
    """The converted folders here that a folder, a short name or a hub id stands for; nothing is fetched or made.

    Raises ModelMissingError if there is none.
    """
    if model not in families.short_names() and (folder := folder_named(model)):
        return [folder]
    repo = families.FAMILIES[model].hub if model in families.FAMILIES else model
    rows = hub.list_models()
    found = [row.path for row in rows if row.path and model == row.name]
    found += [row.path for row in rows if row.path and row.name.startswith(f"{slug(repo)}@")]
    if not found:
        raise ModelMissingError(f"{model} is not on this machine", f"`unipic-run pull {model}`; {hub.works_now()}")
    return found


def _described(
    folder: Path, layout: str, family: Family, config: Any, sizes: list[int], types: list[str], nbytes: int
) -> dict[str, Any]:
    return {
        "path": str(folder),
        "family": family.name,
        "layout": layout,
        "parameters": sum(sizes),
        "tensors": dict(Counter(types)),
        "bytes": nbytes,
        "resolution": config.resolution,
        "steps": config.rounds,
        "guidance": config.guidance,
        "licence": family.licence,
        "note": family.note,
    }


def _stored(folder: Path) -> tuple[list[int], list[str]]:
    """Elements of every tensor but those that int8 has added, and type of every one, from the headers of our files."""
    from safetensors import SafetensorError, safe_open

    sizes, types = {}, {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="numpy") as file:
                for name in file.keys():  # noqa: SIM118 (not a dict)
                    tensor = file.get_slice(name)
                    sizes[name], types[name] = math.prod(tensor.get_shape()), tensor.get_dtype()
        except (SafetensorError, OSError) as error:
            raise CorruptWeightsError(f"{path} is damaged ({error})", "convert or pull the model again") from None
    whole = [name.removesuffix("weight") for name, kind in types.items() if kind == "I8"]
    added = {f"{name}scale" for name in whole}  # of quant/int8.py, and the mix of quant/rotate.py
    added |= {name for name in sizes if whole and name.endswith(".mix")}
    return [size for name, size in sizes.items() if name not in added], [*types.values()]
