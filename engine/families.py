"""The model families, one row each. A new family is one folder under models/ and one row here."""

import fnmatch
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from ..quant.recipe import Recipe
from .checkpoint.cache import MANIFEST, PACKAGED, again, cached, folder_named
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
    holds: str  # what a folder in the released layout is known by, in words
    # Of a repository, as patterns of file names: what shows that it holds weights of this family, and what of it is
    # fetched. Weights and data only: no code, nothing that the model does not use.
    shown_by: str
    wanted: tuple[str, ...]
    unwanted: tuple[str, ...]


UNTRIED = (
    "the released weights were never run by us: the arithmetic is checked against recorded runs of the original code "
    "with small random weights"
)
ENDS = ("", "_2", "_3")
TEXT_ENCODERS, TOKENIZERS = (tuple(name + end for end in ENDS) for name in ("text_encoder", "tokenizer"))
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
        note=UNTRIED,
        holds="pytorch_model.bin",
        shown_by="*pytorch_model.bin",
        wanted=(
            *(f"{where}{name}" for where in ("", "*/") for name in ("pytorch_model.bin", "kl16.ckpt")),
            "*tiny_config.json",
            *(f"{where}Qwen*/{kind}" for where in ("", "*/") for kind in ("*.json", "*.txt")),
        ),
        unwanted=("*siglip*", "*Qwen*/*.bin"),
    ),
    "deepgen": Family(
        name="deepgen",
        package="deepgen",
        config="DeepGenConfig",
        hub="deepgenteam/DeepGen-1.0-diffusers",
        revision="main",
        licence="Apache-2.0, says the model page; but inside are Qwen2.5-VL-3B-Instruct (Qwen Research License: no "
        "commercial use) and a descendant of Stable Diffusion 3.5 Medium (Stability AI Community License), whose terms "
        "you have to keep as well",
        card="https://huggingface.co/deepgenteam/DeepGen-1.0-diffusers",
        note=UNTRIED,
        holds="the folders transformer and connector, or model.safetensors or model.pt beside vae",
        shown_by="connector/*.safetensors",
        wanted=(
            *(f"{name}/*.safetensors" for name in ("transformer", "connector", "vae", "vlm")),
            *(f"{name}/*.json" for name in ("connector", "vae", "vlm", "scheduler", "tokenizer")),
            *(f"{name}/merges.txt" for name in ("tokenizer", "vlm")),
            "prompt_template.json",
        ),
        unwanted=(),
    ),
    "unipic2-kontext": Family(
        name="unipic2-kontext",
        package="unipic2.kontext",
        config="KontextConfig",
        hub="Skywork/UniPic2-SD3.5M-Kontext-2B",
        revision="main",
        licence="MIT, says the authors' code repository; but it descends from Stable Diffusion 3.5 Medium (Stability "
        "AI Community License), whose terms you have to keep as well. The model page has the last word",
        card="https://huggingface.co/Skywork/UniPic2-SD3.5M-Kontext-2B",
        note=UNTRIED,
        holds="the folders transformer and text_encoder_3",
        shown_by="text_encoder_3/*.safetensors",
        wanted=(
            *(f"{name}/*.safetensors" for name in ("transformer", "vae", *TEXT_ENCODERS)),
            *(f"{name}/*.json" for name in ("transformer", "vae", "scheduler", *TEXT_ENCODERS, *TOKENIZERS)),
            *(f"{name}/merges.txt" for name in TOKENIZERS),
        ),
        unwanted=(),
    ),
    "unipic2-metaquery": Family(
        name="unipic2-metaquery",
        package="unipic2.metaquery",
        config="DeepGenConfig",
        hub="Skywork/UniPic2-Metaquery-9B",
        revision="main",
        licence="MIT, says the authors' code repository; but it descends from Stable Diffusion 3.5 Medium (Stability "
        "AI Community License), whose terms you have to keep as well, and needs Qwen2.5-VL-7B-Instruct (Apache-2.0). "
        "The model page has the last word",
        card="https://huggingface.co/Skywork/UniPic2-Metaquery-9B",
        note=f"{UNTRIED}; Qwen2.5-VL-7B-Instruct has to be downloaded apart from it, into its folder vlm",
        holds="the folders transformer and conditioner",
        shown_by="conditioner/*.safetensors",
        wanted=(
            *(f"{name}/*.safetensors" for name in ("transformer", "vae", "conditioner", "vlm")),
            *(f"{name}/*.json" for name in ("transformer", "vae", "conditioner", "scheduler", "vlm", "tokenizer")),
            *(f"{name}/merges.txt" for name in ("tokenizer", "vlm")),
        ),
        unwanted=(),
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


def of_files(names: Iterable[str]) -> Family | None:
    """The family of a repository with these files."""
    names = [*names]
    return next((family for family in FAMILIES.values() if fnmatch.filter(names, family.shown_by)), None)


def of_released(folder: Path) -> Family | None:
    """The family whose released layout a folder has."""
    return next((family for family in FAMILIES.values() if released(family.name).is_released(folder)), None)


def unrecognised(folder: Path) -> str:
    """What is wrong with a folder that holds no checkpoint, or a broken one that lacks what it is known by."""
    if not folder.is_dir():
        return f"{folder} is no folder"
    signs = "; ".join(f"{family.holds} ({name})" for name, family in FAMILIES.items())
    return f"{folder} holds neither {MANIFEST} of a converted checkpoint nor what a released one is known by: {signs}"


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
    """The family and configuration of what `hub.resolve` takes, in its order; but of the released weights only the
    names are needed. Raises UsageError, CorruptWeightsError, ModelMissingError.
    """
    folder = None if model in FAMILIES else PACKAGED.get(model) or folder_named(model) or cached(model)
    if folder:
        return _of_folder(folder)
    family = next((row for row in FAMILIES.values() if model in (row.name, row.hub)), None)
    if family is None:
        raise UsageError(f"nothing is known of a model {model!r:.80}", f"name a folder or {', '.join(short_names())}")
    return family, import_module(f".models.{family.package}.config", __package__).RELEASED


def _of_folder(folder: Path) -> tuple[Family, Any]:
    """In our format, or else in a released one, whose weights are not read."""
    family = None if (folder / MANIFEST).is_file() else of_released(folder)
    if family is None:
        return read(folder)
    with released(family.name).Released(folder) as found:
        return family, found.config


def recipe(name: str, scheme: str) -> Recipe:
    """What the family quantises under one of `quant.recipe.SCHEMES`."""
    return import_module(f".models.{get(name).package}.recipe", __package__).recipe(scheme)


def released(name: str) -> Any:
    """The family's `released` module: `Released`, `is_released`, `files`."""
    return import_module(f".models.{get(name).package}.released", __package__)
