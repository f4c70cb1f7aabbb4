"""Files that claim to be images: everything that is checked before a pixel is decoded.

The format goes by content, never by suffix; then come file size and the pixels that the header declares, so that a
50,000x50,000 header costs nothing.
"""

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

from PIL import Image, UnidentifiedImageError

from .errors import ImageError

FORMATS = ("PNG", "JPEG", "WEBP")
MAX_PIXELS = 64_000_000  # a decoded picture and its copy then stay under 0.6 GB
MAX_FILE_BYTES = 256 * 2**20

ImageFile = str | os.PathLike[str] | bytes  # a path, or what a file holds


@contextmanager
def image_file(source: ImageFile, formats: tuple[str, ...] = FORMATS) -> Iterator[Image.Image]:
    """An identified but not yet decoded picture, closed at the end of the block. `ImageError` if it is not one."""
    name = image_name(source)
    with _stream(name, source) as stream:
        yield _identify(name, stream, formats)


def image_name(source: ImageFile) -> str:
    """What messages call it."""
    return "the image" if isinstance(source, bytes) else f"image {str(source)[:500]!r}"


def check_pixels(name: str, size: tuple[int, int]) -> None:
    """Neither empty nor larger than `MAX_PIXELS`."""
    width, height = size
    if width < 1 or height < 1:
        raise ImageError(f"{name} is {width}x{height} and holds no pixels", "use another picture")
    if width * height > MAX_PIXELS:
        raise _too_large(name, f"{width}x{height} pixels")


def _identify(name: str, stream: BinaryIO, formats: tuple[str, ...]) -> Image.Image:
    check_pixels(name, _webp_size(stream))  # older Pillow allocates a WebP canvas when it opens the file
    try:
        # Of what is larger than we take, Pillow may warn first. A filter would be every thread's, and is not needed:
        # opening decodes nothing, and what is refused below is refused with or without it.
        picture = Image.open(stream, formats=formats)
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise _too_large(name, "far too many pixels") from error
    except UnidentifiedImageError as error:
        listed = " or ".join(", ".join(formats).rsplit(", ", 1))
        raise ImageError(f"{name} is not a readable {listed} picture", "convert it to PNG") from error
    except Exception as error:  # a hostile header may raise anything inside the decoders
        raise ImageError(f"{name} has a broken header ({error})", "save it again, or use another file") from error
    check_pixels(name, picture.size)
    return picture


def _stream(name: str, source: ImageFile) -> BinaryIO:
    """A readable stream on a regular file of bearable size."""
    if isinstance(source, bytes):
        _check_bytes(name, len(source))
        return BytesIO(source)
    if not isinstance(source, str | os.PathLike):
        raise ImageError(f"{type(source).__name__} is not an image", "pass a path or a PIL image")
    try:
        status = Path(source).stat()
        if stat.S_ISDIR(status.st_mode):
            raise ImageError(f"{name} is a folder", "name one picture in it")
        if not stat.S_ISREG(status.st_mode):
            raise ImageError(f"{name} is not a regular file", "save the picture to a file first")
        _check_bytes(name, status.st_size)
        return Path(source).open("rb")
    except ImageError:
        raise
    except FileNotFoundError as error:
        remedy = "download it first, addresses are not fetched" if "://" in name else "check the path"
        raise ImageError(f"{name} does not exist", remedy) from error
    except (OSError, ValueError) as error:  # ValueError: a null character in the path
        raise ImageError(f"{name} cannot be read ({error})", "check its path and permissions") from error


def _webp_size(stream: BinaryIO) -> tuple[int, int]:
    """The canvas a WebP header declares; (1, 1) for other formats, which Pillow opens without allocating pixels."""
    head = stream.read(30)
    stream.seek(0)
    if head[:4] != b"RIFF" or head[8:12] != b"WEBP" or len(head) < 30:
        return 1, 1
    if head[12:16] == b"VP8X":
        return int.from_bytes(head[24:27], "little") + 1, int.from_bytes(head[27:30], "little") + 1
    if head[12:16] == b"VP8L":
        packed = int.from_bytes(head[21:25], "little")
        return (packed & 0x3FFF) + 1, (packed >> 14 & 0x3FFF) + 1
    return int.from_bytes(head[26:28], "little") & 0x3FFF, int.from_bytes(head[28:30], "little") & 0x3FFF


def _check_bytes(name: str, count: int) -> None:
    if count > MAX_FILE_BYTES:
        raise ImageError(
            f"{name} has {count / 2**20:.0f} MiB, the limit is {MAX_FILE_BYTES // 2**20}", "save it smaller"
        )
    if count == 0:
        raise ImageError(f"{name} is an empty file", "use another picture")


def _too_large(name: str, what: str) -> ImageError:
    return ImageError(f"{name} has {what}, the limit is {MAX_PIXELS / 1e6:.0f} million", "scale it down first")
