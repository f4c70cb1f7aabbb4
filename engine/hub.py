"""A model's name -> a folder in our format on this machine: folders, released checkpoints, short names, hub ids.

The first pull turns a branch into a commit and writes it down with the hub's own file hashes (the pin); later runs stay
on that commit and need no network, until `revision` moves it. Nothing that is fetched is ever run.
"""

import os
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import families, pins
from .checkpoint import manifest
from .checkpoint.manifest import Progress
from .errors import CorruptWeightsError, ModelMissingError, UsageError
from .pins import Pin

Say = Callable[[str], None]

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)


@dataclass(frozen=True)
class LocalModel:
    """A row of `list`: a model we know or have. `path` is None while it is not on this machine."""

    name: str
    family: str
    path: Path | None
    source: str
    nbytes: int
    licence: str
    note: str


def resolve(
    model: str | Path,
    revision: str | None = None,
    offline: bool = False,
    on_progress: Progress | None = None,
    say: Say | None = None,
) -> Path:
    """The local folder of `model` in our format, fetched and converted first where that is needed.

    A short name wins over a folder of that name, a folder over a hub id. `say` gets one sentence before anything slow.
    Raises UsageError, ModelMissingError, CorruptWeightsError, OutputError.
    """
    say = say or (lambda sentence: None)
    name = str(model)
    if name in families.FAMILIES:
        return _from_hub(families.FAMILIES[name].hub, revision, offline, on_progress, say)
    folder = Path(model).expanduser()
    if folder.is_dir():
        if revision is not None:
            raise UsageError(f"{name} is a folder, which has no revision {revision!r}", "leave the revision out")
        return _from_folder(folder, on_progress, say)
    if _HUB_ID.fullmatch(name) and ".." not in name and not folder.exists():
        return _from_hub(name, revision, offline, on_progress, say)
    raise ModelMissingError(
        f"{name} is no folder, no hub id (org/name) and no known name ({', '.join(families.FAMILIES)})", works_now()
    )


def pull(
    model: str, revision: str | None = None, on_progress: Progress | None = None, say: Say | None = None
) -> LocalModel:
    """Fetch and convert `model`, then describe it."""
    return describe(resolve(model, revision, False, on_progress, say))


def describe(folder: Path) -> LocalModel:
    """What a folder in our format says of itself; reads no weights."""
    from .checkpoint.config_file import read_config_file

    found = manifest.check(folder)
    family = families.get(read_config_file(folder)["family"])
    nbytes = sum(entry["size"] for entry in found["files"].values())
    source, licence = _origin(found["source"], family)
    return LocalModel(folder.name, family.name, folder, source, nbytes, licence, family.note)


def _origin(source: object, family: families.Family) -> tuple[str, str]:
    """Where a manifest says its folder came from, and the licence as far as that tells."""
    match source:
        case {"hub": {"repo": str(repo), "commit": str(commit)}}:
            licence = family.licence if repo == family.hub else f"see https://huggingface.co/{repo}"
            return f"{repo} at commit {commit}", licence
        case {"folder": str(folder)}:
            return folder, f"if these are the weights of {family.hub}: {family.licence}"
    return "unknown", "unknown"


def list_models() -> list[LocalModel]:
    """Every converted model in the cache, then the known families that are not there."""
    rows = []
    models = cache_root() / "models"
    for folder in sorted(models.iterdir()) if models.is_dir() else []:
        if (folder / manifest.NAME).is_file() and ".partial-" not in folder.name:
            try:
                rows.append(describe(folder))
            except (CorruptWeightsError, ModelMissingError, UsageError) as error:
                rows.append(LocalModel(folder.name, "?", folder, f"damaged: {error.what}", 0, "?", error.remedy))
    fetched = {row.name.split("@")[0] for row in rows}
    for family in families.FAMILIES.values():
        if _slug(family.hub) not in fetched:
            rows.append(LocalModel(family.name, family.name, None, family.hub, 0, family.licence, family.note))
    return rows


def works_now() -> str:
    """What a user without the wanted model can run at once, as half a sentence."""
    here = [str(row.path) for row in list_models() if row.path is not None and row.family != "?"]
    return f"on this machine: {', '.join(here) or 'no model yet'}; `--model FOLDER` runs any checkpoint you have"


def cache_root() -> Path:
    """UNIPIC_RUN_CACHE, or `unipic-run` in the system's cache folder. Creates nothing."""
    if chosen := os.environ.get("UNIPIC_RUN_CACHE"):
        return Path(chosen).expanduser()
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or "~/AppData/Local"
    elif sys.platform == "darwin":
        base = "~/Library/Caches"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "unipic-run"


def _from_folder(folder: Path, on_progress: Progress | None, say: Say) -> Path:
    from .checkpoint.convert import cache_key, convert, is_converted  # torch is imported only where weights are read

    if is_converted(folder):
        manifest.check(folder)
        return folder
    family = next((name for name in families.FAMILIES if families.released(name).is_released(folder)), None)
    if family is None:
        raise ModelMissingError(f"{folder} holds neither a converted nor a released checkpoint", works_now())
    name = re.sub(r"[^\w.-]", "_", folder.resolve().name)
    dst = cache_root() / "models" / f"local-{name}-{cache_key(folder, family)}"
    if not _is_good(dst, say):
        say(f"converting {folder} once, into {dst}")
        convert(folder, dst, on_progress, family)
    return dst


def _from_hub(repo: str, revision: str | None, offline: bool, on_progress: Progress | None, say: Say) -> Path:
    from .checkpoint.convert import convert

    offline = offline or os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
    family = next((f for f in families.FAMILIES.values() if f.hub == repo), families.FAMILIES["unipic"])
    pin_file = cache_root() / "pins" / f"{_slug(repo)}.json"
    pin = pins.read(pin_file)
    if not _stays(pin, revision, offline):
        pin = _or_say(pins.find_cached if offline else pins.ask_hub, repo, revision or family.revision)
    dst = cache_root() / "models" / f"{_slug(repo)}@{pin.commit[:12]}"
    if not _is_good(dst, say):
        licence = _origin({"hub": pin.to_json()}, family)[1]
        say(f"fetching {repo} at commit {pin.commit[:12]} (licence: {licence}; {family.note})")
        snapshot = _or_say(pins.fetch, pin, offline, on_progress)
        say(f"converting it once, into {dst}")
        convert(snapshot, dst, on_progress, family.name, origin={"hub": pin.to_json()})
    if pin != pins.read(pin_file):
        pins.write(pin_file, pin)
    return dst


def _or_say(get: Callable[..., Any], *args: Any) -> Any:
    """`get(*args)`; if the model cannot be had, its error also says what can be run instead."""
    try:
        return get(*args)
    except ModelMissingError as error:
        raise ModelMissingError(error.what, f"{error.remedy}; {works_now()}") from None


def _stays(pin: Pin | None, revision: str | None, offline: bool) -> bool:
    """Whether the pinned commit is the answer, with nobody asked."""
    if pin is None:
        return False
    return revision in (None, pin.commit) or (offline and revision == pin.revision)


def _is_good(dst: Path, say: Say) -> bool:
    """Whether the cache already holds `dst`, whole. A damaged copy is removed, since it can be made again."""
    if not dst.exists():
        return False
    try:
        manifest.check(dst)
    except (CorruptWeightsError, ModelMissingError) as error:
        say(f"{error.what}: removed, to be made again")
        shutil.rmtree(dst, ignore_errors=True)
        return False
    return True


def _slug(repo: str) -> str:
    return repo.replace("/", "--")
