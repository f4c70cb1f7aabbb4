"""Recorded runs of UniPic-2: every tensor from the prompt to the picture, and the picture that a user gets."""

import warnings
from collections.abc import Mapping

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from unipic_run.bench.parity_case import Case
from unipic_run.bench.parity_deepgen import LEVELS_OFF, WatchedSampler, replay_levels, tape
from unipic_run.bench.parity_ledger import EXACT, INJECTED, Ledger
from unipic_run.bench.parity_stream import Stream
from unipic_run.engine.checks import PATCH
from unipic_run.engine.engine import Engine
from unipic_run.engine.errors import UnipicWarning
from unipic_run.engine.models.deepgen import model as deepgen
from unipic_run.engine.models.deepgen.prompts import as_ids
from unipic_run.engine.models.deepgen.vision import as_patches
from unipic_run.engine.models.unipic2.kontext.prompts import TOKENIZERS, ids_of
from unipic_run.engine.models.unipic2.metaquery import prompts as metaquery
from unipic_run.engine.models.unipic2.metaquery.shrink import smaller
from unipic_run.engine.picture import resize, to_pixels
from unipic_run.engine.run import to_levels
from unipic_run.engine.task import Batch, Task

PAINTER = {name: f"weights/{name}" for name in ("transformer", "vae", "scheduler")}
RELEASES = {  # kind -> the folders of a release, and which recorded ones they are
    "unipic2_metaquery": PAINTER
    | {"conditioner": "weights/conditioner", "vlm": "weights/vlm_base", "tokenizer": "tokenizer"},
    "unipic2_kontext": PAINTER
    | {f"{use}{end}": f"weights/{use}{end}" for use in ("text_encoder", "tokenizer") for end in ("", "_2", "_3")},
}


def replay_kontext(engine: Engine, case: Case) -> Ledger:
    """A case of kind `unipic2_kontext`."""
    ledger, texts = case.ledger(), said(case)
    for encoder, number in TOKENIZERS.items():
        ids = [ids_of(engine.loaded.tokens, engine.config, encoder, text) for text in texts]
        ledger.compare(f"tokenizer{number and f'_{number}'}.input_ids", ids, EXACT)
    seen, prompts = conditions(engine, case, task_of(ledger, engine, case))
    for text, prefix in zip(texts, ("", "negative_"), strict=True):
        ledger.compare_scaled(f"{prefix}prompt_embeds", seen.text[text])
        ledger.compare_scaled(f"{prefix}pooled_prompt_embeds", seen.pooled[text])
    ledger.compare_scaled("dit_pooled_uncond_cond", torch.cat([seen.pooled[text] for text in texts[::-1]]))
    replay_sampling(ledger, engine, case, prompts)
    return ledger


def replay_metaquery(engine: Engine, case: Case) -> Ledger:
    """A case of kind `unipic2_metaquery`."""
    ledger, model = case.ledger(), engine.loaded.model
    stream = Stream(model)
    task = task_of(ledger, engine, case)
    seen, prompts = conditions(engine, case, task)
    grids = [picture.grid for picture in seen.pictures]
    if grids:
        patches, rows, columns = as_patches(smaller(task.sources[0]))
        ledger.compare_scaled("vis.patches", patches)
        ledger.compare("vis.grid_thw", [[1, rows, columns]] * 2, EXACT)  # the same picture in both rows
        ledger.compare_scaled("vis.embeds", stream.plain(torch.cat([seen.pictures[0].features] * 2)))
    texts = [metaquery.turn(task.kind, text, len(grids)) for text in said(case)]
    ids = [as_ids(engine.loaded.tokens, text, engine.config.image_token, grids) for text in texts]
    compare_rows(ledger, ids, engine.config.connector.queries)
    hidden = torch.cat([seen.states[text] for text in texts])
    text, pooled = model.connector(hidden)
    ledger.compare_scaled("query_hidden", stream.plain_normed(hidden))
    ledger.compare_scaled("seq", text)
    ledger.compare_scaled("pooled", pooled)
    ledger.compare_scaled("dit_pooled_uncond_cond", pooled.flip(0))
    replay_sampling(ledger, engine, case, prompts)
    return ledger


def said(case: Case) -> list[str]:
    return [case.settings["prompt"], case.settings["negative_prompt"]]


