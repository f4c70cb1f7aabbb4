"""Where finished pictures go: stdout, one path, numbered paths, or names filled from a template.

Whatever can be refused is refused by `check` before the work starts; afterwards nothing that exists is replaced
unless that was allowed, and no finished picture is lost to a name that was taken meanwhile: it gets a number.
"""

import os
import string
import sys
import warnings
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from .errors import OutputError, UnipicWarning, UsageError
from .naming import DEFAULT_TEMPLATE, expand_template, free_path, is_template
from .png_metadata import check_output, save_png

MOST_ROUNDS = 9999  # a preview's number, for how long its name may get


class Outputs:
    """The pictures of one run, by their number from 0.

    `target`: None for the default template here, `-` for stdout, a folder (default template inside), a template, or
    a path. A path for several pictures is numbered: `a.png` becomes `a-1.png`, `a-2.png`, ...
    """

    def __init__(self, target: str | None, overwrite: bool = False, metadata: bool = True) -> None:
        self.stream = target == "-"
        self.target = _in_folder(target) if target is None or _is_folder(target) else target
        self.overwrite, self.metadata = overwrite, metadata
        self.fixed: list[Path] = []
        self.places: dict[int, Path] = {}

    def check(self, settings: Sequence[dict[str, Any]], previews: bool = False, unknown: Collection[str] = ()) -> None:
        """Refuse before the work what could not be saved after it. `settings`: what is known of each picture.

        `unknown`: those of them that are placeholders so far.
        """
        count = len(settings)
        if self.stream:
            _check_stream(count, previews)
        elif is_template(self.target):
            self.check_names(settings, unknown)
        else:
            path = Path(self.target)
            check_output(path, overwrite=self.overwrite or count > 1)
            self.fixed = [path] if count == 1 else [_numbered(path, number, count) for number in range(1, count + 1)]
            for path in self.fixed:
                check_output(path, overwrite=self.overwrite)
                if previews:
                    check_output(_preview(path, MOST_ROUNDS), overwrite=True)

    def check_names(self, settings: Sequence[dict[str, Any]], unknown: Collection[str] = ()) -> None:
        """Those of a template, if the target is one; folders that an unknown setting names are not looked for."""
        if self.stream or not is_template(self.target):
            return
        names = [expand_template(self.target, known, index) for index, known in enumerate(settings, 1)]
        if not _fields(Path(self.target).parent) & {*unknown}:
            for path in set(names):
                check_output(path, overwrite=True)

    def save(self, index: int, image: Image.Image, settings: dict[str, Any]) -> Path | None:
        """Write picture `index`; None if it went to stdout."""
        carried = settings if self.metadata else None
        if self.stream:
            return save_png(image, sys.stdout.buffer, carried)
        path = self.place(index, settings)
        return save_png(image, path, carried, overwrite=self.overwrite, renumber=not self.overwrite)

    def preview(self, index: int, image: Image.Image, settings: dict[str, Any], number: int) -> Path | None:
        """Write a preview beside where picture `index` will be, `<stem>-preview-<number>.png`, with its settings."""
        path, carried = _preview(self.place(index, settings), number), settings | {"preview_of_round": number}
        how = {"overwrite": self.overwrite, "renumber": not self.overwrite}
        return save_png(image, path, carried if self.metadata else None, **how)

    def place(self, index: int, settings: dict[str, Any]) -> Path:
        """The path of picture `index`, settled when first asked for."""
        if index not in self.places:
            taken = frozenset(self.places.values())
            path = self.fixed[index] if self.fixed else self._named(index, settings)
            if path in taken or not (self.fixed or self.overwrite):
                path = free_path(path, taken)
            self.places[index] = path
        return self.places[index]

    def _named(self, index: int, settings: dict[str, Any]) -> Path:
        """By the template; here, rather than lost, where its folder is not there."""
        path = expand_template(self.target, settings, index + 1)
        if path.parent.is_dir():
            return path
        note = f"the folder {str(path.parent)!r} does not exist: pictures that belong there are saved here"
        warnings.warn(note, UnipicWarning, stacklevel=4)
        return free_path(Path(path.name), frozenset(self.places.values()))  # nobody named this one to be overwritten


def _check_stream(count: int, previews: bool) -> None:
    if count > 1:
        raise UsageError(f"{count} pictures do not fit one stdout", "ask for one, or give -o a path")
    if previews:
        raise UsageError("previews have no place beside stdout", "give -o a path")
    if getattr(sys.stdout, "name", None) == os.devnull:  # it stands in place of one that was closed
        raise OutputError("stdout is closed", "redirect it, or give -o a path")
    if sys.stdout.isatty():
        raise OutputError("stdout is a terminal, which cannot show a PNG", "redirect it, or give -o a path")


def _preview(path: Path, number: int) -> Path:
    return path.with_name(f"{path.stem}-preview-{number}{path.suffix}")


def _fields(template: Path) -> set[str]:
    return {name for _, name, *_ in string.Formatter().parse(str(template)) if name}


def _is_folder(target: str) -> bool:
    return target.endswith(("/", os.sep)) or os.path.isdir(target)  # noqa: PTH112 (it never raises)


def _in_folder(folder: str | None) -> str:
    """The default template, in a folder whose own braces stand for themselves."""
    literal = (folder or "").replace("{", "{{").replace("}", "}}")
    return str(Path(literal, DEFAULT_TEMPLATE)) if folder else DEFAULT_TEMPLATE


def _numbered(path: Path, number: int, count: int) -> Path:
    return path.with_name(f"{path.stem}-{number:0{len(str(count))}}{path.suffix}")
