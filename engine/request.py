"""What is asked, as frozen dataclasses; every rule about a request is checked where it is made.

Sizes are pixels, seeds unsigned 64-bit integers, times seconds. A field left `None` takes the model's own default.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypedDict

from .checks import (
    MAX_SIDE,
    as_numbers,
    as_plain,
    check_known,
    check_number,
    check_one_of,
    check_side,
    check_size,
    check_text,
    check_whole,
)
from .errors import UsageError
from .outcome import Answer, CancelToken
from .sampling import MAX_IMAGES, MAX_SEED, Sampling

if TYPE_CHECKING:
    from PIL import Image

GPU_BATCH = 4  # images made together on a GPU when nothing is said; on a CPU one, which its neighbours leave alone

TASKS = ("gen", "edit", "ask")
FITS = ("keep", "crop", "longest")  # of which a model has some
POSTERIORS = ("sample", "mean")  # likewise


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
            check_text("prompt", prompt)
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
            check_text("instruction", prompt)
        check_side("res", self.res)
        if self.fit is not None:
            check_one_of("fit", self.fit, FITS)
        if self.posterior is not None:
            check_one_of("posterior", self.posterior, POSTERIORS)
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
            check_whole(f"outpaint {name}", pixels, 0, MAX_SIDE)
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
        check_text("question", self.question)
        check_side("res", self.res)
        check_whole("max_new_tokens", self.max_new_tokens, 1, 10**5)
        check_number("temperature", self.temperature, 0.0, 100.0)
        check_number("top_p", self.top_p, 0.0, 1.0)
        check_whole("seed", self.seed, 0, MAX_SEED)
        if self.top_p == 0.0:
            raise UsageError("top_p is 0", "use a value above 0, or temperature 0 for greedy decoding")

    def cuts(self, ids: Sequence[int]) -> bool:
        """Whether an answer has as many tokens as the limit allows; whether it was at its end nobody has asked."""
        return len(ids) == self.max_new_tokens


class AskOptions(TypedDict, total=False):
    """The keywords of `ask` for type checkers."""

    res: int | None
    max_new_tokens: int
    temperature: float
    top_p: float
    seed: int | None
    cancel: CancelToken | None
    on_answer: Callable[[Answer], object] | None


@dataclass(frozen=True)
class Largest:
    """The largest request that an engine is to be ready for, by which `quant="auto"` chooses; None: the model's own."""

    task: str = "gen"
    size: tuple[int, int] | None = None  # of the picture that is made or asked about
    n: int = 1  # pictures computed together
    steps: int | None = None
    previews: bool = False
    sources: int = 1  # pictures that an edit is given, each taken to be as large as what it makes

    def __post_init__(self) -> None:
        check_one_of("task", self.task, TASKS)
        if self.size is not None:
            check_size(*self.size)
            if self.task == "ask" and self.size[0] != self.size[1]:
                raise UsageError(f"size {self.size} of a question is no square", "give res")
        check_whole("n", self.n, 1, MAX_IMAGES)
        check_whole("sources", self.sources, 1, MAX_IMAGES)
        if self.steps is not None:
            check_whole("steps", self.steps, 1, 10**4)


class LargestOptions(TypedDict, total=False):
    """The keys of `largest`: the fields of `Largest`, and `res` for a square."""

    task: str
    res: int | None
    size: tuple[int, int] | None
    n: int
    steps: int | None
    previews: bool
    sources: int


def as_largest(options: LargestOptions | None) -> Largest:
    """The options as a checked Largest."""
    if not isinstance(options, Mapping | None):
        raise UsageError(f"largest is {type(options).__name__}, not a dictionary", 'pass for example {"task": "edit"}')
    options = dict(options or {})
    check_known(options, LargestOptions)
    res, size = options.pop("res", None), options.pop("size", None)
    size = None if res is None and size is None else as_size(res, size, 0)
    return Largest(size=size, **{name: as_plain(value) for name, value in options.items()})


def check_res(res: int | None, fit: str | None, masked: bool) -> None:
    """Raises UsageError for an edit's `res` that would change nothing."""
    if res is not None and fit is None and masked:
        raise UsageError(f"res {res} has no effect: a masked edit keeps the picture's size", "add fit keep or crop")


def as_prompts(prompt: str | Sequence[str]) -> tuple[str, ...]:
    if isinstance(prompt, str):
        return (prompt,)
    if not isinstance(prompt, Sequence) or isinstance(prompt, bytes | bytearray):
        raise UsageError(f"a prompt is {type(prompt).__name__}, not text", "pass a string or a list of strings")
    return tuple(prompt)


def as_token(cancel: CancelToken | None) -> CancelToken:
    """The caller's, or one that nobody sets."""
    if cancel is None:
        return CancelToken()
    if not isinstance(cancel, CancelToken):
        raise UsageError(f"cancel is {type(cancel).__name__}, not a CancelToken", "pass a unipic_run.CancelToken()")
    return cancel


def as_size(res: int | None, size: tuple[int, int] | None, default: int) -> tuple[int, int]:
    """(width, height) from a square's side, a pair, or neither."""
    if size is None:
        if res is None:
            return default, default
        check_side("res", side := as_plain(res))
        return side, side
    if res is not None:
        raise UsageError("both res and size given", "use res for a square, size for anything else")
    return as_numbers("size", size, 2, "a pair (width, height)")


def as_margins(outpaint: tuple[int, int, int, int] | None) -> tuple[int, int, int, int] | None:
    return (
        outpaint if outpaint is None else as_numbers("outpaint", outpaint, 4, "four: left, top, right, bottom pixels")
    )


def _count(prompts: int, n: int) -> None:
    if prompts * n > MAX_IMAGES:
        raise UsageError(f"{prompts} prompts x {n} are {prompts * n} images", f"ask for at most {MAX_IMAGES} a call")
