"""Pictures in and out: safe opening, the shapes the models want, uint8 and [-1, 1] tensors.

Sizes are (width, height) in pixels as in PIL; arrays and tensors are row-major, [H, W]. Only the two tensor functions
import torch, so that the command line can look at pictures without paying for it.
"""

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from io import IOBase
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageOps

from .checks import PATCH
from .errors import ImageError
from .image_file import ImageFile, check_pixels, image_file, image_name

if TYPE_CHECKING:
    import torch

MAX_PADDED_SIDE = 8192  # a thin strip is shrunk to this before it is padded to a square

Source = ImageFile | Image.Image
ALONE = str | os.PathLike | bytes | bytearray | IOBase | Mapping | Image.Image  # never several pictures


@dataclass(frozen=True)
class Canvas:
    """A picture ready for masked sampling: padded to whole cells of 16x16 pixels on the right and bottom.

    `mask` bool [H, W] is True where pixels are to be regenerated, never in the padding; `cells` bool [H/16, W/16] is
    True where a cell holds such a pixel; `box` (left, top, right, bottom) cuts the result out of the canvas.
    """

    image: Image.Image
    mask: np.ndarray
    cells: np.ndarray
    box: tuple[int, int, int, int]


def open_image(source: Source) -> Image.Image:
    """A path, a file's bytes or a PIL image -> an RGB picture: upright, transparency on white. Raises `ImageError`."""
    return _converted(_decoded(source), "RGB", background=255)


def open_images(sources: Iterable[Source] | Source | None) -> tuple[Image.Image, ...]:
    """Like `open_image`, of several, of one that is in no list, or of none."""
    if sources is None:
        return ()
    if isinstance(sources, ALONE) or not isinstance(sources, Iterable):
        return (open_image(sources),)
    return tuple(map(open_image, sources))


def open_mask(source: Source, size: tuple[int, int]) -> Image.Image:
    """Like `open_image`, for a mask of a picture of `size`: an "L" image of 0 and 255, where 255 means regenerate.

    A pixel counts as white from luminance 128 on; transparency is put on black, so what is not there is kept.
    """
    picture = _decoded(source)
    if picture.size != tuple(size):
        raise ImageError(
            f"the mask is {picture.width}x{picture.height} but the picture is {size[0]}x{size[1]}",
            "give a mask of the same size",
        )
    mask = _converted(picture, "L", background=0).point(lambda level: 255 if level >= 128 else 0)
    if mask.getbbox() is None:
        raise ImageError("the mask has no white pixel", "paint white (128 to 255) what to regenerate, the rest black")
    return mask


