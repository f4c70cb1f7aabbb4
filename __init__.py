"""unipic-run: generate, edit and understand images with one set of weights on one consumer GPU."""

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .engine.engine import Engine
    from .engine.errors import (
        BudgetError,
        Cancelled,
        CorruptWeightsError,
        HostMemoryError,
        ImageError,
        ModelMissingError,
        OutputError,
        UnipicError,
        UnipicWarning,
        UnsupportedDeviceError,
        UsageError,
    )
    from .engine.noise import Tape
    from .engine.outcome import Answer, CancelToken, Event, Result
    from .engine.png_metadata import save_png

__all__ = [
    "Answer",
    "BudgetError",
    "CancelToken",
    "Cancelled",
    "CorruptWeightsError",
    "Engine",
    "Event",
    "HostMemoryError",
    "ImageError",
    "ModelMissingError",
    "OutputError",
    "Result",
    "Tape",
    "UnipicError",
    "UnipicWarning",
    "UnsupportedDeviceError",
    "UsageError",
    "__version__",
    "save_png",
]
# What does not come from engine.errors.
_ELSEWHERE = {
    "Engine": "engine.engine",
    "Result": "engine.outcome",
    "Answer": "engine.outcome",
    "Event": "engine.outcome",
    "CancelToken": "engine.outcome",
    "Tape": "engine.noise",
    "save_png": "engine.png_metadata",
}


def __getattr__(name: str) -> object:
    # Torch takes seconds to import and `--help` must not pay for it, so the door opens on first use.
    if name not in __all__:
        raise AttributeError(f"module 'unipic_run' has no attribute {name!r}")
    return getattr(import_module(f".{_ELSEWHERE.get(name, 'engine.errors')}", __name__), name)


def __dir__() -> list[str]:
    return __all__
