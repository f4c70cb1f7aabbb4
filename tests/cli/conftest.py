"""The command, mostly run in this process, on the tiny checkpoint and in a folder of its own."""

import io
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from unipic_run.cli import main


@pytest.fixture(scope="session")
def model(tiny_release, tmp_path_factory) -> str:
    """The tiny checkpoint, converted by the command itself. Read only."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    assert main(["convert", str(tiny_release), str(folder), "-q"]) == 0
    return str(folder)


@pytest.fixture
def quick() -> tuple[str, ...]:
    """Options of a picture that takes little."""
    return "--steps", "2", "--seed", "7", "--res", "128"


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch) -> None:
    """Relative outputs and the cache stay inside the test's folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("UNIPIC_RUN_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def run(capsys, monkeypatch) -> Callable[..., tuple[int, str, str]]:
    """Exit code, stdout and stderr of a command line."""

    def call(*arguments: str, stdin: bytes = b"") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8"))
        capsys.readouterr()
        code = main(list(arguments))
        return code, *capsys.readouterr()

    return call


@pytest.fixture
def photo(tmp_path) -> str:
    levels = np.random.default_rng(0).integers(0, 256, (96, 120, 3), dtype=np.uint8)
    Image.fromarray(levels).save(tmp_path / "photo.jpg")
    return str(tmp_path / "photo.jpg")


@pytest.fixture
def pixels() -> Callable[[str | Path], np.ndarray]:
    """What a PNG shows, uint8 (H, W, 3)."""

    def read(path: str | Path) -> np.ndarray:
        with Image.open(path) as image:
            assert image.format == "PNG"
            return np.asarray(image.convert("RGB"))

    return read


@pytest.fixture
def pngs() -> Callable[[], list[str]]:
    """The names of those in the test's folder."""
    return lambda: sorted(path.name for path in Path.cwd().glob("*.png"))


@pytest.fixture(scope="session")
def command() -> str:
    """The installed program."""
    found = shutil.which("unipic-run", path=str(Path(sys.executable).parent))
    assert found, "the unipic-run command is not installed beside this Python: pip install -e ."
    return found
