"""What is asked and what comes back, as frozen dataclasses; every rule about a request is checked here.

Sizes are pixels, seeds unsigned 64-bit integers, times seconds. A field left `None` takes the model's own default.
"""

import math
import secrets
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral
from typing import TYPE_CHECKING, Any, TypedDict

from .errors import Cancelled, UsageError

if TYPE_CHECKING:
    from PIL import Image

PATCH = 16  # pixels per latent token side, the same for every supported VAE
MAX_SIDE = 16384  # beyond this a size is a typing error; the model's context is checked separately
MAX_SEED = 2**64 - 1
MAX_IMAGES = 1024  # of one call: prompts x n

GPU_BATCH = 4  # images made together on a GPU when nothing is said; on a CPU one, which its neighbours leave alone

TASKS = ("gen", "edit", "ask")
CFG_SCHEDULES = ("constant", "linear")
FITS = ("keep", "crop", "longest")  # of which a model has some
POSTERIORS = ("sample", "mean")  # likewise
ORDERS = ("random", "gtr")  # of revealing tokens; likewise
SHORTCUTS = ("head_steps", "order", "cfg_interval")  # what makes a picture cheaper, and worse
SAMPLED = ("steps", "guidance", "cfg_schedule", "temperature", "negative", *SHORTCUTS)
WHOLE_RUN = (0.0, 1.0)


@dataclass(frozen=True)
class Sampling:
    """How images are sampled; shared by `generate` and `edit`."""

    seed: int
    n: int = 1
    steps: int | None = None  # rounds
    guidance: float | None = None  # 1.0 turns guidance off
    cfg_schedule: str = "constant"
    temperature: float = 1.0  # scales the head's per-step noise
    negative: str | None = None  # replaces the unconditional prompt
    head_steps: tuple[int, int] | None = None  # the diffusion head's in the first and the last round, linear between
    order: str = "random"  # in which tokens are revealed, of ORDERS
    cfg_interval: tuple[float, float] = WHOLE_RUN  # shares of the run between which guidance is on
    batch_size: int | None = None  # images computed together; None: one on the CPU, up to four on a GPU
    preview_every: int = 0  # rounds between previews, 0 for none

    def __post_init__(self) -> None:
        _whole("seed", self.seed, 0, MAX_SEED)
        _whole("n", self.n, 1, MAX_IMAGES)
        _whole("preview_every", self.preview_every, 0, 10**6)
        if self.steps is not None:
            _whole("steps", self.steps, 1, 10**4)
        if self.batch_size is not None:
            _whole("batch_size", self.batch_size, 1, MAX_IMAGES)
        if self.guidance is not None:
            _number("guidance", self.guidance, 0.0, 1000.0)
        _number("temperature", self.temperature, 0.0, 100.0)
        _one_of("cfg_schedule", self.cfg_schedule, CFG_SCHEDULES)
        _one_of("order", self.order, ORDERS)
        self._check_pairs()
        if self.negative:  # an empty one is a wish, too
            _text("negative prompt", self.negative)

    def _check_pairs(self) -> None:
        """As tuples, whatever sequences they came as."""
        first, end = _numbers("cfg_interval", self.cfg_interval, 2, "two: the shares at which guidance begins and ends")
        for share in (first, end):
            _number("cfg_interval", share, 0.0, 1.0)
        if first >= end:
            raise UsageError(f"cfg_interval {first:g} to {end:g} is empty", "use guidance 1 to turn guidance off")
        object.__setattr__(self, "cfg_interval", (float(first), float(end)))
        if self.head_steps is not None:
            pair = _numbers("head_steps", self.head_steps, 2, "two: steps in the first and in the last round")
            for steps in pair:
                _whole("head_steps", steps, 2, 1000)
            object.__setattr__(self, "head_steps", pair)


class SamplingOptions(TypedDict, total=False):
    """The keywords `generate` and `edit` share: the fields of `Sampling` but the seed."""

    n: int
    steps: int | None
    guidance: float | None
    cfg_schedule: str
    temperature: float
    negative: str | None
    head_steps: tuple[int, int] | None
    order: str
    cfg_interval: tuple[float, float]
    batch_size: int | None
    preview_every: int


@dataclass(frozen=True)
class GenerateRequest:
    """Text to image. `size` is (width, height)."""

    prompts: tuple[str, ...]
    size: tuple[int, int]
    sampling: Sampling

    def __post_init__(self) -> None:
        if not self.prompts:
            raise UsageError("no prompt given", "pass a text, or a list with at least one text")
        for prompt in self.prompts:
            _text("prompt", prompt)
        check_size(*self.size)
        _count(len(self.prompts), self.sampling.n)


