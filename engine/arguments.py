"""The command line's own words turned into values: prompts from a file or stdin, sizes, the settings a PNG repeats."""

import re
import sys
from collections.abc import Sequence
from io import StringIO
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from .checkpoint.cache import cached, folder_named, local_name, path_named
from .checks import PATCH, check_side
from .errors import UsageError
from .request import GPU_BATCH
from .sampling import EXACT, SAMPLED, SPED, Sampling, as_sampling

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_TEXT = 16 * 2**20  # bytes of a prompt file
INT8 = "int8-qk"  # changes the arithmetic; of the other backends a machine may lack the package, and auto finds one
REPEATED = (
    "prompt",
    "seed",
    "speed",
    *SAMPLED,
    "model",
    "dtype",
    "quant",
    "exact_rope",
)


def given(**options: Any) -> dict[str, Any]:
    """The options that were set."""
    return {name: value for name, value in options.items() if value is not None}


def check_not_empty(arguments: Sequence[str]) -> None:
    """Raises UsageError for an option whose value is empty, most likely a variable that is not set."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    words = arguments[:end]
    empty = [before for before, word in pairwise(words) if word == "" and before.startswith("-")]
    empty += [word[:-1] for word in words if word.startswith("--") and word.endswith("=")]
    for name in empty:
        if name != "--negative":
            raise UsageError(f"the value '' of {name} is empty", "give it one, or leave it out")


def check_stdin(*sources: str | None) -> None:
    """Raises UsageError where several arguments are to be read from stdin."""
    if sources.count("-") > 1:
        raise UsageError("- given twice, but stdin holds one thing", "name a file, or write the text in its place")


def read_prompts(words: str | Sequence[str] | None, file: str | None = None, instead: str | None = None) -> list[str]:
    """The prompts of the command line, or of the lines of `file`; `-` is stdin in both places. Else `instead`.

    Raises UsageError when both are given or none is, or when a file holds no text.
    """
    words = [] if words is None else [words] if isinstance(words, str) else list(words)
    if words and file is not None:
        raise UsageError("both a prompt and --prompt-file given", "use one of them")
    if "-" in words and len(words) > 1:
        raise UsageError("- among other texts", "give - alone: it reads one text a line from stdin")
    source = "-" if "-" in words else file
    if source is None and not words and instead is None:
        raise UsageError("no prompt given", "write one in quotes, or give --prompt-file, or - for stdin")
    if source is None:
        return words or [instead]
    lines = [line.strip() for line in StringIO(_text(source), newline=None)]  # at line ends, and at nothing else
    if not any(lines):
        raise UsageError(f"{'stdin' if source == '-' else source} holds no prompt", "write one a line")
    return list(filter(None, lines))


def read_picture(source: str) -> "Image":
    """An RGB picture from a path, or from stdin for `-`. Raises ImageError, UsageError."""
    from .image_file import MAX_FILE_BYTES
    from .picture import open_image

    if source != "-":
        return open_image(source)
    stdin = _stdin()
    if stdin.isatty():
        raise UsageError("stdin is a terminal, not a picture", "pipe a file into it, or name the file")
    return open_image(stdin.read(MAX_FILE_BYTES + 1))


def parse_size(text: str) -> tuple[int, int]:
    """`WxH` in pixels."""
    found = re.fullmatch(r"(\d{1,9})[xX×](\d{1,9})", text.strip(), re.ASCII)
    if not found:
        raise UsageError(f"size {text[:100]!r} is not WIDTHxHEIGHT", "write for example 1024x768")
    return int(found[1]), int(found[2])


def wanted_size(res: int | None, size: str | None) -> tuple[int, int] | None:
    """--res or --size as (width, height); None if neither is given."""
    if res is not None and size is not None:
        raise UsageError("both --res and --size given", "use --res for a square, --size for anything else")
    if res is not None:
        check_side("res", res)
        return res, res
    return None if size is None else parse_size(size)


def parse_outpaint(text: str) -> tuple[int, int, int, int]:
    """`L,T,R,B` in pixels."""
    if not re.fullmatch(r"\d{1,9}(,\d{1,9}){3}", text.strip(), re.ASCII):
        raise UsageError(f"outpaint {text[:100]!r} is not four numbers", "write left,top,right,bottom: 0,0,128,0")
    left, top, right, bottom = map(int, text.split(","))
    return left, top, right, bottom


def repeated_settings(png: str, model: str | None, speed: str | None) -> dict[str, Any]:
    """What `gen --from` takes over from a picture: REPEATED, INT8 attention, and `size` as (width, height).

    What belongs to its speed, SPED, is left out where `speed` is another or exact, or where it had one and `model` is
    another.
    A picture may name a model that is here or well known; it must not start the download of anything else, so that
    needs a `model` named on the line. Raises ImageError for pictures without our settings, UsageError for those that
    text alone does not make again.
    """
    from .families import short_names
    from .png_metadata import read_settings

    found = read_settings(png)
    if found.get("task") != "generate":
        task = str(found.get("task"))[:40]
        raise UsageError(f"{png} was made by {task!r}, not from text alone", "--from repeats pictures of `gen`")
    sped = found.get("speed", EXACT)
    other_model = model is not None and not _names(model, str(found.get("model")))
    anew = speed == EXACT or speed not in (None, sped) or (sped != EXACT and other_model)
    left = SPED if anew else ()
    settings = {name: found[name] for name in REPEATED if name not in left and found.get(name) is not None}
    for name in ("prompt", "model", "dtype", "quant"):
        if not isinstance(settings.get(name, ""), str):
            raise UsageError(f"{png} carries a {name} that is no text", "give the options by hand")
    made_by = settings.get("model", "unipic")
    if not (model or made_by in short_names() or folder_named(made_by) or cached(made_by)):
        raise UsageError(f"{png} was made with the model {made_by[:200]!r}, which is not here", "give --model")
    if found.get("attention") == INT8:
        settings["attention"] = INT8
    try:
        if "size" in found:
            settings["size"] = parse_size(str(found["size"]))
        sampling(settings)
    except UsageError as error:
        raise UsageError(f"{png} carries wrong settings: {error.what}", "give the options by hand") from None
    if not isinstance(settings.get("exact_rope", True), bool):
        raise UsageError(f"{png} carries an exact_rope that is neither true nor false", "give the options by hand")
    return settings


def _names(model: str, said: str) -> bool:
    """Whether a picture says that of this model: of a folder without its path, of a released one with a digest."""
    path = path_named(model).resolve()
    return said in (model, Path(model).name, path.name) or said.rpartition("-")[0] == local_name(path)


def shortcuts(
    speed: str | None,
    head_steps: str | None,
    order: str | None,
    cfg_interval: str | None,
    cfg_cache: float | None,
    solver: str | None,
    block_cache: float | None,
) -> dict[str, Any]:
    """What the speed options say, as `Sampling` has it."""
    pairs = given(
        head_steps=head_steps and _pair("--head-steps", head_steps, int, "50:5"),
        cfg_interval=cfg_interval and _pair("--cfg-interval", cfg_interval, float, "0:0.6"),
    )
    return pairs | given(speed=speed, order=order, cfg_cache=cfg_cache, solver=solver, block_cache=block_cache)


def _pair(name: str, text: str, number: type, example: str) -> tuple[Any, Any]:
    try:
        first, last = map(number, text.split(":"))
    except ValueError:
        raise UsageError(f"{name} {text[:100]!r} is not A:B", f"write for example {example}") from None
    return first, last


def sampling(asked: dict[str, Any], **more: Any) -> Sampling:
    return as_sampling(asked.get("seed"), {name: asked[name] for name in ("speed", *SAMPLED) if name in asked} | more)


def largest(
    task: str, images: int = 1, sampling: Sampling | None = None, size: Any = None, sources: int = 1
) -> dict[str, Any]:
    """Of Engine.from_pretrained: the command's own request is the largest one that the engine will have."""
    found = {"task": task, "size": size, "sources": sources}
    if sampling is not None:
        together = min(images * sampling.n, sampling.batch_size or GPU_BATCH)
        found |= {"n": together, "steps": sampling.steps, "previews": sampling.preview_every > 0}
    return found