def task_of(ledger: Ledger, engine: Engine, case: Case) -> Task:
    """What was asked for, with the source resized as recorded."""
    settings, sources = case.settings, ()
    if "ref0.raw_uint8" in case.tensors:
        raw = Image.fromarray(case.tensors["ref0.raw_uint8"].numpy())
        made = resize(raw, engine.loaded.family.fitted_size(raw.size, "longest", settings["resize_longest_edge"]))
        ledger.compare("ref0.resized_uint8", np.array(made), EXACT)
        ledger.leave("ref0.raw_uint8", INJECTED)
        sources = (to_pixels(made, torch.float32, cast_first=False).to(engine.device),)
    return Task(
        kind="edit" if sources else "generate",
        rows=settings["height"] // PATCH,
        columns=settings["width"] // PATCH,
        steps=settings["num_steps"],
        guidance=settings["guidance_scale"],
        cfg_schedule="constant",
        temperature=1.0,
        sources=sources,
    )


def conditions(engine: Engine, case: Case, task: Task) -> tuple[object, object]:
    """What was read of the prompts, and what the transformer takes of that. The negative prompt is the usual one."""
    family, batch, found = engine.loaded.family, batch_of(case), [None]
    for stage in ("look", "read", "condition"):
        found.append(getattr(family, stage)(engine.loaded.model, engine.loaded.tokens, task, batch, found[-1]))
    return found[-2], found[-1]


def batch_of(case: Case) -> Batch:
    return Batch([case.settings["prompt"]], [tape(case, 0, [0] * ("ref0.vae_noise" in case.tensors))])


def compare_rows(ledger: Ledger, ids: list[list[int]], queries: int) -> None:
    """Ids, mask and positions where a record holds tokens: on its pads nothing depends."""
    mask = ledger.recorded["attention_mask"].bool()
    ledger.compare("attention_mask", mask.sum(1), EXACT, torch.tensor([len(row) + queries for row in ids]))
    for row, (own, filled) in enumerate(zip(ids, mask, strict=True)):
        ledger.compare(f"input_ids (row {row})", own, EXACT, ledger.recorded["input_ids"][row][filled][:-queries])
        at = torch.arange(len(own) + queries).expand(3, -1)
        ledger.compare(f"position_ids (row {row})", at, EXACT, ledger.recorded["position_ids"][:, row, filled])
    for name in ("input_ids", "position_ids"):
        ledger.leave(name, "compared row by row: prompts are never padded here, and queries have no ids")


def replay_sampling(ledger: Ledger, engine: Engine, case: Case, found: object) -> None:
    """From conditions to the picture."""
    model, settings = engine.loaded.model, case.settings
    (prompt,), noises = found.prompts.values(), batch_of(case).noises
    ledger.compare_scaled("dit_seq_uncond_cond", prompt.text.flip(0))
    levels, references = replay_levels(ledger, engine, settings["num_steps"]), []
    for index, seen in enumerate(found.pictures):
        references.append(deepgen.posterior(engine.config, seen, index, noises))
        ledger.compare_scaled(f"ref{index}.latents", references[-1])
        ledger.leave(f"ref{index}.vae_noise", INJECTED)
    sampler = WatchedSampler(model, [prompt], references, settings["guidance_scale"])
    x, states = case.tensors["noise"].to(prompt.text), []
    for step in range(len(levels)):
        x, _ = sampler.step(x, levels, step)
        states.append(x)
    ledger.leave("noise", INJECTED)
    ledger.compare_scaled("noise_pred", torch.stack(sampler.seen).flip(1))
    ledger.compare_scaled("latents", torch.stack(states))
    pixels = deepgen.decode(model, x, settings["height"] // PATCH, settings["width"] // PATCH)
    recorded = case.tensors["image_uint8_hwc"]
    ledger.compare_levels("image_uint8_hwc", to_levels(pixels)[0].cpu(), recorded, LEVELS_OFF)
    ledger.compare_levels("image_uint8_hwc (through the engine)", through_engine(engine, case), recorded, LEVELS_OFF)


def through_engine(engine: Engine, case: Case) -> Tensor:
    """The picture (H, W, 3) uint8 that a user gets."""
    settings: Mapping[str, object] = case.settings
    options = {"steps": settings["num_steps"], "guidance": settings["guidance_scale"]}
    options |= {"seed": 0, "noise": batch_of(case).noises}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnipicWarning)  # recorded sizes are small on purpose
        if "ref0.raw_uint8" in case.tensors:
            source = Image.fromarray(case.tensors["ref0.raw_uint8"].numpy())
            result = engine.edit(source, settings["prompt"], res=settings["resize_longest_edge"], **options)
        else:
            result = engine.generate(settings["prompt"], size=(settings["width"], settings["height"]), **options)
    return torch.from_numpy(np.array(result.images[0]))
