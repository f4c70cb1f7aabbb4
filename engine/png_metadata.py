"""PNG files that carry the settings they were made with, written whole or not at all.

Two text chunks: `unipic_run` holds the settings as JSON, `parameters` the line that web UIs and image viewers read.
Nothing here needs torch.
"""

import json
import os
import uuid
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from .errors import ImageError, OutputError, UsageError
from .image_file import ImageFile, image_file, image_name
from .naming import numbered

KEY = "unipic_run"
MAX_SETTINGS_BYTES = 2**20  # a prompt of 100 kB fits several times

# What `parameters` shows of the settings: its label and our key, in the customary order.
_LABELS = (
    ("Steps", "steps"),
    ("CFG scale", "guidance"),
    ("Seed", "seed"),
    ("Size", "size"),
    ("Model", "model"),
    ("Version", "version"),
)


def save_png(
    image: Image.Image,
    target: str | os.PathLike[str] | BinaryIO,
    settings: dict[str, Any] | None = None,
    *,
    overwrite: bool = False,
    renumber: bool = False,
) -> Path | None:
    """Write `image` with its settings to a path or a binary stream; returns where it went, None for a stream.

    A path appears complete or not at all (temporary file beside it, fsync, rename). When it exists: `overwrite`
    replaces it, `renumber` takes the next free name (`a-2.png`), otherwise `OutputError`.
    """
    if not isinstance(image, Image.Image):
        raise UsageError(f"the picture is {type(image).__name__}, not a PIL image", "pass for example result.images[0]")
    data = _encoded(image, settings)
    if not isinstance(target, str | os.PathLike):
        try:
            target.write(data)
            target.flush()
        except OSError as error:
            remedy = "is its reader alive?" if isinstance(error, BrokenPipeError) else "make room, or send it elsewhere"
            raise OutputError(f"the picture cannot be written to the stream ({error})", remedy) from error
        return None
    path = Path(target)
    check_output(path, overwrite=overwrite or renumber)
    return _publish(data, path, overwrite, renumber)


def check_output(target: str | os.PathLike[str], *, overwrite: bool = False) -> None:
    """Raise `OutputError` if a picture could not be saved there: call it before the minutes are spent, too."""
    path = Path(target)
    if path.suffix.lower() != ".png":
        wrong = "has no name before its .png" if path.name.lower() == ".png" else "does not end in .png"
        raise OutputError(f"output {str(path)!r} {wrong}", "images are written as PNG, name it so")
    try:
        if not path.parent.is_dir():
            raise OutputError(f"the folder {str(path.parent)!r} does not exist", "create it, or choose another output")
        with suppress(FileNotFoundError):
            path.lstat()  # raises for names that no file can have
        if path.exists() and not path.is_file():
            raise OutputError(f"output {str(path)!r} is not a regular file", "choose another name, or - for stdout")
        if not overwrite and os.path.lexists(path):
            raise _exists(path)
        if not os.access(path.parent, os.W_OK):
            raise OutputError(f"the folder {str(path.parent)!r} is not writable", "choose another output")
    except OutputError:
        raise
    except (OSError, ValueError) as error:  # a name too long, a null character
        raise OutputError(f"output {str(path)[:500]!r} cannot be used ({error})", "choose another name") from error


def read_settings(source: ImageFile) -> dict[str, Any]:
    """The settings a PNG was made with. `ImageError` if it carries none of ours, or damaged ones."""
    name = image_name(source)
    with image_file(source, formats=("PNG",)) as picture:  # text before the pixels is read with the header
        text = picture.info.get(KEY)
    if not isinstance(text, str):
        raise ImageError(f"{name} carries no unipic-run settings", "only PNGs saved by unipic-run with metadata do")
    if len(text) > MAX_SETTINGS_BYTES:
        raise ImageError(f"{name} carries {len(text)} bytes of settings", f"at most {MAX_SETTINGS_BYTES} are read")
    try:
        settings = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ImageError(f"{name} carries damaged settings ({error})", "give the options by hand") from error
    if not isinstance(settings, dict):
        raise ImageError(f"{name} carries settings that are not an object", "give the options by hand")
    return settings


def parameters_text(settings: dict[str, Any]) -> str:
    """The prompt, a line with the negative prompt, and a line of `name: value` pairs; what is not set is left out."""
    lines = [str(settings.get("prompt", ""))]
    if settings.get("negative"):
        lines.append(f"Negative prompt: {settings['negative']}")
    pairs = [f"{label}: {_quoted(settings[key])}" for label, key in _LABELS if settings.get(key) is not None]
    return "\n".join([*lines, ", ".join(pairs)])


def _quoted(value: object) -> str:
    """Readers split the line at commas and colons, so a value that holds one is quoted as JSON."""
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if any(mark in text for mark in ",:\n") else text


def _encoded(image: Image.Image, settings: dict[str, Any] | None) -> bytes:
    info = PngInfo()
    if settings is not None:
        info.add_text(KEY, json.dumps(settings, default=str))  # ASCII: even a broken character comes back
        shown = {**settings, "size": f"{image.width}x{image.height}"}
        # Latin-1 text becomes a tEXt chunk, which every reader knows, anything else iTXt.
        info.add_text("parameters", parameters_text(shown).encode("utf-8", "replace").decode("utf-8"))
    buffer = BytesIO()
    try:
        image.save(buffer, format="PNG", pnginfo=info)
    except OSError as error:
        raise OutputError(f"a picture of mode {image.mode} is no PNG ({error})", "convert it to RGB") from error
    return buffer.getvalue()


def _publish(data: bytes, path: Path, overwrite: bool, renumber: bool) -> Path:
    temporary = path.with_name(f".unipic-run.partial-{uuid.uuid4().hex}")
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if overwrite:
            temporary.replace(path)
            final = path
        else:
            final = next(name for name in (numbered(path) if renumber else [path]) if _claim(temporary, name))
        _sync_folder(path.parent)
        return final
    except StopIteration:
        raise _exists(path) from None
    except OSError as error:
        raise OutputError(f"output {str(path)!r} cannot be written ({error})", "choose a writable place") from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def _claim(temporary: Path, path: Path) -> bool:
    """Give the file its name unless the name is taken; two writers cannot both succeed where hard links exist."""
    try:
        path.hardlink_to(temporary)
    except FileExistsError:
        return False
    except (OSError, NotImplementedError):  # file systems without hard links
        if os.path.lexists(path):
            return False
        temporary.rename(path)
    return True


def _sync_folder(folder: Path) -> None:
    if os.name == "nt":  # a folder cannot be opened there
        return
    with suppress(OSError):  # write-only folders and some network file systems refuse; the picture itself is on disk
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _exists(path: Path) -> OutputError:
    return OutputError(
        f"{str(path)!r} exists already", "choose another name, or add --overwrite (save_png keyword overwrite)"
    )
