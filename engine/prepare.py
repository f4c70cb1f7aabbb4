"""Checked requests to tasks: pictures become tensors of the right shape, and what must be undone afterwards is kept."""

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image

from .checks import PATCH
from .errors import UnipicWarning, UsageError
from .picture import Canvas, center_crop, composite, fit_mask, pad_to_patch, resize, to_pixels
from .request import EditRequest, GenerateRequest
from .sampling import SAMPLED, SHORTCUTS, Sampling
from .schedules import begins_within
from .task import Task
from .verbs import Verbs

Finish = Callable[[Image.Image], Image.Image]


@dataclass(frozen=True)
class Defaults:
    """What a checkpoint takes where a request says nothing."""

    steps: int
    guidance: float
    speeds: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # fields of a Task, by the speed


def defaults_of(family: Verbs, config: Any) -> Defaults:
    return Defaults(config.rounds, config.guidance, family.speeds(config))


def settled(sampling: Sampling, defaults: Defaults) -> dict[str, Any]:
    """SAMPLED of a Task: as asked, else as the speed has it, else as the checkpoint; the rest is the Task's default."""
    usual = {"steps": defaults.steps, "guidance": defaults.guidance} | dict(defaults.speeds.get(sampling.speed, {}))
    asked = {name: getattr(sampling, name) for name in SAMPLED}
    return usual | {name: value for name, value in asked.items() if value is not None}


def generate_task(request: GenerateRequest, defaults: Defaults) -> tuple[Task, Finish]:
    width, height = request.size
    return _task("generate", width, height, request.sampling, defaults), _unchanged


def edit_task(
    request: EditRequest, family: Verbs, config: Any, defaults: Defaults, device: torch.device, dtype: torch.dtype
) -> tuple[Task, Finish]:
    """Whole-picture edits take the size that `fit` gives; masked ones keep the source's size and unmasked pixels.

    With several pictures the result is of the size that was asked for, or a square. Raises UsageError.
    """
    most = family.max_image_tokens(config)
    check_edit(request, family)
    if request.masked:
        canvas = _canvas(request, family, most)
        source = to_pixels(canvas.image, dtype, cast_first=False).to(device)
        how = {"sources": (source,), "cells": torch.from_numpy(canvas.cells)}
        task = _task("inpaint", *canvas.image.size, request.sampling, defaults, **how)
        return task, lambda image: composite(canvas.image, image, canvas.mask).crop(canvas.box)
    fit, pictures = request.fit or family.fits[0], (request.image, *request.references)
    sizes = [family.fitted_size(picture.size, fit, request.res) for picture in pictures]
    size = request.size or (sizes[0] if len(sizes) == 1 else (request.res, request.res))
    for each in {size, *sizes}:
        _check_tokens(each, most // (1 + len(sizes)), "use a smaller res")  # all of them are in the model at once
    fitted = (_fitted(picture, fit, to) for picture, to in zip(pictures, sizes, strict=True))
    sources = tuple(to_pixels(picture, dtype, cast_first=False).to(device) for picture in fitted)
    how = {"sources": sources, "posterior": request.posterior}
    return _task("edit", *size, request.sampling, defaults, **how), _unchanged


def check_kind(kind: str, family: Verbs) -> None:
    """Raises UsageError for questions to a family that answers none."""
    if kind == "ask" and "ask" not in family.kinds:
        raise UsageError("this model does not answer questions", "ask another one, such as unipic")


def check_edit(request: EditRequest, family: Verbs) -> None:
    """Raises UsageError for what this family's edits cannot do."""
    if request.masked and "inpaint" not in family.kinds:
        raise UsageError("this model does not repaint under a mask or around a picture", "edit the whole picture")
    if len(request.references) >= family.most_sources:
        given = 1 + len(request.references)
        raise UsageError(f"{given} pictures given, this model edits {family.most_sources}", "give it fewer")
    if request.size and family.most_sources == 1:
        raise UsageError("this model's edits have the shape of their source", "use res, or resize the result")
    if request.fit and request.fit not in family.fits:
        raise UsageError(f"fit {request.fit} is not known to this model", f"choose from {', '.join(family.fits)}")
    if request.posterior and request.posterior not in family.posteriors:
        what = f"posterior {request.posterior} is not known to this model"
        raise UsageError(what, f"choose from {', '.join(family.posteriors)}")


def check_request(request: GenerateRequest | EditRequest, family: Verbs) -> None:
    """Raises UsageError for what this family cannot do, whichever checkpoint of it."""
    check_shortcuts(request.sampling, family)
    if isinstance(request, EditRequest):
        check_edit(request, family)


def check_shortcuts(asked: Task | Sampling, family: Verbs) -> None:
    """Raises UsageError for those this family does not know."""
    for name in SHORTCUTS:
        value = getattr(asked, name)
        if name not in family.shortcuts and value not in (None, getattr(Task, name)):
            known = f"; it knows {', '.join(family.shortcuts)}" if family.shortcuts else ""
            what = f"{name} {value} has no meaning for this model"
            raise UsageError(what, f"leave it out{known}")


def note_doubts(task: Task, side: int) -> None:
    """Warnings about what runs but may disappoint; `side` is the trained resolution."""
    width, height = task.columns * PATCH, task.rows * PATCH
    if not 0.8 <= width * height / side**2 <= 1.25:
        note = f"{width}x{height} is far from the {side}x{side} this model was trained at: expect poorer pictures"
        warnings.warn(note, UnipicWarning, stacklevel=5)
    if task.negative is not None and task.guidance == 1.0:
        warnings.warn("a negative prompt steers nothing at guidance 1", UnipicWarning, stacklevel=5)
    if task.guidance != 1.0 and not any(begins_within(task.cfg_interval, i, task.steps) for i in range(task.steps)):
        first, end = task.cfg_interval
        note = f"no round of {task.steps} begins in the cfg_interval {first:g} to {end:g}: nothing is guided"
        warnings.warn(note, UnipicWarning, stacklevel=5)


def _task(kind: str, width: int, height: int, sampling: Sampling, defaults: Defaults, **source: Any) -> Task:
    return Task(
        kind=kind,
        rows=height // PATCH,
        columns=width // PATCH,
        **settled(sampling, defaults),
        **source,
    )


def _fitted(image: Image.Image, fit: str, size: tuple[int, int]) -> Image.Image:
    return center_crop(image, size[0]) if fit == "crop" else resize(image, size)


def _canvas(request: EditRequest, family: Verbs, max_tokens: int) -> Canvas:
    image, mask, outpaint = request.image, request.mask, request.outpaint
    if request.fit:
        size = family.fitted_size(image.size, request.fit, request.res)
        outpaint = outpaint and _scaled(outpaint, image.size, size)
        mask = mask and fit_mask(mask, size, crop=request.fit == "crop")
    else:
        size = image.size
    left, top, right, bottom = outpaint or (0, 0, 0, 0)
    _check_tokens((size[0] + left + right, size[1] + top + bottom), max_tokens, "scale it down with fit keep or crop")
    if request.fit:
        image = _fitted(image, request.fit, size)
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
