"""A model's name -> a folder in our format on this machine: folders, released checkpoints, short names, hub ids.

The first pull turns a branch into a commit and writes it down with the hub's own file hashes (the pin); later runs stay
on that commit and need no network, until `revision` moves it. Nothing that is fetched is ever run.
"""

import hashlib
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import families, pins
from .checkpoint import manifest
from .checkpoint.cache import PACKAGED, cache_root, cached, folder_named, listed_name, local_name, models_folder, slug
from .checkpoint.manifest import Progress
from .errors import CorruptWeightsError, ModelMissingError, UsageError
from .pins import Pin

Say = Callable[[str], None]

SHOWN = 3  # models that a message names
MAIN = "main"  # the branch of a repository that is no family's own
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)


def is_offline() -> bool:
    """Whether the environment keeps huggingface_hub from the network."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


def is_hub_id(name: str) -> bool:
    """Whether it could be one; whether there is one is another question."""
    return bool(_HUB_ID.fullmatch(name)) and ".." not in name


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

    A short name wins over a folder of that name, a folder over a name that `list` shows, and that over a hub id. `say`
    gets one sentence before anything slow.
    Raises UsageError, ModelMissingError, CorruptWeightsError, OutputError.
    """
    try:
        return _resolve(model, revision, offline, _Job(on_progress, say or _silent, fully=False))
    except PermissionError as error:
        raise ModelMissingError(f"{error.filename} may not be read", "check its permissions") from None


def pull(
    model: str, revision: str | None = None, on_progress: Progress | None = None, say: Say | None = None
) -> LocalModel:
    """Fetch and convert `model`, then describe it; what is here already is hashed, and made again if damaged."""
    return describe(_resolve(model, revision, False, _Job(on_progress, say or _silent, fully=True)))


def describe(folder: Path) -> LocalModel:
    """What a folder in our format says of itself; reads no weights."""
    from .checkpoint.config_file import read_config_file

    found = manifest.check(folder)
    family = families.get(read_config_file(folder)["family"])
    nbytes = sum(entry["size"] for entry in found["files"].values())
    source, licence, note = _origin(found["source"], family)
    return LocalModel(listed_name(folder), family.name, folder, source, nbytes, licence, note)


def _origin(source: object, family: families.Family) -> tuple[str, str, str]:
    """Where a manifest says its folder came from, the licence as far as that tells, and a note."""
    match source:
        case {"hub": {"repo": str(repo), "commit": str(commit)}}:
            licence = family.licence if repo == family.hub else f"see https://huggingface.co/{repo}"
            return f"{repo} at commit {commit}", licence, family.note
        case {"folder": str(folder)}:
            return folder, f"if these are the weights of {family.hub}: {family.licence}", family.note
        case {"trained by": str(script)}:
            return f"trained by {script}", "Apache-2.0, as this package", "knows a world of coloured shapes"
    return "unknown", "unknown", family.note


def list_models() -> list[LocalModel]:
    """The models inside the package, every converted one in the cache, then the known families that are not there."""
    rows = []
    models = models_folder()
    made = sorted(models.iterdir()) if models.is_dir() else []
    for folder in (*PACKAGED.values(), *made):
        if (folder / manifest.NAME).is_file() and ".partial-" not in folder.name:
            try:
                rows.append(describe(folder))
            except (CorruptWeightsError, ModelMissingError, UsageError) as error:
                name, damage = listed_name(folder), f"damaged: {error.what}"
                rows.append(LocalModel(name, "?", folder, damage, 0, "?", error.remedy))
    fetched = {row.name.split("@")[0] for row in rows}
    for family in families.FAMILIES.values():
        if slug(family.hub) not in fetched:
            rows.append(LocalModel(family.name, family.name, None, family.hub, 0, family.licence, family.note))
    return rows


def works_now() -> str:
    """What a user without the wanted model can run at once, as half a sentence."""
    try:
        rows = [row for row in list_models() if row.path is not None and row.family != "?"]
    except (OSError, UsageError):  # a cache that cannot be read
        rows = list(map(describe, PACKAGED.values()))
    here = [row.name if row.name in PACKAGED else str(row.path) for row in rows]
    more = f" and {len(here) - SHOWN} more (`unipic-run list`)" if len(here) > SHOWN else ""
    known = ", ".join(here[:SHOWN]) or "no model yet"
    return f"on this machine: {known}{more}; `--model FOLDER` runs any checkpoint you have"