@dataclass(frozen=True)
class EditRequest:
    """Image and instruction to image.

    Without a mask the whole picture is edited through the editing prompt. With `mask` (same size as `image`, white
    where to regenerate) or `outpaint` (pixels added left, top, right, bottom) only the masked 16x16 cells are sampled.
    `references` are further pictures that the instruction speaks of; `size` (width, height) is the result's.
    `posterior`: whether sources' latents are drawn from what the autoencoder's encoder predicts, or are its mean.
    """

    image: "Image.Image"
    prompts: tuple[str, ...]
    sampling: Sampling
    res: int
    mask: "Image.Image | None" = None
    outpaint: tuple[int, int, int, int] | None = None
    fit: str | None = None
    posterior: str | None = None
    references: "tuple[Image.Image, ...]" = ()
    size: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if not self.prompts:
            raise UsageError("no instruction given", "say what to change")
        for prompt in self.prompts:
            _text("instruction", prompt)
        check_size(self.res, self.res)
        if self.fit is not None:
            _one_of("fit", self.fit, FITS)
        if self.posterior is not None:
            _one_of("posterior", self.posterior, POSTERIORS)
        _count(len(self.prompts), self.sampling.n)
        if self.size is not None:
            check_size(*self.size)
        if self.masked and (self.references or self.size):
            what = "references" if self.references else "size"
            raise UsageError(f"both {what} and a mask or outpaint given", "edit the whole picture, or without them")
        if self.outpaint is not None:
            self._check_outpaint(self.outpaint)

    @property
    def masked(self) -> bool:
        return self.mask is not None or self.outpaint is not None

    def _check_outpaint(self, outpaint: tuple[int, int, int, int]) -> None:
        if self.mask is not None:
            raise UsageError("both a mask and outpaint given", "use one of them at a time")
        as_margins(outpaint)
        for name, pixels in zip(("left", "top", "right", "bottom"), outpaint, strict=True):
            _whole(f"outpaint {name}", pixels, 0, MAX_SIDE)
        if not any(outpaint):
            raise UsageError("outpaint is 0,0,0,0", "give at least one side some pixels")


@dataclass(frozen=True)
class AskRequest:
    """A question about an image."""

    question: str
    res: int
    max_new_tokens: int = 1024
    temperature: float = 0.0  # 0 is greedy
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        _text("question", self.question)
        check_size(self.res, self.res)
        _whole("max_new_tokens", self.max_new_tokens, 1, 10**5)
        _number("temperature", self.temperature, 0.0, 100.0)
        _number("top_p", self.top_p, 0.0, 1.0)
        _whole("seed", self.seed, 0, MAX_SEED)
        if self.top_p == 0.0:
            raise UsageError("top_p is 0", "use a value above 0, or temperature 0 for greedy decoding")


class AskOptions(TypedDict, total=False):
    """The keywords of `ask` for type checkers."""

    res: int | None
    max_new_tokens: int
    temperature: float
    top_p: float
    seed: int | None
    cancel: "CancelToken | None"


@dataclass(frozen=True)
class Largest:
    """The largest request that an engine is to be ready for, by which `quant="auto"` chooses; None: the model's own."""

    task: str = "gen"
    size: tuple[int, int] | None = None  # of the picture that is made or asked about
    n: int = 1  # pictures computed together
    steps: int | None = None
    previews: bool = False

    def __post_init__(self) -> None:
        _one_of("task", self.task, TASKS)
        if self.size is not None:
            check_size(*self.size)
            if self.task == "ask" and self.size[0] != self.size[1]:
                raise UsageError(f"size {self.size} of a question is no square", "give res")
        _whole("n", self.n, 1, MAX_IMAGES)
        if self.steps is not None:
            _whole("steps", self.steps, 1, 10**4)


class LargestOptions(TypedDict, total=False):
    """The keys of `largest`: the fields of `Largest`, and `res` for a square."""

    task: str
    res: int | None
    size: tuple[int, int] | None
    n: int
    steps: int | None
    previews: bool


