"""Where the models on this machine are kept, and what makes a damaged one again."""

import json
import os
import re
import shlex
import sys
from contextlib import suppress
from pathlib import Path

from ..errors import UsageError

MANIFEST = "manifest.json"
PACKAGED = {"pocket": Path(__file__).parents[2] / "pocket" / "weights"}  # models that ship inside the package


def cache_root() -> Path:
    """UNIPIC_RUN_CACHE, or `unipic-run` in the system's cache folder. Creates nothing.

    Raises UsageError where that is in a home that cannot be found.
    """
    if chosen := os.environ.get("UNIPIC_RUN_CACHE"):
        return _at_home(chosen, "name another folder in UNIPIC_RUN_CACHE")
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or "~/AppData/Local"
    elif sys.platform == "darwin":
        base = "~/Library/Caches"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return _at_home(base, "name a folder for models in UNIPIC_RUN_CACHE") / "unipic-run"


def _at_home(folder: str, remedy: str) -> Path:
    try:
        return Path(folder).expanduser()
    except RuntimeError as error:
        raise UsageError(f"the cache folder {folder} cannot be found ({str(error).rstrip('.')})", remedy) from None


def models_folder() -> Path:
    """The folder of converted models; it may not exist."""
    return cache_root() / "models"


def cached(name: str) -> Path | None:
    """The model in our format that `list` shows under this name."""
    folder = PACKAGED.get(name, models_folder() / name)
    plain = Path(name).name == name and ".partial-" not in name
    with suppress(OSError):  # a name too long to be one
        return folder if plain and (folder / MANIFEST).is_file() else None
    return None


def folder_named(name: str | os.PathLike[str]) -> Path | None:
    """The folder that a name is the path of, if there is one; a name that can be no path is none, and so is no name."""
    if not os.fspath(name):  # of which Path would make the current folder
        return None
    with suppress(OSError):
        return path if (path := path_named(name)).is_dir() else None
    return None


def path_named(name: str | os.PathLike[str]) -> Path:
    """With `~` expanded where it stands for a home."""
    try:
        return Path(name).expanduser()
    except RuntimeError:
        return Path(name)


def slug(repo: str) -> str:
    """A hub id as a part of file names."""
    return repo.replace("/", "--")


def local_name(released: Path) -> str:
    """How the folder made of a released one begins; a digest of its place follows."""
    return "local-" + re.sub(r"[^\w.-]", "_", released.name)


def listed_name(folder: Path) -> str:
    """The name under which `list` shows a folder."""
    return next((name for name, packaged in PACKAGED.items() if packaged == folder), folder.name)


def again(folder: Path) -> str:
    """The remedy for a damaged folder in our format: a pull checks and repairs the cache, and nothing else."""
    if folder in PACKAGED.values():
        return "install unipic-run again"
    if folder.resolve().parent != models_folder().resolve():
        return "delete the folder and convert it again"
    try:
        source = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["source"]
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        source = None
    match source:
        case {"hub": {"repo": str(repo), "commit": str(commit)}}:
            what = f"{repo} --revision {commit}"
        case {"folder": str(released)}:
            what = shlex.quote(released)
        case _:
            return "delete the folder and pull the model again"
    return f"`unipic-run pull {what}` makes it again"
