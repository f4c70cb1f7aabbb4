"""Which commit of a hub repository we use, what the hub says its files hash to, and getting exactly those files."""

import hashlib
import json
import os
import re
import textwrap
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from . import families
from .checkpoint import manifest
from .checkpoint.manifest import Progress
from .errors import CorruptWeightsError, ModelMissingError, OutputError
from .families import Family

# The hub library's errors by class name, the more special one first: why, and what helps (in our words).
_NO_NETWORK = ("the hub cannot be reached, {kind}", "check the network")
CAUSES = {
    "IncompleteSnapshotError": ("only a part of it is on this machine", "{pull}"),
    "OfflineModeIsEnabled": ("the network is switched off and it is not on this machine", "{pull}"),
    "HFValidationError": ("this is no name of a model", "give it as org/name"),
    "GatedRepoError": (
        "its page asks for consent first",
        "consent at https://huggingface.co/{repo}, then set HF_TOKEN",
    ),
    "RepositoryNotFoundError": (
        "the hub has no such model, or it is private",
        "check the name; if private, set HF_TOKEN",
    ),
    "RevisionNotFoundError": ("the hub has no such revision", "choose one from https://huggingface.co/{repo}"),
    "RemoteEntryNotFoundError": ("the hub has lost a file of it", "choose another revision"),
    "HfHubHTTPError": ("the hub answered with the error {status}", "try again later"),
    "LocalEntryNotFoundError": _NO_NETWORK,
    "ConnectionError": _NO_NETWORK,
    "TimeoutError": _NO_NETWORK,
    "TransportError": _NO_NETWORK,
}
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Pin:
    """A commit that the hub named, and per file its size with `sha256`, or `git` (blob id) for small files."""

    repo: str
    revision: str  # what was asked for
    commit: str
    files: dict[str, dict[str, Any]]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def read(path: Path) -> Pin | None:
    """The recorded pin; None if there is none, or if it is damaged and has to be asked for again."""
    try:
        pin = Pin(**json.loads(path.read_text(encoding="utf-8")))
        _check(pin)
    except (OSError, ValueError, TypeError, AttributeError, CorruptWeightsError):
        return None
    return pin


def write(path: Path, pin: Pin) -> None:
    manifest.write_file(path, json.dumps(pin.to_json(), indent=1) + "\n")


def ask_hub(repo: str, revision: str) -> Pin:
    """The commit that `revision` is now, with the hub's file hashes. Raises ModelMissingError."""
    from huggingface_hub import HfApi
    from huggingface_hub.utils import filter_repo_objects

    try:
        info = HfApi(endpoint=_endpoint()).model_info(repo, revision=revision, files_metadata=True, timeout=30)
    except Exception as error:  # the library lets several transport libraries' errors through
        raise _unreachable(repo, revision, error) from None
    found = {sibling.rfilename: sibling for sibling in info.siblings or []}
    files = {}
    for name in filter_repo_objects(found, **_patterns(families.of_files(found))):
        entry = found[name]
        known = {"sha256": entry.lfs.sha256} if entry.lfs else {"git": entry.blob_id}
        files[name] = {"size": entry.size, **known}
    pin = Pin(repo, revision, str(info.sha), files)
    _check(pin)
    if families.of_files(files) is None:
        known = " and no ".join(family.shown_by.lstrip("*") for family in families.FAMILIES.values())
        raise ModelMissingError(f"{repo} at {revision} holds no {known}", "name a repository that does")
    return pin


def find_cached(repo: str, revision: str) -> Pin:
    """The commit of a snapshot that huggingface_hub downloaded earlier, e.g. with its own command."""
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(repo, revision=revision, local_files_only=True, **_patterns(of_repo(repo))))
    except Exception as error:
        raise _unreachable(repo, revision, error, offline=True) from None
    files: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.rglob("*")):
        blob = path.resolve().name  # huggingface_hub names large blobs by the sha256 that the hub announced
        if path.is_file() and _SHA256.fullmatch(blob):
            files[path.relative_to(folder).as_posix()] = {"size": path.stat().st_size, "sha256": blob}
    pin = Pin(repo, revision, folder.name, files)
    _check(pin)
    return pin


def with_hashes(pin: Pin) -> Pin:
    """`pin` with the hub's file hashes, which a copy made by another tool may not carry; as it is if nobody answers."""
    try:
        return replace(pin, files=ask_hub(pin.repo, pin.commit).files)
    except (ModelMissingError, CorruptWeightsError):
        return pin


def is_genuine(pin: Pin) -> bool:
    """Whether the files that the hub's cache still holds are those that the hub announces."""
    try:
        fetch(pin, offline=True)
    except ModelMissingError:
        return True  # gone, or never whole: nothing speaks against it
    except CorruptWeightsError:
        return False
    return True