@dataclass(frozen=True)
class Event:
    """A finished stage, or one finished round of stage "sample". `done` of `total` images preceded this batch.

    Stage "decode" brings the batch's finished `images`, which may be saved at once; `settings` belong to whichever of
    `previews` and `images` there are. A batch that runs out of memory is made again, after a UnipicWarning that says
    so: its stages and rounds come anew, perhaps for fewer images, and no preview comes twice.
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
    seeds: tuple[int, ...]
    settings: tuple[dict[str, Any], ...]
    timings: dict[str, float]  # stage -> seconds; of these, what went into `compile` and `capture`, if anything did
    peak_bytes: int | None  # largest device memory held; None where the device does not tell
    attention: str  # the backend really used


@dataclass(frozen=True)
class Answer:
    """Text with the settings that made it."""

    text: str
    ids: tuple[int, ...]  # generated tokens
    settings: dict[str, Any]
    timings: dict[str, float]
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


def check_size(width: int, height: int) -> None:
    """Both sides must be positive multiples of 16 and not absurd."""
    for name, side in (("width", width), ("height", height)):
        _whole(name, side, PATCH, MAX_SIDE)
        if side % PATCH:
            below = side // PATCH * PATCH
            raise UsageError(f"{name} {side} is not a multiple of {PATCH}", f"use {below} or {below + PATCH}")


def as_largest(options: LargestOptions | None) -> Largest:
    """The options as a checked Largest."""
    options = dict(options or {})
    _known(options, LargestOptions)
    res, size = options.pop("res", None), options.pop("size", None)
    size = None if res is None and size is None else as_size(res, size, 0)
    return Largest(size=size, **{name: _plain(value) for name, value in options.items()})


def as_sampling(seed: int | None, options: SamplingOptions) -> Sampling:
    """The options as a checked Sampling; without a seed one is drawn."""
    _known(options, SamplingOptions, "seed")
    seed = secrets.randbits(32) if seed is None else seed
    return Sampling(**{name: _plain(value) for name, value in {"seed": seed, **options}.items()})


def _known(options: Mapping[str, Any], allowed: Any, *more: str) -> None:
    known = [*more, *allowed.__annotations__]
    for name in options:
        if name not in known:
            raise UsageError(f"option {name!r} is unknown", f"known are {', '.join(known)}")


def _plain(value: Any) -> Any:
    """numpy's whole numbers as Python's, which neither overflow nor trouble JSON."""
    return int(value) if isinstance(value, Integral) and not isinstance(value, bool) else value


def as_prompts(prompt: str | Sequence[str]) -> tuple[str, ...]:
    if isinstance(prompt, str):
        return (prompt,)
    if not isinstance(prompt, Sequence):
        raise UsageError(f"a prompt is {type(prompt).__name__}, not text", "pass a string or a list of strings")
    return tuple(prompt)


def as_size(res: int | None, size: tuple[int, int] | None, default: int) -> tuple[int, int]:
    """(width, height) from a square's side, a pair, or neither."""
    if size is None:
        side = default if res is None else res
        return side, side
    if res is not None:
        raise UsageError("both res and size given", "use res for a square, size for anything else")
    return _numbers("size", size, 2, "a pair (width, height)")


def as_margins(outpaint: tuple[int, int, int, int] | None) -> tuple[int, int, int, int] | None:
    return outpaint if outpaint is None else _numbers("outpaint", outpaint, 4, "four: left, top, right, bottom pixels")


def _numbers(name: str, value: Any, count: int, wanted: str) -> Any:
    if isinstance(value, str) or not isinstance(value, Sequence) or len(value) != count:
        raise UsageError(f"{name} {value!r} does not have {count} numbers", f"give {wanted}")
    return tuple(map(_plain, value))


def _whole(name: str, value: object, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, Integral):  # numpy's integers are welcome
        raise UsageError(f"{name} {value!r} is not a whole number", f"use {low} to {high}")
    if not low <= value <= high:
        raise UsageError(f"{name} {value} is out of range", f"use {low} to {high}")


def _number(name: str, value: object, low: float, high: float) -> None:
    good = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not (good and low <= value <= high):
        raise UsageError(f"{name} {value!r} is not a number from {low:g} to {high:g}", "choose one in that range")


def _text(name: str, value: object) -> None:
    if not isinstance(value, str):
        raise UsageError(f"{name} is {type(value).__name__}, not text", "pass a string")
    if not value.strip():
        raise UsageError(f"the {name} is empty", "write what you want")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise UsageError(f"the {name} is not valid Unicode", "retype it") from None


def _one_of(name: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise UsageError(f"{name} {value!r} is unknown", f"choose from {', '.join(allowed)}")


def _count(prompts: int, n: int) -> None:
    if prompts * n > MAX_IMAGES:
        raise UsageError(f"{prompts} prompts x {n} are {prompts * n} images", f"ask for at most {MAX_IMAGES} a call")
