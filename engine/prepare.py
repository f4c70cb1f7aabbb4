"""Checked requests to tasks: pictures become tensors of the right shape, and what must be undone afterwards is kept."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from PIL import Image

from .errors import UsageError
from .picture import Canvas, center_crop, composite, fit_area, pad_square, pad_to_patch, resize, to_pixels
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
        image = _fitted(request.image, request.fit or "keep", request.res)
        pixels = to_pixels(image, dtype, cast_first=False).to(device)
        return _task("edit", *image.size, request.sampling, defaults, pixels=pixels), _unchanged
    canvas = _canvas(request, max_tokens)
    pixels = to_pixels(canvas.image, dtype, cast_first=False).to(device)
    task = _task(
        "inpaint", *canvas.image.size, request.sampling, defaults, pixels=pixels, cells=torch.from_numpy(canvas.cells)
    )
    return task, lambda image: composite(canvas.image, image, canvas.mask).crop(canvas.box)


def ask_pixels(image: Image.Image, res: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """(1, 3, res, res): padded to a square, arithmetic in `dtype` as the released script does it."""
    return to_pixels(pad_square(image, res), dtype, cast_first=True).to(device)


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


def _fitted(image: Image.Image, fit: str, res: int) -> Image.Image:
    return center_crop(image, res) if fit == "crop" else resize(image, fit_area(*image.size, res))


def _canvas(request: EditRequest, max_tokens: int) -> Canvas:
    image, mask, outpaint = request.image, request.mask, request.outpaint
    if request.fit:
        before = image.size
        image = _fitted(image, request.fit, request.res)
        mask = mask and _fitted(mask, request.fit, request.res)
        outpaint = outpaint and _scaled(outpaint, before, image.size)
    canvas = pad_to_patch(image, mask, outpaint)
    if not canvas.cells.any():
        raise UsageError("after fitting, nothing is left to regenerate", "use fit keep, or a larger mask")
    if canvas.cells.size > max_tokens:
        side = math.isqrt(max_tokens) * PATCH
        raise UsageError(
            f"the picture to fill is {canvas.image.width}x{canvas.image.height}, {canvas.cells.size} tokens of at most "
            f"{max_tokens} (about {side}x{side})",
            "scale it down with fit keep or fit crop",
        )
    return canvas


def _scaled(outpaint: tuple[int, int, int, int], before: tuple[int, int], after: tuple[int, int]) -> tuple[int, ...]:
    """New margins that keep their share of the picture after it was resized."""
    across, down = after[0] / before[0], after[1] / before[1]
    return tuple(round(pixels * scale) for pixels, scale in zip(outpaint, (across, down, across, down), strict=True))


def _unchanged(image: Image.Image) -> Image.Image:
    return image
