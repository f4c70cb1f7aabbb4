"""Making the pictures of one command and saving each as soon as it is finished.

Whatever stops the work (Ctrl-C, memory, a full disk) leaves all earlier pictures saved.
"""

from dataclasses import asdict, dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from .. import __version__
from .errors import OutputError, UsageError
from .outcome import Event
from .request import EditRequest, GenerateRequest
from .sampling import MAX_SEED, SAMPLED, SHORTCUTS, Sampling
from .terminal import Terminal

if TYPE_CHECKING:
    from PIL import Image

    from .engine import Engine
    from .outputs import Outputs


# Settings that only the loaded model has, some not every model; in front of it these of the right type stand for them.
LATER: dict[str, Any] = {"size": "0x0", "steps": 0, "guidance": 0.0, "cfg_cache": 0.0}
LATER |= dict.fromkeys(("model", "dtype", "quant", "exact_rope", "device", "attention", "order", "solver"), "")


@dataclass(frozen=True)
class Order:
    """What a command asks for, checked before a model is loaded. `known`: further settings that names may use."""

    task: str  # generate, edit or inpaint
    prompts: tuple[str, ...]
    sampling: Sampling
    known: dict[str, Any] = field(default_factory=dict)

    @property
    def said(self) -> dict[str, Any]:
        """Settings of every picture that the command itself gives."""
        sampling = {name: getattr(self.sampling, name) for name in ("speed", *SAMPLED)}
        return {name: value for name, value in (sampling | self.known).items() if value is not None}

    def settled(self, engine: "Engine") -> dict[str, Any]:
        """What they have in place of LATER; the size of an edit is told by the finished picture alone."""
        from .prepare import settled
        from .task import Task

        side = engine.config.resolution
        size = f"{side}x{side}" if self.task == "generate" else None
        sampled = {name: getattr(Task, name) for name in SHORTCUTS} | settled(self.sampling, engine.defaults)
        return engine.settings_of(self.task, size=size, **sampled)

    def expected_settings(self, later: dict[str, Any] = LATER) -> list[dict[str, Any]]:
        """Of every picture, in the engine's order: enough to check names."""
        shared = {"version": __version__, "task": self.task, "size": LATER["size"], **later, **self.said}
        copies = [(self.sampling.seed + copy) & MAX_SEED for copy in range(self.sampling.n)]
        return [shared | {"prompt": prompt, "seed": seed} for prompt in self.prompts for seed in copies]


def open_engine(terminal: Terminal, loading: dict[str, Any]) -> "Engine":
    """The engine, with its bars and sentences on the terminal. Torch comes in here."""
    from .engine import Engine

    return Engine.from_pretrained(**loading, on_progress=terminal.progress, say=terminal.say)


def make_pictures(
    terminal: Terminal,
    order: Order,
    request: GenerateRequest | EditRequest,
    saving: dict[str, Any],
    loading: dict[str, Any],
    **arguments: Any,
) -> None:
    """Check the outputs and the request, load the model, then make, save and report the pictures one after the other.

    `request` is as the engine will make it of `arguments`, which go to Engine.generate or Engine.edit; `saving` goes to
    Outputs, `loading` to Engine.from_pretrained.
    `terminal.data` holds the JSON of what is done so far.
    """
    from .outputs import Outputs

    outputs = Outputs(**saving)
    if outputs.stream and terminal.json:
        raise UsageError("a picture and JSON do not fit one stdout", "give -o a path, or leave --json out")
    unknown = LATER.keys() - order.said.keys()
    outputs.check(order.expected_settings(), previews=order.sampling.preview_every > 0, unknown=unknown)
    check_by_name(loading.get("model", "unipic"), request)
    with open_engine(terminal, loading) as engine:
        settled = order.settled(engine)
        outputs.check_names(order.expected_settings(settled), unknown & ({"size"} - settled.keys()))
        verb = engine.generate if order.task == "generate" else engine.edit
        terminal.data.update(images=[], attention=engine.attention)
        saver = _Saver(outputs, terminal)
        result = verb(prompt=order.prompts, on_event=saver, **asdict(order.sampling), **arguments)
        terminal.data.update(timings=result.timings, peak_bytes=result.peak_bytes)
    if saver.unsaid:
        raise saver.unsaid


def check_by_name(model: str, request: GenerateRequest | EditRequest) -> None:
    """Raise UsageError for what a well-known model cannot do, before it is fetched. Torch comes in here."""
    from . import families
    from .prepare import check_request

    if model in families.FAMILIES:
        check_request(request, families.model(model))


class _Saver:
    """Hears the engine's events: shows the rounds, saves previews and finished pictures."""

    def __init__(self, outputs: "Outputs", terminal: Terminal) -> None:
        self.outputs, self.terminal = outputs, terminal
        self.unsaid: OutputError | None = None  # why the path of a saved picture could not be printed

    def __call__(self, event: Event) -> None:
        if event.stage == "sample":
            self.show(event)
        pictures = event.previews or event.images
        if pictures:
            save = partial(self.preview, event.round) if event.previews else self.picture
            for index, (image, settings) in enumerate(zip(pictures, event.settings, strict=True), event.done):
                save(index, image, settings)

    def preview(self, number: int, index: int, image: "Image.Image", settings: dict[str, Any]) -> None:
        path = self.outputs.preview(index, image, settings, number)
        self.terminal.say(f"preview: {path}")
        self.terminal.data.setdefault("previews", []).append({"path": str(path), "image": index, "round": number})

    def picture(self, index: int, image: "Image.Image", settings: dict[str, Any]) -> None:
        path = self.outputs.save(index, image, settings)
        row = {"path": path and str(path), "seed": settings["seed"], "settings": settings}
        self.terminal.data["images"].append(row)
        if path:
            try:
                self.terminal.line(str(path))
            except OutputError as error:
                self.unsaid = error

    def show(self, event: Event) -> None:
        text = f"image {event.done + 1} of {event.total}, round {event.round} of {event.rounds}"
        done = event.done * event.rounds + event.round
        self.terminal.show("sampling", done, event.total * event.rounds, text)