def edited_size(
    size: tuple[int, int], res: int | None, fit: str | None, margins: tuple[int, ...] | None, masked: bool
) -> tuple[int, int] | None:
    """(width, height) that an edit of a picture of `size` makes, or a square of the area; None for the trained one."""
    if fit or not (masked or margins):
        return None if res is None else (res, res)
    left, top, right, bottom = margins or (0, 0, 0, 0)
    width, height = (-(-pixels // PATCH) * PATCH for pixels in (size[0] + left + right, size[1] + top + bottom))
    return width, height


def value_of(option: Any, arguments: Sequence[str]) -> str | None:
    """What a line gives one of the parser's options, of several words the last; not all versions tell it."""
    if getattr(option, "param_type_name", None) != "option":
        return None
    end, found = arguments.index("--") if "--" in arguments else len(arguments), None
    for word, after in pairwise([*arguments[:end], ""]):
        name, equals, value = word.partition("=")
        if name in option.opts:
            found = value if equals else after
        elif word[:2] in option.opts:  # -n4
            found = word[2:]
    return found


def loading(asked: dict[str, Any], **more: Any) -> dict[str, Any]:
    """The keywords of Engine.from_pretrained."""
    names = ("model", "dtype", "quant", "exact_rope", "attention")
    return {name: asked[name] for name in names if name in asked} | more


def _text(source: str) -> str:
    """UTF-8 text of a file or stdin."""
    try:
        if source == "-":
            data = _bytes(_stdin())
        else:
            with Path(source).open("rb") as file:
                data = _bytes(file)
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"{source} is not UTF-8 text ({error.reason})", "save it as UTF-8") from None
    except (OSError, ValueError) as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(f"{source} cannot be read ({error})", "check its path and permissions") from None


def _stdin() -> BinaryIO:
    if sys.stdin is None:  # closed by whoever started us
        raise UsageError("stdin is closed", "pipe something into it, or name a file")
    return sys.stdin.buffer


def _bytes(file: BinaryIO) -> bytes:
    data = file.read(MAX_TEXT + 1)
    if len(data) > MAX_TEXT:
        raise UsageError(f"more than {MAX_TEXT // 2**20} MiB of prompts", "split them")
    return data