def pad_square(image: Image.Image, res: int, fill: int = 127) -> Image.Image:
    """Grey bars make the picture square, bicubic resizing makes it `res` pixels wide: understanding, as released."""
    side = max(image.size)
    if side > MAX_PADDED_SIDE:
        width, height = (max(1, length * MAX_PADDED_SIDE // side) for length in image.size)
        image = resize(image, (width, height))
        side = MAX_PADDED_SIDE
    square = Image.new("RGB", (side, side), (fill, fill, fill))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return resize(square, (res, res))


def center_crop(image: Image.Image, res: int) -> Image.Image:
    """The middle square, resized to `res` pixels: editing, as released."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return resize(image.crop((left, top, left + side, top + side)), (res, res))


def resize(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """PIL's bicubic, which widens its filter when it shrinks; the released code uses the same."""
    return image.resize(size, Image.Resampling.BICUBIC)


def fit_mask(mask: Image.Image, size: tuple[int, int], crop: bool) -> Image.Image:
    """A mask ("L") resized like its picture; a place that holds any white stays white."""
    side = min(mask.size)
    left, top = (mask.width - side) // 2, (mask.height - side) // 2
    box = (left, top, left + side, top + side) if crop else None
    share = mask.convert("F").resize(size, Image.Resampling.BOX, box=box)
    return Image.fromarray(np.where(np.asarray(share) > 0, 255, 0).astype(np.uint8))


def fit_area(width: int, height: int, res: int) -> tuple[int, int]:
    """The size of the same aspect with about `res` squared pixels; sides are multiples of 16 and at least 16."""
    scale = res / (width * height) ** 0.5
    longest = max(PATCH, res * res // PATCH)  # beyond it even the thinnest strip has more than the area
    fitted = [min(longest, max(PATCH, round(side * scale / PATCH) * PATCH)) for side in (width, height)]
    return fitted[0], fitted[1]


def pad_to_patch(
    image: Image.Image, mask: Image.Image | None = None, outpaint: tuple[int, int, int, int] | None = None
) -> Canvas:
    """The canvas for a mask ("L", the picture's size) or for `outpaint` new pixels left, top, right and bottom.

    New pixels and the padding to whole cells repeat the picture's edge, which the VAE sees as quiet surroundings.
    """
    if (mask is None) == (outpaint is None):
        raise ValueError("pad_to_patch takes either a mask or outpaint")
    left, top, right, bottom = outpaint or (0, 0, 0, 0)
    width, height = image.width + left + right, image.height + top + bottom
    check_pixels("the outpainted picture", (width, height))
    below, beside = -height % PATCH, -width % PATCH
    pixels = np.pad(np.asarray(image), ((top, bottom + below), (left, right + beside), (0, 0)), mode="edge")

    wanted = np.zeros(pixels.shape[:2], dtype=bool)
    if mask is not None:
        wanted[:height, :width] = np.asarray(mask) >= 128
    else:
        wanted[:height, :width] = True
        wanted[top : top + image.height, left : left + image.width] = False
    rows, columns = wanted.shape[0] // PATCH, wanted.shape[1] // PATCH
    cells = wanted.reshape(rows, PATCH, columns, PATCH).any(axis=(1, 3))
    return Canvas(Image.fromarray(pixels), wanted, cells, (0, 0, width, height))


def composite(source: Image.Image, generated: Image.Image, mask: np.ndarray) -> Image.Image:
    """`generated` where `mask` bool [H, W], elsewhere exactly the pixels of `source`. All of one size."""
    return Image.fromarray(np.where(mask[..., None], np.asarray(generated), np.asarray(source)))


def to_pixels(image: Image.Image, dtype: "torch.dtype", *, cast_first: bool) -> "torch.Tensor":
    """RGB picture -> [1, 3, H, W] in [-1, 1].

    The released understanding code casts first and scales in `dtype`, its editing code scales in float32 and casts
    last; in bfloat16 the two differ in most values.
    """
    import torch

    levels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
    return (levels.to(dtype if cast_first else torch.float32) / 255 * 2 - 1).to(dtype)


def to_images(levels: "torch.Tensor") -> list[Image.Image]:
    """uint8 [B, H, W, 3] on any device -> B pictures."""
    return [Image.fromarray(picture) for picture in levels.cpu().numpy()]


def _decoded(source: Source) -> Image.Image:
    """Any source -> a decoded, upright picture in an 8-bit mode."""
    if isinstance(source, Image.Image):
        check_pixels("the image", source.size)
        return _upright("the image", source)
    with image_file(source) as picture:
        name = image_name(source)
        # A JPEG with a second picture (MPO: depth or gain maps of phones) is a photograph, the first one is it.
        frames = 1 if picture.format == "MPO" else getattr(picture, "n_frames", 1)
        if frames > 1:
            raise ImageError(f"{name} is an animation of {frames} frames", "save one frame as a PNG")
        return _upright(name, picture)


def _upright(name: str, picture: Image.Image) -> Image.Image:
    try:
        picture.load()
    except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error, ...
        raise ImageError(f"{name} is truncated or damaged ({error})", "save it again, or use another file") from error
    try:
        picture = ImageOps.exif_transpose(picture)
    except Exception:  # a broken orientation tag does not make the picture unreadable
        picture = picture.copy()
    if picture.mode.startswith("I;16"):  # PIL clips at 255 instead of scaling
        levels, clear = np.asarray(picture).astype(np.float32), picture.info.get("transparency")
        picture = Image.fromarray(np.rint(levels / 257).astype(np.uint8))
        if isinstance(clear, int):  # the level that stands for nothing
            picture.putalpha(Image.fromarray(np.where(levels == clear, 0, 255).astype(np.uint8)))
    if picture.mode in ("I", "F"):
        raise ImageError(f"{name} has mode {picture.mode!r}, whose brightest value is unknown", "convert it to RGB")
    return picture


def _converted(picture: Image.Image, mode: str, background: int) -> Image.Image:
    """In `mode`, transparency put on a grey level, without the file's metadata: no camera, no place."""
    try:
        if picture.has_transparency_data:
            colours = picture.convert("RGBA")
            picture = Image.alpha_composite(Image.new("RGBA", colours.size, (background,) * 3 + (255,)), colours)
        picture = picture.convert(mode)
    except ValueError as error:
        raise ImageError(f"the image mode {picture.mode!r} has no way to {mode}", "convert it to RGB first") from error
    picture.info = {}
    return picture
