"""The model families, one row each. A new family is one folder under models/ and one row here."""

from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from ..quant.recipe import Recipe
from .checkpoint.cache import PACKAGED, again, cached
from .checkpoint.config_file import read_config_file
from .errors import CorruptWeightsError, UsageError


@dataclass(frozen=True)
class Family:
    name: str
    package: str  # under engine/models; holds config.py, model.py, recipe.py and released.py
    config: str  # the name of its dataclass in config.py
    hub: str  # hub id of the released weights
    revision: str  # what a first pull resolves to a commit
    licence: str
    card: str
    note: str


FAMILIES = {
    "unipic": Family(
        name="unipic",
        package="unipic",
        config="UniPicConfig",
        hub="Skywork/Skywork-UniPic-1.5B",
        revision="main",
        licence="MIT, says the authors' code repository; the language model inside is Qwen2.5-1.5B (Apache-2.0). "
        "The model page has the last word",
        card="https://huggingface.co/Skywork/Skywork-UniPic-1.5B",
        note="the released weights were never run by us: the arithmetic is checked against recorded runs of the "
        "original code with small random weights",
    ),
}


def short_names() -> tuple[str, ...]:
    """What --model takes without a slash: models inside the package, then families that can be pulled."""
    return (*PACKAGED, *FAMILIES)


def get(name: str) -> Family:
    """The family called `name`. Raises UsageError, listing the known ones."""
    if name not in FAMILIES:
        raise UsageError(f"there is no model family {name!r}", f"known: {', '.join(FAMILIES)}")
    return FAMILIES[name]


def model(name: str) -> Any:
    """The family's `model` module: its verbs, `needs` and `build`."""
    return import_module(f".models.{get(name).package}.model", __package__)


def read(folder: Path) -> tuple[Family, Any]:
    """The family of a folder in our format, and its configuration. Raises CorruptWeightsError, ModelMissingError."""
    data = read_config_file(folder)
    if data["family"] not in FAMILIES:
        raise CorruptWeightsError(f"{folder} is of the unknown family {data['family'][:80]!r}", "update unipic-run")
    family = FAMILIES[data["family"]]
    config = getattr(import_module(f".models.{family.package}.config", __package__), family.config)
    try:
        return family, config.from_json(data["config"])
    except ValueError as error:
        raise CorruptWeightsError(f"{folder}/config.json is damaged ({error})", again(folder)) from None


def architecture(model: str) -> tuple[Family, Any]:
    """The family and configuration of a short name or a folder in our format; of a short name the weights may be
    missing. Raises UsageError, CorruptWeightsError, ModelMissingError.
    """
    if folder := cached(model):
        return read(folder)
    if model in FAMILIES:
        return FAMILIES[model], import_module(f".models.{FAMILIES[model].package}.config", __package__).RELEASED
    if Path(model).is_dir():
        return read(Path(model))
    raise UsageError(f"nothing is known of a model {model!r:.80}", f"name a folder or {', '.join(short_names())}")


def recipe(name: str, scheme: str) -> Recipe:
    """What the family quantises under one of `quant.recipe.SCHEMES`."""
    return import_module(f".models.{get(name).package}.recipe", __package__).recipe(scheme)


def released(name: str) -> Any:
    """The family's `released` module: `Released`, `is_released`, `files`."""
    return import_module(f".models.{get(name).package}.released", __package__)
