"""Recorded runs of DeepGen 1.0: every tensor between prompt and picture, with the record's own batches and randomness.

Rows of a recorded batch were padded to the longest of all. An engine never lets prompts depend on each other so: a
batch is replayed through the family's functions, a single picture through `Engine.generate` or `edit` as well.
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from unipic_run.bench.parity_case import Case
from unipic_run.bench.parity_ledger import EXACT, INJECTED, Ledger
from unipic_run.bench.parity_stream import Stream
from unipic_run.engine.engine import Engine
from unipic_run.engine.errors import UnipicWarning
from unipic_run.engine.models.deepgen import model as deepgen
from unipic_run.engine.models.deepgen.limits import fitted_size
from unipic_run.engine.models.deepgen.model import Picture
from unipic_run.engine.models.deepgen.prompts import as_ids, turn
from unipic_run.engine.models.deepgen.sampler import Guided, Levels, Sampler
from unipic_run.engine.models.deepgen.vision import patches
from unipic_run.engine.noise import FlowTape
from unipic_run.engine.picture import resize, to_pixels
from unipic_run.engine.run import to_levels
from unipic_run.engine.schedules import FLOW_STEPS

LEVELS_OFF = 0.002  # share of 8-bit values that may be one level off
TABLES = 1e-6  # relative, of noise levels
DEEPGEN = {name: f"weights/{name}" for name in ("transformer", "vae", "connector", "scheduler", "vlm")}
DEEPGEN |= {"tokenizer": "tokenizer"}  # the folders of a release, and which recorded ones they are


def assemble(folder: Path, into: Path, release: Mapping[str, str]) -> Path:
    """A released folder made of links to recorded ones."""
    into.mkdir(parents=True)
    for name, recorded in release.items():
        (into / name).symlink_to((folder / recorded).resolve())
    return into


def replay_deepgen(engine: Engine, case: Case) -> Ledger:
    """A case of kind `deepgen`."""
    ledger, settings = case.ledger(), case.settings
    model, counts = engine.loaded.model, settings["refs_per_sample"] or [0] * len(settings["prompt"])
    pictures = [look(ledger, engine, case, index) for index in range(sum(counts))]
    own = [pictures[sum(counts[:i]) : sum(counts[: i + 1])] for i in range(len(counts))]
    text, pooled = replay_conditions(ledger, engine, case, own)
    levels = replay_levels(ledger, engine, settings["num_steps"])
    guided = settings["cfg_scale"] > 1.0
    latents, velocities, finals = [], [], []
    for image, seen in enumerate(own):
        rows = [image, image + len(own)][: 1 + guided]
        prompt = Guided(text[rows], model.modulation(levels.timesteps.to(text.device), pooled[rows]))
        first = sum(counts[:image])
        noises = [tape(case, image, range(first, first + len(seen)))]
        references = [deepgen.posterior(engine.config, x, index, noises) for index, x in enumerate(seen)]
        for index, found in enumerate(references, first):
            ledger.compare_scaled(f"ref{index}.latents", found)
        sampler = WatchedSampler(model, [prompt], references, settings["cfg_scale"])
        x, states = case.tensors["noise"][image : image + 1].to(text), []
        for step in range(len(levels)):
            x, _ = sampler.step(x, levels, step)
            states.append(x)
        latents.append(torch.cat(states))
        velocities.append(torch.stack(sampler.seen))  # (S, K, C, h, w), conditional row first
        finals.append(x)
    ledger.leave("noise", INJECTED)
    ledger.compare_scaled("noise_pred", torch.stack([v[:, k] for k in range(guided, -1, -1) for v in velocities], 1))
    ledger.compare_scaled("latents", torch.stack(latents, 1))
    size = settings["height"] // 16, settings["width"] // 16
    pixels = deepgen.decode(model, torch.cat(finals), *size)
    ledger.compare_scaled("image", pixels.movedim(3, 1))
    recorded = case.tensors["image_uint8"]
    ledger.compare_levels("image_uint8", to_levels(pixels).movedim(3, 1).cpu(), recorded, LEVELS_OFF)
    if len(own) == 1:
        made = through_engine(engine, case, len(pictures))
        ledger.compare_levels("image_uint8 (through the engine)", made, recorded[0], LEVELS_OFF)
    return ledger


class WatchedSampler(Sampler):
    """Keeps the unguided velocities."""

    def __init__(self, *given: object) -> None:
        super().__init__(*given)
        self.seen: list[Tensor] = []

    def rows(self, *given: object) -> Tensor:
        self.seen.append(super().rows(*given))
        return self.seen[-1]


def tape(case: Case, image: int, references: Sequence[int]) -> FlowTape:
    """The randomness of one recorded image."""
    return FlowTape(case.tensors["noise"][image], [case.tensors[f"ref{index}.vae_noise"][0] for index in references])


def look(ledger: Ledger, engine: Engine, case: Case, index: int) -> Picture:
    """A reference resized as recorded, and what the model sees in it."""
    pixels = resized(ledger, case, index, case.settings["resize_to_longest_edge"]).to(engine.device)
    seen, merge = deepgen.see(engine.loaded.model, pixels), engine.config.vision.merge
    x, rows, columns = patches(pixels)
    ledger.compare(f"vis{index}.grid_thw", [[1, rows, columns]], EXACT)
    if f"vis{index}.patches" in case.tensors:
        ledger.compare_scaled(f"vis{index}.patches", x)
    ledger.compare_scaled(f"vis{index}.embeds", Stream(engine.loaded.model).plain(seen.features))
    ledger.leave(f"ref{index}.vae_noise", INJECTED)
    return replace(seen, grid=(rows // merge, columns // merge))


def resized(ledger: Ledger, case: Case, index: int, longest: int | None) -> Tensor:
    """The pixels (1, 3, H, W) of a reference, made from the recorded source."""
    raw = Image.fromarray(case.tensors[f"ref{index}.raw_uint8"].numpy())
    made = resize(raw, fitted_size(raw.size, "longest", longest)) if longest else raw
    ledger.compare(f"ref{index}.resized_uint8", np.array(made), EXACT)
    ledger.leave(f"ref{index}.raw_uint8", INJECTED)
    return to_pixels(made, torch.float32, cast_first=False)


def replay_conditions(
    ledger: Ledger, engine: Engine, case: Case, own: Sequence[Sequence[Picture]]
) -> tuple[Tensor, Tensor]:
    """Text stream and pooled vector of all rows, conditional ones first, padded to the longest of them."""
    model, settings, kind = engine.loaded.model, case.settings, "edit" if any(own) else "generate"
    stream = Stream(model)
    said = [*zip(settings["prompt"], own, strict=True), *zip(settings["cfg_prompt"], own, strict=True)]
    ids = [
        as_ids(engine.loaded.tokens, turn(kind, text, len(seen)), engine.config.image_token, [x.grid for x in seen])
        for text, seen in said
    ]
    inputs = [deepgen.embedded(model, row, seen) for row, (_, seen) in zip(ids, said, strict=True)]
    compare_rows(ledger, engine, ids, [(x, at.expand(3, 1, -1)) for x, at in inputs])
    inputs.append(deepgen.pad(model))
    *states, pad = deepgen.states_of(model, inputs)
    longest = max(x.shape[1] for x in states)
    states = deepgen.padded(states, pad, longest)
    ledger.compare_scaled("scb_in", stream.plain_taps(states))
    ledger.compare_scaled("connector_out", model.connector.encode(states))
    if "proj1_out" in ledger.recorded:
        ledger.compare_scaled("proj1_out", model.connector.projector_1(states))
    if "llm_last_hidden_state" in ledger.recorded:
        *_, (*last, pad) = model.llm.outputs(*zip(*inputs, strict=True))
        normed = model.llm.norm(deepgen.padded(last, pad, longest))
        ledger.compare_scaled("llm_last_hidden_state", stream.plain_normed(normed))
    text, pooled = model.connector(states)
    ledger.compare_scaled("seq", text)
    ledger.compare_scaled("pooled", pooled)
    return text, pooled


def compare_rows(
    ledger: Ledger, engine: Engine, ids: Sequence[Sequence[int]], inputs: Sequence[tuple[Tensor, Tensor]]
) -> None:
    """What the language model is given, with pads in front as the record has them."""
    model, queries, longest = engine.loaded.model, engine.config.connector.queries, max(map(len, ids))
    missing = [longest - len(row) for row in ids]
    pad = engine.config.pad_token
    ledger.compare("input_ids", [[pad] * n + [*row] for n, row in zip(missing, ids, strict=True)], EXACT)
    ledger.compare("attention_mask", [[0] * n + [1] * (longest - n + queries) for n in missing], EXACT)
    at = [torch.cat([x.new_ones(3, 1, n), x], 2) for n, (_, x) in zip(missing, inputs, strict=True)]
    ledger.compare("position_ids", torch.cat(at, 1), EXACT)
    if "inputs_embeds" in ledger.recorded:
        x = deepgen.padded([x for x, _ in inputs], deepgen.pad(model)[0], longest + queries)
        ledger.compare_scaled("inputs_embeds", Stream(model).plain(x))


def replay_levels(ledger: Ledger, engine: Engine, steps: int) -> Levels:
    levels = Levels.of(steps, engine.config.shift)
    ledger.compare_scaled("sigmas", levels.sigmas, tolerance=TABLES)
    ledger.compare_scaled("timesteps", [FLOW_STEPS * sigma for sigma in levels.sigmas[:-1]], tolerance=TABLES)
    return levels


def through_engine(engine: Engine, case: Case, references: int) -> Tensor:
    """The picture (3, H, W) uint8 that a user gets."""
    settings, longest = case.settings, case.settings["resize_to_longest_edge"]
    sources = [Image.fromarray(case.tensors[f"ref{index}.raw_uint8"].numpy()) for index in range(references)]
    options = {"steps": settings["num_steps"], "guidance": settings["cfg_scale"], "negative": settings["cfg_prompt"][0]}
    options |= {"seed": 0, "noise": [tape(case, 0, range(references))], "size": (settings["width"], settings["height"])}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnipicWarning)  # recorded sizes are small on purpose
        if not references:
            result = engine.generate(settings["prompt"], **options)
        else:
            how = {"references": sources[1:], "fit": "longest", "res": longest or engine.config.resolution}
            result = engine.edit(sources[0], settings["prompt"], **how, **options)
    return torch.from_numpy(np.array(result.images[0])).movedim(2, 0)
