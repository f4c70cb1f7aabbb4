"""Checked requests to tasks: pictures become tensors of the right shape, and what must be undone afterwards is kept."""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from PIL import Image

from .errors import UnipicWarning, UsageError
from .picture import Canvas, center_crop, composite, fit_area, fit_mask, pad_square, pad_to_patch, resize, to_pixels
from .request import PATCH, EditRequest, GenerateRequest, Sampling
from .task import Task

Finish = Callable[[Image.Image], Image.Image]


@dataclass(frozen=True)
class Defaults:
    """What a checkpoint takes where a request says nothing."""

    steps: int
    guidance: float


def generate_task(request: GenerateRequest, defaults: Defaults) -> tuple[Task, Finish]:
    width, height = request.size
    return _task("generate", width, height, request.sampling, defaults), _unchanged


def edit_task(
    request: EditRequest, defaults: Defaults, max_tokens: int, device: torch.device, dtype: torch.dtype
) -> tuple[Task, Finish]:
    """Whole-picture edits take the size that `fit` gives; masked ones keep the source's size and unmasked pixels."""
    if request.mask is None and request.outpaint is None:
        size = _fitted_size(request.image.size, request.fit or "keep", request.res)
        _check_tokens(size, max_tokens // 2, "use a smaller res")  # the source takes as many as the result
        pixels = to_pixels(_fitted(request.image, request.fit or "keep", request.res), dtype, cast_first=False)
        return _task("edit", *size, request.sampling, defaults, pixels=pixels.to(device)), _unchanged
    canvas = _canvas(request, max_tokens)
    pixels = to_pixels(canvas.image, dtype, cast_first=False).to(device)
    task = _task(
        "inpaint", *canvas.image.size, request.sampling, defaults, pixels=pixels, cells=torch.from_numpy(canvas.cells)
    )
    return task, lambda image: composite(canvas.image, image, canvas.mask).crop(canvas.box)


def ask_pixels(image: Image.Image, res: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """(1, 3, res, res): padded to a square, arithmetic in `dtype` as the released script does it."""
    return to_pixels(pad_square(image, res), dtype, cast_first=True).to(device)


def note_doubts(task: Task, side: int) -> None:
    """Warnings about what runs but may disappoint; `side` is the trained resolution."""
    width, height = task.columns * PATCH, task.rows * PATCH
    if not 0.8 <= width * height / side**2 <= 1.25:
        note = f"{width}x{height} is far from the {side}x{side} this model was trained at: expect poorer pictures"
        warnings.warn(note, UnipicWarning, stacklevel=4)
    if task.negative is not None and task.guidance == 1.0:
        warnings.warn("a negative prompt has no effect at guidance 1", UnipicWarning, stacklevel=4)


def _task(kind: str, width: int, height: int, sampling: Sampling, defaults: Defaults, **source: torch.Tensor) -> Task:
    return Task(
        kind=kind,
        rows=height // PATCH,
        columns=width // PATCH,
        steps=defaults.steps if sampling.steps is None else sampling.steps,
        guidance=defaults.guidance if sampling.guidance is None else float(sampling.guidance),
        cfg_schedule=sampling.cfg_schedule,
        temperature=float(sampling.temperature),
        negative=sampling.negative,
        **source,
    )


def _fitted_size(size: tuple[int, int], fit: str, res: int) -> tuple[int, int]:
    return (res, res) if fit == "crop" else fit_area(*size, res)


def _fitted(image: Image.Image, fit: str, res: int) -> Image.Image:
    return center_crop(image, res) if fit == "crop" else resize(image, fit_area(*image.size, res))


def _canvas(request: EditRequest, max_tokens: int) -> Canvas:
    image, mask, outpaint = request.image, request.mask, request.outpaint
    if request.fit:
        size = _fitted_size(image.size, request.fit, request.res)
        outpaint = outpaint and _scaled(outpaint, image.size, size)
        mask = mask and fit_mask(mask, size, crop=request.fit == "crop")
    else:
        size = image.size
    left, top, right, bottom = outpaint or (0, 0, 0, 0)
    _check_tokens((size[0] + left + right, size[1] + top + bottom), max_tokens, "scale it down with fit keep or crop")
    if request.fit:
        image = _fitted(image, request.fit, request.res)
    canvas = pad_to_patch(image, mask, outpaint)
    if not canvas.cells.any():
        raise UsageError(f"after fit {request.fit}, nothing is left to regenerate", "use a larger mask or margin")
    return canvas


def _check_tokens(size: tuple[int, int], most: int, remedy: str) -> None:
    """Before anything is resized: a size too large for the model may also be too large for the machine."""
    tokens = math.ceil(size[0] / PATCH) * math.ceil(size[1] / PATCH)
    if tokens > most:
        side = math.isqrt(most) * PATCH
        raise UsageError(
            f"the picture to make is {size[0]}x{size[1]}, {tokens} tokens of at most {most} (about {side}x{side})",
            remedy,
        )


def _scaled(outpaint: tuple[int, int, int, int], before: tuple[int, int], after: tuple[int, int]) -> tuple[int, ...]:
    """New margins that keep their share of the picture after it was resized."""
    across, down = after[0] / before[0], after[1] / before[1]
    return tuple(round(pixels * scale) for pixels, scale in zip(outpaint, (across, down, across, down), strict=True))


def _unchanged(image: Image.Image) -> Image.Image:
    return image
