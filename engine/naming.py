"""Names of output files: templates filled from the settings, and the next free name.

A template is a path the user wrote, so its own folders stand; what comes out of a field never adds one.
"""

import itertools
import os
import re
import string
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .errors import UsageError

DEFAULT_TEMPLATE = "{prompt:.40}-{seed}.png"
MAX_NAME_BYTES = 200  # of 255 that file systems allow; room for a number

_SPEC = re.compile(r"(0?\d{1,2}d?|\.\d{1,3}f?)?")  # widths, text cut to a length, decimals: nothing that can explode
_RESERVED = re.compile(r"(con|prn|aux|nul|conin\$|conout\$|com[0-9¹²³]|lpt[0-9¹²³])(\..*)?", re.IGNORECASE)
_UNSAFE = re.compile(r'[<>:"/\\|?*\s_]+')  # separators, what Windows forbids, white space


def is_template(text: str) -> bool:
    return "{" in text or "}" in text


def expand_template(template: str, settings: dict[str, Any], index: int = 0) -> Path:
    """Fill `{field}` and `{field:spec}` from the settings, `{index}` with the image's number. Raises `UsageError`.

    `{prompt:.40}` cuts, `{index:03}` pads, `{guidance:.1f}` rounds, `{{` is a brace.
    """
    fields = {name: value for name, value in settings.items() if isinstance(value, str | int | float)}
    fields["index"] = index
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise UsageError(f"output template {template!r} is malformed ({error})", "write {{ for a brace") from error
    text = "".join(
        literal + (_field(template, fields, name, spec or "", conversion) if name is not None else "")
        for literal, name, spec, conversion in parts
    )
    path = Path(text)
    return path.with_name(_fitted(path.name)) if path.name else path


def numbered(path: Path) -> Iterator[Path]:
    """The path itself, then `name-2.png`, `name-3.png`, ..."""
    yield path
    for number in itertools.count(2):
        yield path.with_name(f"{path.stem}-{number}{path.suffix}")


def free_path(path: Path, taken: frozenset[Path] = frozenset()) -> Path:
    """The first numbered path that neither exists nor is promised to another picture."""
    return next(name for name in numbered(path) if name not in taken and not os.path.lexists(name))


def safe_text(text: str) -> str:
    """Any text as a harmless piece of a file name: no separators, control characters or leading dots and dashes."""
    kept = (char if unicodedata.category(char)[0] != "C" else " " for char in unicodedata.normalize("NFC", text))
    return _UNSAFE.sub("_", "".join(kept)).strip("._- ") or "untitled"


def _field(template: str, fields: dict[str, Any], name: str, spec: str, conversion: str | None) -> str:
    if name not in fields:
        what = f"output template {template!r} has an unknown field {name!r}"
        raise UsageError(what, f"known are {', '.join(sorted(fields))}, which are set here")
    if conversion or not _SPEC.fullmatch(spec):
        raise UsageError(
            f"output template {template!r} formats {name!r} in an unknown way",
            "use {prompt:.40}, {index:03} or {x:.1f}",
        )
    try:
        return safe_text(f"{fields[name]:{spec}}")
    except ValueError as error:
        raise UsageError(f"output template {template!r} cannot show {name} ({error})", "change its format") from error


def _fitted(name: str) -> str:
    """Short enough for every file system, cut between characters, and not a device name of Windows."""
    suffix = Path(name).suffix
    stem = Path(name).stem.encode("utf-8", "replace")[: MAX_NAME_BYTES - len(suffix)].decode("utf-8", "ignore")
    return f"_{stem}{suffix}" if _RESERVED.fullmatch(stem + suffix) else stem + suffix
