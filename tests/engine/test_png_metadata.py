"""PNGs: settings there and back, and files that appear whole or not at all."""

import json
import os
from io import BytesIO

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from unipic_run.engine import png_metadata
from unipic_run.engine.errors import ImageError, OutputError
from unipic_run.engine.png_metadata import check_output, parameters_text, read_settings, save_png

IMAGE = Image.new("RGB", (32, 16), "teal")
SETTINGS = {
    "prompt": "ein Fuchs, 狐 🦊\nim Schnee: \udcff",  # two lines, other scripts, a broken character of a shell
    "negative": "blurry",
    "seed": 2**64 - 1,
    "steps": 32,
    "guidance": 3.0,
    "model": "unipic",
    "version": "unipic-run 0.1.0",
}


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def foreign(**texts: str) -> bytes:
    info = PngInfo()
    for key, value in texts.items():
        info.add_text(key, value)
    buffer = BytesIO()
    IMAGE.save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()


def test_settings_come_back_from_a_file_and_from_a_stream(tmp_path):
    path = tmp_path / "a.png"
    assert save_png(IMAGE, path, SETTINGS) == path and read_settings(path) == SETTINGS
    stream = BytesIO()
    assert save_png(IMAGE, stream, SETTINGS) is None and read_settings(stream.getvalue()) == SETTINGS
    with Image.open(path) as image:
        assert image.tobytes() == IMAGE.tobytes()
        assert "Size: 32x16" in image.text["parameters"] and "狐 🦊\nim" in image.text["parameters"]


def test_the_line_other_tools_read():
    text = parameters_text({**SETTINGS, "prompt": "a fox\nin snow", "size": "32x16", "model": "a, b"})
    assert text == (
        "a fox\nin snow\nNegative prompt: blurry\n"
        'Steps: 32, CFG scale: 3.0, Seed: 18446744073709551615, Size: 32x16, Model: "a, b", Version: unipic-run 0.1.0'
    )


def test_no_metadata_means_none(tmp_path):
    save_png(IMAGE, tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        assert not image.text
    with pytest.raises(ImageError, match="no unipic-run settings"):
        read_settings(tmp_path / "a.png")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (foreign(parameters="a cat\nSteps: 20"), "no unipic-run settings"),
        (foreign(unipic_run="{not json"), "damaged settings"),
        (foreign(unipic_run="[" * 100_000), "damaged settings"),
        (foreign(unipic_run="[1]"), "not an object"),
        (foreign(unipic_run=json.dumps({"prompt": "x" * 2**20})), "bytes of settings"),
        (b"GIF89a", "not a readable PNG picture"),
    ],
)
def test_foreign_and_damaged_settings(data, message):
    with pytest.raises(ImageError, match=message):
        read_settings(data)


def test_nothing_is_overwritten_silently(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(b"precious")
    with pytest.raises(OutputError, match=r"exists already.* --overwrite .*keyword overwrite"):
        save_png(IMAGE, path, SETTINGS)
    assert path.read_bytes() == b"precious"
    assert save_png(IMAGE, path, SETTINGS, renumber=True) == tmp_path / "a-2.png"
    assert save_png(IMAGE, path, SETTINGS, renumber=True) == tmp_path / "a-3.png"
    assert path.read_bytes() == b"precious"
    assert save_png(IMAGE, path, SETTINGS, overwrite=True) == path and read_settings(path) == SETTINGS
    assert names(tmp_path) == ["a-2.png", "a-3.png", "a.png"]


def test_a_file_that_appears_meanwhile_is_kept(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    monkeypatch.setattr(png_metadata, "check_output", lambda *_, **__: path.write_bytes(b"theirs"))
    with pytest.raises(OutputError, match="exists already"):
        save_png(IMAGE, path)
    assert path.read_bytes() == b"theirs" and names(tmp_path) == ["a.png"]


def test_file_systems_without_hard_links(tmp_path, monkeypatch):
    def refused(*_):
        raise PermissionError("no hard links here")

    monkeypatch.setattr("pathlib.Path.hardlink_to", refused)
    assert save_png(IMAGE, tmp_path / "a.png") == tmp_path / "a.png"
    assert save_png(IMAGE, tmp_path / "a.png", renumber=True) == tmp_path / "a-2.png"
    assert names(tmp_path) == ["a-2.png", "a.png"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch, error):
    def full(_):
        raise error

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError if isinstance(error, OSError) else KeyboardInterrupt):
        save_png(IMAGE, tmp_path / "a.png", SETTINGS)
    assert names(tmp_path) == []


def test_places_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    (tmp_path / "folder.png").mkdir()
    cases = {
        tmp_path / "a.jpg": "does not end in .png",
        tmp_path / "none" / "a.png": "does not exist",
        tmp_path / "file" / "a.png": "does not exist",
        tmp_path / "folder.png": "not a regular file",
        tmp_path / "a\0.png": "cannot be used",
        tmp_path / f"{'x' * 300}.png": "cannot be",
    }
    for path, message in cases.items():
        with pytest.raises(OutputError, match=message):
            save_png(IMAGE, path, overwrite=True)
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(OutputError, match="not writable"):
        check_output(tmp_path / "a.png")


def test_a_closed_pipe_is_a_typed_error():
    class Pipe(BytesIO):
        def write(self, _):
            raise BrokenPipeError("Broken pipe")

    with pytest.raises(OutputError, match="stream"):
        save_png(IMAGE, Pipe())
