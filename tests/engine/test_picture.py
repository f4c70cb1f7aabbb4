"""Opening hostile and odd files, and the shapes and arithmetic the models were trained with."""

import contextlib
import itertools
import struct
import sys
import time
import warnings
import zlib
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from unipic_run.engine import picture
from unipic_run.engine.errors import ImageError
from unipic_run.engine.image_file import MAX_PIXELS

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}


def noise(width: int, height: int, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(width * height).integers(0, 256, (height, width, channels), dtype=np.uint8)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_header(width: int, height: int) -> bytes:
    start = b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return start + png_chunk(b"IDAT", zlib.compress(bytes(1000))) + png_chunk(b"IEND", b"")


def jpeg_header(width: int, height: int) -> bytes:
    small = encoded(Image.new("RGB", (8, 8)), "JPEG")
    frame = small.index(b"\xff\xc0")
    return small[: frame + 5] + struct.pack(">HH", height, width) + small[frame + 9 :]


def webp_header(width: int, height: int) -> bytes:
    canvas = bytes(4) + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    body = b"WEBPVP8X" + struct.pack("<I", 10) + canvas + encoded(Image.new("RGB", (8, 8)), "WEBP")[12:]
    return b"RIFF" + struct.pack("<I", len(body)) + body


@pytest.fixture(scope="module")
def recorded(goldens):
    return load_file(goldens / "cases" / "preprocess.safetensors")


@pytest.mark.parametrize("shape", ["wide", "tall", "square"])
def test_preprocessing_equals_the_recorded_original(goldens, recorded, shape):
    source = picture.open_image(goldens / "cases" / f"pre_{shape}.png")
    padded, cropped = picture.pad_square(source, 48), picture.center_crop(source, 48)
    assert np.array_equal(np.asarray(padded), recorded[f"{shape}.pad_u8"].numpy())
    for name, dtype in DTYPES.items():
        ways = {"pad": picture.to_pixels(padded, dtype, cast_first=True)}
        ways["crop"] = picture.to_pixels(cropped, dtype, cast_first=False)
        for way, pixels in ways.items():
            want = recorded[f"{shape}.{way}_{name}"]
            assert pixels.dtype == dtype and pixels.shape == want.shape
            torch.testing.assert_close(pixels, want, rtol=0, atol=5e-5 if name == "f32" else 0)


def test_the_two_arithmetics_differ_in_bfloat16():
    image = Image.fromarray(noise(32, 32))
    early, late = (picture.to_pixels(image, torch.bfloat16, cast_first=first) for first in (True, False))
    assert 0.2 < (early != late).float().mean() < 0.9


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_lossless_files_come_back_exactly(tmp_path, kind):
    pixels = noise(37, 21)
    path = tmp_path / "picture.anything"  # the content decides, never the suffix
    path.write_bytes(encoded(Image.fromarray(pixels), kind, lossless=True))
    opened = picture.open_image(path)
    assert opened.mode == "RGB" and np.array_equal(np.asarray(opened), pixels)


@pytest.mark.parametrize("size", [(50_000, 50_000), (MAX_PIXELS // 1000 + 1, 1000), (2**31 - 1, 2**31 - 1)])
@pytest.mark.parametrize("header", [png_header, jpeg_header, webp_header])
def test_a_huge_header_is_refused_at_once_without_memory(header, size):
    resource = pytest.importorskip("resource")
    if header is not png_header:
        size = tuple(min(side, 65_000 if header is jpeg_header else 2**24) for side in size)
    file = header(*size)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    with pytest.raises(ImageError, match="limit is 64 million"):
        picture.open_image(file)
    assert time.perf_counter() - start < 1.0
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss, in bytes
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * unit < 32 * 2**20


@pytest.mark.parametrize("action", ["ignore", "error"])
def test_a_picture_that_pillow_warns_of_is_refused(action):
    with warnings.catch_warnings():
        warnings.simplefilter(action)
        with pytest.raises(ImageError, match="limit is 64 million"):
            picture.open_image(png_header(10_000, 9_500))


def test_opening_leaves_alone_what_other_threads_do_with_warnings(monkeypatch):
    seen, identify = [], Image.open

    def watched(*how, **more):
        seen.append(warnings.filters[:])
        return identify(*how, **more)

    monkeypatch.setattr(Image, "open", watched)
    picture.open_image(encoded(Image.new("RGB", (9, 9)), "PNG"))
    assert seen == [warnings.filters], "filters are the whole process's"


def test_one_picture_is_opened_like_a_list_of_one(tmp_path):
    data = encoded(Image.fromarray(noise(9, 7)), "PNG")
    path = tmp_path / "w.png"
    path.write_bytes(data)
    for given in (str(path), path, data, Image.open(path), [path], (each for each in [path])):
        (opened,) = picture.open_images(given)
        assert np.array_equal(np.asarray(opened), noise(9, 7))
    assert picture.open_images(None) == picture.open_images([]) == ()
    with pytest.raises(ImageError, match="int is not an image"):
        picture.open_images(5)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_every_truncation_is_a_typed_error(kind):
    whole = encoded(Image.fromarray(noise(24, 24)), kind)
    for length in range(0, len(whole) - 40, 17):  # a cut in the checksums after the last pixel loses nothing
        with pytest.raises(ImageError):
            picture.open_image(whole[:length])


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_random_damage_is_an_error_or_a_picture_never_a_crash(kind):
    rng = np.random.default_rng(3)
    whole = encoded(Image.fromarray(noise(24, 24)), kind)
    for _ in range(150):
        damaged = bytearray(whole)
        for place in rng.integers(0, len(whole), 4):
            damaged[place] = rng.integers(0, 256)
        with contextlib.suppress(ImageError):
            assert picture.open_image(bytes(damaged)).mode == "RGB"


@pytest.mark.parametrize("kind", ["GIF", "BMP", "TIFF", "PPM", "ICO"])
def test_other_formats_are_refused(kind):
    with pytest.raises(ImageError, match="not a readable PNG, JPEG or WEBP picture"):
        picture.open_image(encoded(Image.new("RGB", (16, 16)), kind))


@pytest.mark.parametrize(
    "content", [b"%!PS-Adobe-3.0 EPSF-3.0\n", b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"hello"]
)
def test_what_is_no_picture_is_refused(content):
    with pytest.raises(ImageError, match="not a readable"):
        picture.open_image(content)


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_an_animation_is_refused_with_a_way_out(kind):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue", "green")]
    with pytest.raises(ImageError, match="animation of 3 frames: save one frame"):
        picture.open_image(encoded(frames[0], kind, save_all=True, append_images=frames[1:]))


def test_the_second_picture_of_a_phone_photograph_is_ignored():
    photo = Image.new("RGB", (16, 8), "red")
    data = encoded(photo, "MPO", save_all=True, append_images=[Image.new("RGB", (4, 4))])
    assert picture.open_image(data).size == (16, 8)


def test_a_transparent_level_of_16_bits_becomes_white():
    image = Image.fromarray(np.array([[30000, 30001, 0]], dtype=np.uint16))
    data = BytesIO()
    image.save(data, "PNG", transparency=30000)
    opened = picture.open_image(data.getvalue())
    assert [opened.getpixel((x, 0)) for x in range(3)] == [(255,) * 3, (117,) * 3, (0,) * 3]


def test_sixteen_bit_grey_is_scaled_not_clipped():
    levels = np.linspace(0, 65535, 256).astype(np.uint16)[None].repeat(4, 0)
    opened = picture.open_image(encoded(Image.fromarray(levels), "PNG"))
    assert np.array_equal(np.asarray(opened)[0, :, 1], np.arange(256))


def test_cmyk_and_palette_become_rgb():
    red = np.asarray(picture.open_image(encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=95)))[0, 0]
    assert red[0] > 240 and red[1] < 15 and red[2] < 15
    green = picture.open_image(encoded(Image.new("RGB", (8, 8), (0, 200, 0)).quantize(4), "PNG"))
    assert green.mode == "RGB" and green.getpixel((3, 3)) == (0, 200, 0)


def test_transparency_is_put_on_white_for_pictures_and_black_for_masks():
    clear = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    clear.putpixel((0, 0), (10, 20, 30, 255))
    opened = picture.open_image(encoded(clear, "PNG"))
    assert opened.getpixel((0, 0)) == (10, 20, 30) and opened.getpixel((1, 1)) == (255, 255, 255)
    palette = Image.new("P", (4, 4), 0)
    assert picture.open_image(encoded(palette, "PNG", transparency=0)).getpixel((0, 0)) == (255, 255, 255)
    white = Image.new("RGBA", (8, 8), (255, 255, 255, 0))
    white.putpixel((2, 5), (255, 255, 255, 255))
    mask = picture.open_mask(white, (8, 8))
    assert mask.getbbox() == (2, 5, 3, 6)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_applied_and_forgotten(orientation):
    image = Image.new("RGB", (32, 16), "black")
    image.paste("white", (0, 0, 8, 8))  # the mark is in the corner that orientation 1 calls top left
    exif = Image.Exif()
    exif[0x0112] = orientation
    opened = picture.open_image(encoded(image, "JPEG", exif=exif, quality=95))
    assert opened.size == ((32, 16) if orientation < 5 else (16, 32))
    corner = {1: "tl", 2: "tr", 3: "br", 4: "bl", 5: "tl", 6: "tr", 7: "br", 8: "bl"}[orientation]
    x, y = (2 if "l" in corner else opened.width - 3), (2 if "t" in corner else opened.height - 3)
    assert opened.getpixel((x, y))[0] > 200
    assert not opened.info and picture.open_image(opened).size == opened.size


def test_paths_that_are_no_files(tmp_path):
    (tmp_path / "empty.png").touch()
    cases = {
        tmp_path: "is a folder",
        tmp_path / "none.png": "does not exist: check the path",
        "https://example.org/a.png": "addresses are not fetched",
        tmp_path / "empty.png": "empty file",
        "a\0b.png": "cannot be read",
        "x" * 5000: "cannot be read",
    }
    for source, message in cases.items():
        with pytest.raises(ImageError, match=message):
            picture.open_image(source)
    with pytest.raises(ImageError, match="ndarray is not an image"):
        picture.open_image(np.zeros((4, 4, 3)))


@pytest.mark.skipif(not Path("/dev/zero").exists(), reason="no device files here")
def test_a_device_is_not_read():
    with pytest.raises(ImageError, match="not a regular file"):
        picture.open_image("/dev/zero")


def test_a_large_file_is_refused_before_it_is_read(tmp_path):
    path = tmp_path / "sparse.png"
    with path.open("wb") as file:
        file.truncate(300 * 2**20)
    with pytest.raises(ImageError, match="300 MiB"):
        picture.open_image(path)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (Image.new("F", (4, 4)), "mode 'F'"),
        (Image.new("RGB", (0, 4)), "no pixels"),
        (Image.new("1", (9000, 9000)), "limit is 64 million"),
    ],
)
def test_pil_images_are_checked_too(image, message):
    with pytest.raises(ImageError, match=message):
        picture.open_image(image)


def test_mask_rules():
    with pytest.raises(ImageError, match="mask is 8x8 but the picture is 16x8"):
        picture.open_mask(Image.new("L", (8, 8), 255), (16, 8))
    with pytest.raises(ImageError, match="no white pixel"):
        picture.open_mask(Image.new("L", (8, 8), 127), (8, 8))
    levels = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16))
    mask = np.asarray(picture.open_mask(levels, (16, 16))).reshape(-1)
    assert mask[:128].max() == 0 and mask[128:].min() == 255


