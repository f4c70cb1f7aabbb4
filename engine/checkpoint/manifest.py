"""Folders that are either whole or not there: published by one rename, with sizes and sha256 of every file inside.

A folder is written as `<name>.partial-<id>` beside its destination, flushed to disk, and renamed. A lock file
`.<name>.lock` lets two processes want the same folder: the second waits, then finds it. The operating system drops
the lock of a killed process, so whoever holds the lock may delete every partial folder it finds. A folder that is
replaced is moved to `<name>.partial-<id>.old` for that moment: if its successor never came, it is put back.
"""

import errno
import hashlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock

from ..errors import CorruptWeightsError, ModelMissingError, OutputError
from .cache import MANIFEST as NAME
from .cache import again

FORMAT = 1
MAX_BYTES = 16 * 2**20
OLD = ".old"
ELSEWHERE = "choose a place that can be written; UNIPIC_RUN_CACHE names that of pulled models"
Progress = Callable[[str, int, int], None]  # (what is being done, bytes done, bytes in all)


@contextmanager
def publishing(
    dst: Path, source: dict[str, Any], on_progress: Progress | None = None, replace: bool = False
) -> Iterator[Path]:
    """Yield an empty folder to fill; on a clean exit it becomes `dst`, manifest included; otherwise it is deleted.

    `dst` must not exist, unless `replace`, and the caller holds `locked(dst)`. `source` goes into the manifest. Raises
    OutputError.
    """
    partial = dst.with_name(f"{dst.name}.partial-{uuid.uuid4().hex[:12]}")
    try:
        partial.mkdir(parents=True)
        yield partial
        write(partial, source, on_progress)
        _publish(partial, dst, replace)
    except OSError as error:
        if isinstance(error, OutputError):
            raise
        raise OutputError(f"cannot write {dst}: {error.strerror or error}", ELSEWHERE) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def locked(dst: Path) -> Iterator[None]:
    """Be the only process that makes `dst`; what killed ones left behind is removed first. Raises OutputError."""
    lock = dst.with_name(f".{dst.name}.lock")
    try:
        dst.parent.mkdir(parents=True, exist_ok=True)
        held = FileLock(lock)
        held.acquire()
    except OSError as error:
        raise OutputError(f"cannot write into {dst.parent}: {error.strerror or error}", ELSEWHERE) from error
    try:
        for stale in dst.parent.glob(f"{_literal(dst.name)}.partial-*"):
            if stale.suffix == OLD and not dst.exists():
                with suppress(OSError):
                    stale.rename(dst)
            else:
                shutil.rmtree(stale, ignore_errors=True)
        yield
    finally:
        with suppress(OSError):
            # Waiters on the deleted file check for `dst` again, and the rename decides between late ones.
            lock.unlink()
        held.release()


def write(folder: Path, source: dict[str, Any], on_progress: Progress | None = None) -> None:
    """Hash and flush every file of `folder`, then write its manifest, last."""
    from ... import __version__

    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != NAME)
    total, done = sum(path.stat().st_size for path in paths), 0
    files = {}
    for path in paths:
        files[path.relative_to(folder).as_posix()] = {"size": path.stat().st_size, "sha256": sha256(path)}
        _flush(path)
        done += path.stat().st_size
        if on_progress is not None:
            on_progress("hash", done, total)
    manifest = {
        "format": FORMAT,
        "tool": f"unipic-run {__version__}",
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "source": source,
        "files": files,
    }
    path = folder / NAME
    path.write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    _flush(path)
    for place in {folder, *(path.parent for path in paths)}:
        _flush(place)


def read(folder: Path) -> dict[str, Any]:
    """The manifest of `folder`. Raises ModelMissingError if there is none, CorruptWeightsError if it is damaged."""
    path = folder / NAME
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ValueError("too large")
        manifest = json.loads(path.read_text(encoding="utf-8"))
        names, sizes = list(manifest["files"]), [entry["size"] for entry in manifest["files"].values()]
        if manifest["format"] != FORMAT:
            raise ValueError(f"format {str(manifest['format'])[:20]}, this version reads {FORMAT}")
        if type(manifest["source"]) is not dict:
            raise ValueError("a source that is no object")
        if not all(type(size) is int for size in sizes) or any(escapes(name) for name in names):
            raise ValueError("an entry that cannot be a file of this folder")
        if not all(type(entry["sha256"]) is str for entry in manifest["files"].values()):
            raise ValueError("an entry without its sha256")
    except FileNotFoundError:
        raise ModelMissingError(f"{folder} holds no {NAME}", "give a folder that `convert` or `pull` made") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OSError) as error:
        raise CorruptWeightsError(f"{path} is damaged ({error})", again(folder)) from None
    return manifest


def check(folder: Path) -> dict[str, Any]:
    """The manifest, once every file it names is there with its size. Fast: reads no file."""
    manifest = read(folder)
    for name, entry in manifest["files"].items():
        path = folder / name
        size = path.stat().st_size if path.is_file() else None
        if size != entry["size"]:
            found = "is missing" if size is None else f"has {size} bytes, not {entry['size']}"
            raise CorruptWeightsError(f"{path} {found}", again(folder))
    return manifest


def verify(folder: Path, on_progress: Progress | None = None) -> dict[str, Any]:
    """The manifest, once every file has been read and its sha256 is the recorded one."""
    manifest = check(folder)
    total, done = sum(entry["size"] for entry in manifest["files"].values()), 0
    for name, entry in manifest["files"].items():
        if sha256(folder / name) != entry["sha256"]:
            raise CorruptWeightsError(f"{folder / name} has changed since it was written", again(folder))
        done += entry["size"]
        if on_progress is not None:
            on_progress("verify", done, total)
    return manifest


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_file(path: Path, text: str) -> None:
    """Replace a small file in one step: never seen half-written."""
    partial = path.with_name(f"{path.name}.partial-{uuid.uuid4().hex[:12]}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(text, encoding="utf-8")
        _flush(partial)
        partial.replace(path)
    except OSError as error:
        with suppress(OSError):
            partial.unlink()
        raise OutputError(f"cannot write {path}: {error.strerror or error}", ELSEWHERE) from error


def _publish(partial: Path, dst: Path, replace: bool) -> None:
    old = partial.with_name(partial.name + OLD)
    if replace and dst.exists():
        dst.rename(old)
    try:
        partial.rename(dst)
    except OSError as error:
        if old.exists() and not dst.exists():
            old.rename(dst)
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise OutputError(f"{dst} has appeared meanwhile", "nothing was overwritten; choose another name") from None
        raise
    _flush(dst.parent)
    shutil.rmtree(old, ignore_errors=True)


def _flush(path: Path) -> None:
    """Push a file, or a folder's list of names, to the disk."""
    if path.is_dir() and os.name != "posix":
        return  # Windows cannot open a folder
    descriptor = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def escapes(name: str) -> bool:
    """Whether a relative file name could leave its folder."""
    return Path(name).is_absolute() or ".." in Path(name).parts or "\\" in name or not name


def _literal(name: str) -> str:
    """`name` for a glob, its wildcards taken literally."""
    return "".join(f"[{c}]" if c in "[]*?" else c for c in name)
