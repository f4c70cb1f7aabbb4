"""What comes back while and after a request is made, and what stops it."""

import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .errors import Cancelled

if TYPE_CHECKING:
    from PIL import Image


@dataclass(frozen=True)
class Event:
    """What a batch has behind it: "condition", a round of "sample", or "decode". `done` of `total` images preceded it.

    Stages before "condition" that `timings` may tell, such as `look` and `read`, send none. Stage "decode" brings the
    batch's finished `images`, which may be saved at once; `settings` belong to whichever of `previews` and `images`
    there are. A batch that runs out of memory is made again, after a UnipicWarning that says so: its stages and rounds
    come anew, perhaps for fewer images, and no preview comes twice.
    """

    stage: str
    round: int = 0
    rounds: int = 0
    done: int = 0
    total: int = 1
    previews: tuple["Image.Image", ...] = ()
    images: tuple["Image.Image", ...] = ()
    settings: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True)
class Result:
    """Images with the settings that made each of them (JSON-ready, also written into PNGs)."""

    images: tuple["Image.Image", ...]
    seeds: tuple[int, ...]  # of each image; empty where `noise` made them
    settings: tuple[dict[str, Any], ...]
    timings: dict[str, float]  # stage -> seconds; of these, what went into `compile` and `capture`, if anything did
    peak_bytes: int | None  # largest device memory held, on a CPU by the process so far; None where it is not told
    attention: str  # the backend really used


@dataclass(frozen=True)
class Answer:
    """Text with the settings that made it."""

    text: str
    ids: tuple[int, ...]  # generated tokens
    cut: bool  # whether it has max_new_tokens, the most it may have
    settings: dict[str, Any]
    timings: dict[str, float]  # as of a Result; reading the picture is in those of all answers about it
    peak_bytes: int | None
    attention: str


@dataclass(eq=False)
class CancelToken:
    """Set from any thread; the engine stops within a round (or a text token) and raises `Cancelled`."""

    _event: threading.Event = field(default_factory=threading.Event)

    def cancel(self) -> None:
        self._event.set()

    def check(self) -> None:
        if self._event.is_set():
            raise Cancelled("cancelled at the caller's request")