def fetch(pin: Pin, offline: bool, on_progress: Progress | None = None) -> Path:
    """The snapshot folder of the pinned commit, downloaded if needed (resuming), its files checked against the pin."""
    from huggingface_hub import snapshot_download

    total = sum(entry["size"] or 0 for entry in pin.files.values())
    try:
        folder = snapshot_download(
            pin.repo,
            revision=pin.commit,
            local_files_only=offline,
            endpoint=_endpoint(),
            tqdm_class=_progress_bar(total, on_progress),
            **_patterns(of_repo(pin.repo) or families.of_files(pin.files)),
        )
    except OSError as error:
        if error.errno is not None and not isinstance(error, ConnectionError) and not hasattr(error, "response"):
            raise OutputError(f"cannot store {pin.repo} ({error})", "make room, or set HF_HOME") from None
        raise _unreachable(pin.repo, pin.commit, error, offline) from None
    except Exception as error:
        raise _unreachable(pin.repo, pin.commit, error, offline) from None
    for name, entry in pin.files.items():
        _check_file(Path(folder) / name, name, entry, pin)
    return Path(folder)


def _check_file(path: Path, name: str, entry: dict[str, Any], pin: Pin) -> None:
    if not path.is_file():
        raise ModelMissingError(f"{name} of {pin.repo} is not on this machine", pull_command(pin.repo))
    found = manifest.sha256(path) if "sha256" in entry else _git_blob_id(path)
    if found != entry.get("sha256", entry.get("git")):
        path.resolve().unlink(missing_ok=True)  # or the next pull would find the same bytes
        path.unlink(missing_ok=True)
        raise CorruptWeightsError(f"{name} of {pin.repo} is not what the hub announced", "it was deleted: pull again")


def _git_blob_id(path: Path) -> str:
    data = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


def _check(pin: Pin) -> None:
    """Nothing that came over the network becomes a path before it looks like what it should be."""
    escaping = [name for name in pin.files if manifest.escapes(name)]
    if not _COMMIT.fullmatch(pin.commit) or escaping:
        raise CorruptWeightsError(
            f"the hub answered {pin.commit[:60]!r} {escaping[:3]} for {pin.repo}", "try again later"
        )


def _endpoint() -> str | None:
    """HF_ENDPOINT as it is now: the library reads it only once, at its import."""
    return os.environ.get("HF_ENDPOINT") or None


def of_repo(repo: str) -> Family | None:
    """The family whose own weights a repository holds."""
    return next((family for family in families.FAMILIES.values() if family.hub == repo), None)


def _patterns(family: Family | None) -> dict[str, Any]:
    """What is fetched, of whatever family where that is not known."""
    known = families.FAMILIES.values() if family is None else (family,)
    return {
        "allow_patterns": [pattern for each in known for pattern in each.wanted],
        "ignore_patterns": [pattern for each in known for pattern in each.unwanted],
    }


def pull_command(repo: str) -> str:
    """The remedy for files that only the network has."""
    return f"`unipic-run pull {repo}` fetches it, with the network on"


def _unreachable(repo: str, revision: str, error: Exception, offline: bool = False) -> ModelMissingError:
    """The library's own texts advise on its own options; ours say why and what helps here."""
    if isinstance(error, FileNotFoundError) and isinstance(error.__cause__, Exception):  # not found, and why
        error = error.__cause__
    kinds = [kind.__name__ for kind in type(error).__mro__]
    if offline:  # whatever else it says, nobody was asked
        kinds = [*kinds[:1], "OfflineModeIsEnabled"]
    name = next((kind for kind in CAUSES if kind in kinds), None)
    detail = textwrap.shorten(f"{kinds[0]}: {error}", 160, placeholder=" ...")
    why, remedy = CAUSES[name] if name else ("{detail}", "check the name and the network")
    status = getattr(getattr(error, "response", None), "status_code", "unknown")
    facts = {"repo": repo, "pull": pull_command(repo), "status": status, "kind": kinds[0], "detail": detail}
    return ModelMissingError(f"{repo} at {revision} could not be had ({why.format(**facts)})", remedy.format(**facts))


def _progress_bar(total: int, on_progress: Progress | None) -> type:
    """A silent tqdm class that hands the bytes so far to `on_progress`; the library makes one bar for all files."""
    from tqdm import tqdm

    class Bar(tqdm):
        def __init__(self, *args: Any, **options: Any) -> None:
            self.counts_bytes = options.get("unit") == "B"
            options.pop("name", None)
            super().__init__(*args, **{**options, "disable": True})

        def update(self, n: float | None = 1) -> None:
            self.n += n or 0
            if self.counts_bytes and on_progress is not None:
                on_progress("download", min(int(self.n), total), total)

    return Bar