@dataclass(frozen=True)
class _Job:
    """Who hears of slow work, and how well what is here already is looked at."""

    on_progress: Progress | None
    say: Say
    fully: bool  # hash every file, not only see that it is there

    def check(self, folder: Path) -> dict[str, Any]:
        """The manifest of a whole folder. Raises CorruptWeightsError, ModelMissingError."""
        if not self.fully:
            return manifest.check(folder)
        self.say(f"checking every file of {folder}")
        return manifest.verify(folder, self.on_progress)

    def whole(self, dst: Path) -> dict[str, Any] | None:
        """The manifest of a folder of the cache; None if it has to be made (again)."""
        try:
            return self.check(dst) if dst.exists() else None
        except (CorruptWeightsError, ModelMissingError) as error:
            self.say(f"{error.what}: it is made again, and the damaged copy removed")
            return None

    def convert(self, src: Path, dst: Path, family: str, origin: dict[str, Any] | None = None) -> None:
        """Make or replace `dst`, and say what was left out."""
        from .checkpoint.convert import convert, left_out

        check = manifest.verify if self.fully else manifest.check
        convert(src, dst, self.on_progress, family, origin, replace=check)
        if sentence := left_out(dst):
            self.say(sentence)


def _resolve(model: str | Path, revision: str | None, offline: bool, job: _Job) -> Path:
    """As `resolve`; what is here already and damaged, as far as `job` looks, is made again."""
    name = str(model)
    if name in PACKAGED:
        if revision is not None:
            raise UsageError(f"{name} comes with the package and has no revision {revision!r}", "leave it out")
        job.check(PACKAGED[name])
        return PACKAGED[name]
    if name in families.FAMILIES:
        return _from_hub(families.FAMILIES[name].hub, revision, offline, job)
    if folder := folder_named(model):
        if revision is not None:
            raise UsageError(f"{name} is a folder, which has no revision {revision!r}", "leave the revision out")
        return _from_folder(folder, job)
    if found := cached(name):
        job.check(found)
        return found
    if is_hub_id(name) and not Path(name).exists():
        return _from_hub(name, revision, offline, job)
    known = ", ".join(families.short_names())
    raise ModelMissingError(f"{name!r} is no folder, no hub id (org/name) and no known name ({known})", works_now())


def _from_folder(folder: Path, job: _Job) -> Path:
    from .checkpoint.convert import is_converted, is_made_of, state  # torch is imported only where weights are read

    if is_converted(folder):
        job.check(folder)
        return folder
    family = families.of_released(folder)
    if family is None:
        raise ModelMissingError(families.unrecognised(folder), works_now())
    path = folder.resolve()
    key = hashlib.sha256(os.fsencode(path)).hexdigest()[:16]  # of the place only: what lies there replaces what lay
    dst = models_folder() / f"{local_name(path)}-{key}"
    found = job.whole(dst)
    if found is None or not is_made_of(found, state(folder, family.name)):
        job.say(f"converting {folder} {'again, since it has changed' if found else 'once'}, into {dst}")
        job.convert(folder, dst, family.name)
    return dst


def _from_hub(repo: str, revision: str | None, offline: bool, job: _Job) -> Path:
    offline = offline or is_offline()
    known = pins.of_repo(repo)
    pin_file = cache_root() / "pins" / f"{slug(repo)}.json"
    old = pin = pins.read(pin_file)
    suspect = False
    if not _stays(pin, revision, offline):
        branch = revision or (known.revision if known else MAIN)
        pin = _or_say(pins.find_cached if offline else pins.ask_hub, repo, branch)
    elif not pin.files and not offline:  # found in a cache that kept no hashes: nothing has been compared so far
        pin = pins.with_hashes(pin)
        suspect = not pins.is_genuine(pin)
    dst = models_folder() / f"{slug(repo)}@{pin.commit[:12]}"
    if suspect or job.whole(dst) is None:
        family = known or families.of_files(pin.files) or families.FAMILIES["unipic"]
        licence = _origin({"hub": pin.to_json()}, family)[1]
        job.say(f"fetching {repo} at commit {pin.commit[:12]} (licence: {licence}; {family.note})")
        snapshot = _or_say(pins.fetch, pin, offline, job.on_progress)
        family = families.of_released(snapshot) or family  # a pin without hashes does not tell it
        job.say(f"converting it once, into {dst}")
        try:
            job.convert(snapshot, dst, family.name, {"hub": pin.to_json()})
        except ModelMissingError as error:
            what = f"the copy of {repo} on this machine is incomplete: {error.what}"
            whole = f"{error.remedy}, or name a repository that holds all of it"
            remedy = pins.pull_command(repo) if offline else whole
            raise ModelMissingError(what, f"{remedy}; {works_now()}") from None
    if pin != old:
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


def _silent(sentence: str) -> None:
    pass
