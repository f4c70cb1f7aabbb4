"""What every test may rely on: the installed package, no network, a reason for each skipped GPU test."""

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from runpy import run_path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from unipic_run import Engine

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "tests" / "data"

# The root holds our `kernels/`, which would shadow Hugging Face's package of that name when transformers looks for it.
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT]

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported, so before any test module
os.environ.setdefault("OMP_NUM_THREADS", "1")  # on busy cores two threads make the tiny model 20 times slower

import torch  # noqa: E402 (counts its threads when it is imported)

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read where kernels are defined, so before any of them is imported


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.parent.name != "gpu")  # where the time on a card may end early
    for item in items:
        marked = item.get_closest_marker("gpu") is not None
        if marked and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and torch sees none"))
        # Of parallel workers one has the card, and a file is one worker's, who makes its fixtures once.
        item.add_marker(pytest.mark.xdist_group("gpu" if marked else item.path.stem))


@pytest.fixture(scope="session")
def root() -> Path:
    """The checkout."""
    return ROOT


@pytest.fixture(scope="session")
def goldens() -> Path:
    """The compact copy of the recorded UniPic 1.0 reference runs: `cases/` and `checkpoint/`."""
    return DATA / "goldens" / "unipic1"


@pytest.fixture(scope="session")
def tiny_release() -> Path:
    """A checkpoint with random weights in the layout of the released one."""
    return DATA / "unipic-tiny"


@pytest.fixture(scope="session")
def deepgen_layouts() -> SimpleNamespace:
    """What writes a DeepGen with random weights: `release`, `native` and more of tests/deepgen_release.py."""
    return SimpleNamespace(**run_path(str(ROOT / "tests" / "deepgen_release.py")))


@pytest.fixture(scope="session")
def tiny_deepgen(deepgen_layouts: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A DeepGen with random weights in its released layout for diffusers. Read only."""
    return deepgen_layouts.release(tmp_path_factory.mktemp("deepgen") / "DeepGen-tiny")


@pytest.fixture(scope="session")
def tiny_engine(tiny_release: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator["Engine"]:
    """The random-weight model, loaded once in float32 on the CPU."""
    from unipic_run import Engine

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("UNIPIC_RUN_CACHE", str(tmp_path_factory.mktemp("cache")))
        engine = Engine.from_pretrained(tiny_release, device="cpu")
    with engine:
        yield engine


@pytest.fixture
def fails_at() -> type:
    """fails_at(number): inside, that operation of torch finds no memory; `count` is how many there were."""
    from torch.overrides import TorchFunctionMode

    class FailsAt(TorchFunctionMode):
        def __init__(self, at: int | None = None) -> None:
            super().__init__()
            self.at, self.count = at, 0

        def __torch_function__(self, function, types, args=(), kwargs=None):
            self.count += function.__name__ not in ("__get__", "__set__")  # attributes
            if self.count == self.at:
                raise torch.OutOfMemoryError("injected")
            return function(*args, **(kwargs or {}))

    return FailsAt


@pytest.fixture
def under(tiny_release: Path) -> Iterator[Callable[[int], "Engine"]]:
    """Engines of the tiny model that may take so many bytes of their device, here the CPU."""
    from unipic_run import Engine
    from unipic_run.quant.recipe import NONE

    engines = []

    def make(budget: int) -> "Engine":
        with Engine.from_pretrained(tiny_release, device="cpu") as plain:
            loaded = plain.loaded
        engines.append(Engine(loaded.family, loaded.model, loaded.tokens, "tiny", NONE, loaded.device, budget))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()
