"""unipic-run: generate, edit and understand images with one set of weights on one consumer GPU."""

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .engine.engine import Engine
    from .engine.errors import UnipicError
    from .engine.noise import Tape
    from .engine.outcome import Answer, CancelToken, Event, Result
    from .engine.png_metadata import save_png

_PUBLIC = {
    "Engine": "engine.engine",
    "UnipicError": "engine.errors",
    "Result": "engine.outcome",
    "Answer": "engine.outcome",
    "Event": "engine.outcome",
    "CancelToken": "engine.outcome",
    "Tape": "engine.noise",
    "save_png": "engine.png_metadata",
}
__all__ = ["Answer", "CancelToken", "Engine", "Event", "Result", "Tape", "UnipicError", "__version__", "save_png"]


def __getattr__(name: str) -> object:
    # Torch takes seconds to import and `--help` must not pay for it, so the door opens on first use.
    if name not in _PUBLIC:
        raise AttributeError(f"module 'unipic_run' has no attribute {name!r}")
    return getattr(import_module(f".{_PUBLIC[name]}", __name__), name)