@pytest.mark.parametrize("res", [96, 512, 1024])
def test_fit_area_keeps_aspect_and_area(res):
    for width, height in itertools.product((1, 7, 333, 640, 1080, 4000), repeat=2):
        fitted = picture.fit_area(width, height, res)
        assert all(side % 16 == 0 and side >= 16 for side in fitted)
        assert fitted == picture.fit_area(height, width, res)[::-1]
        assert fitted[0] * fitted[1] <= 1.5 * res * res
        if 0.25 <= width / height <= 4 and res >= 512:
            assert 0.93 < fitted[0] * fitted[1] / res**2 < 1.07
            assert 0.93 < fitted[0] / fitted[1] * height / width < 1.07
    assert picture.fit_area(77, 77, res) == (res, res)
    assert picture.fit_area(MAX_PIXELS, 1, res) == (res * res // 16, 16)


def test_a_thin_strip_is_squared_without_a_giant_canvas():
    strip = picture.pad_square(Image.new("RGB", (400_000, 3), "red"), 64)
    assert strip.size == (64, 64) and strip.getpixel((0, 0)) == (127, 127, 127)


def test_a_mask_marks_the_cells_it_touches_and_the_padding_none():
    source = Image.fromarray(noise(50, 35))  # padded to 64x48
    mask = Image.new("L", (50, 35))
    mask.putpixel((15, 0), 255)
    mask.putpixel((49, 34), 255)
    canvas = picture.pad_to_patch(source, mask)
    assert canvas.image.size == (64, 48) and canvas.box == (0, 0, 50, 35)
    assert np.argwhere(canvas.cells).tolist() == [[0, 0], [2, 3]]
    assert canvas.mask.sum() == 2 and not canvas.mask[35:].any() and not canvas.mask[:, 50:].any()
    pixels = np.asarray(canvas.image)
    assert np.array_equal(pixels[:35, :50], np.asarray(source))
    assert (pixels[:35, 50:] == pixels[:35, 49:50]).all() and (pixels[35:] == pixels[34:35]).all()


@pytest.mark.parametrize("outpaint", [(16, 0, 0, 0), (0, 20, 7, 0), (3, 5, 9, 13), (0, 0, 0, 1)])
def test_outpainting_regenerates_only_new_area(outpaint):
    left, top, right, bottom = outpaint
    source = Image.fromarray(noise(40, 30))
    canvas = picture.pad_to_patch(source, outpaint=outpaint)
    width, height = 40 + left + right, 30 + top + bottom
    assert canvas.box == (0, 0, width, height) and canvas.mask.sum() == width * height - 40 * 30
    assert np.array_equal(np.asarray(canvas.image)[top : top + 30, left : left + 40], np.asarray(source))
    for row, column in np.ndindex(canvas.cells.shape):
        cell = canvas.mask[row * 16 : row * 16 + 16, column * 16 : column * 16 + 16]
        assert canvas.cells[row, column] == cell.any()
    if not right:  # the padding beside the picture is no new area
        assert not canvas.mask[top : top + 30, left:].any()


def test_outpainting_has_a_limit():
    with pytest.raises(ImageError, match="outpainted picture has 16392x16392"):
        picture.pad_to_patch(Image.new("RGB", (8, 8)), outpaint=(16384, 16384, 0, 0))


def test_unmasked_pixels_survive_exactly():
    source, generated = Image.fromarray(noise(48, 32)), Image.fromarray(255 - noise(48, 32))
    mask = np.random.default_rng(1).random((32, 48)) < 0.3
    result = np.asarray(picture.composite(source, generated, mask))
    assert np.array_equal(result[~mask], np.asarray(source)[~mask])
    assert np.array_equal(result[mask], np.asarray(generated)[mask])


def test_tensors_become_pictures():
    levels = torch.from_numpy(np.stack([noise(6, 4), 255 - noise(6, 4)]))
    images = picture.to_images(levels)
    assert [image.size for image in images] == [(6, 4)] * 2
    assert np.array_equal(np.asarray(images[1]), levels[1].numpy())


@pytest.mark.parametrize("crop", [False, True])
def test_fitted_mask_keeps_the_smallest_spot(crop: bool) -> None:
    mask = Image.new("L", (900, 600))
    mask.putpixel((450, 299), 255)
    fitted = picture.fit_mask(mask, (48, 48) if crop else (64, 48), crop)
    assert fitted.mode == "L" and fitted.getextrema() == (0, 255)
    assert np.asarray(fitted).sum() == 255
