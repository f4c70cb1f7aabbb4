"""Recorded runs replayed through `Engine.generate`, `edit` and `ask`, randomness from the record."""

import re
import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor
from unipic_run.bench.parity_case import Case
from unipic_run.bench.parity_ledger import EXACT, INJECTED, NETWORK, Ledger
from unipic_run.bench.parity_watch import Prefill, Watch
from unipic_run.engine.checks import PATCH
from unipic_run.engine.engine import Engine
from unipic_run.engine.errors import UnipicWarning
from unipic_run.engine.kv_cache import KVCache
from unipic_run.engine.models.unipic.prompts import TURN, UNCONDITIONAL, turn
from unipic_run.engine.noise import Tape
from unipic_run.engine.outcome import Result
from unipic_run.engine.schedules import Round

PADS = "pad slots: prompts are never padded here"
PRUNED = "rows that this round does not predict: the last decoder block leaves them out"


def replay_images(engine: Engine, case: Case) -> Ledger:
    """A `text2image`, `text2image_batch` or `image_edit` case, all images in one batch and then one by one."""
    ledger = case.ledger()
    result, watch = make_images(engine, case, case.batch)
    compare_prompts(ledger, engine, watch)
    if "source_pixels" in case.tensors:
        compare_source(ledger, watch)
    compare_rounds(ledger, watch, case.settings)
    compare_pictures(ledger, case, result, watch, "")
    if case.batch > 1:
        compare_pictures(ledger, case, *make_images(engine, case, 1), " (one by one)")
    return ledger


def make_images(engine: Engine, case: Case, batch_size: int) -> tuple[Result, Watch]:
    settings = case.settings
    options = {
        "steps": settings["num_iter"],
        "guidance": settings["cfg"],
        "cfg_schedule": settings["cfg_schedule"],
        "temperature": settings["temperature"],
        "negative": negative(case),
        "batch_size": batch_size,
        "noise": tapes(case),
        "seed": 0,
    }
    with Watch(engine) as watch, warnings.catch_warnings():
        warnings.simplefilter("ignore", UnipicWarning)  # recorded sizes are small on purpose
        if case.kind == "image_edit":
            prompts = [settings["prompt"]] * case.batch
            return engine.edit(case.source, prompts, fit="crop", res=settings["image_size"], **options), watch
        rows, columns = settings["image_shape"]
        return engine.generate(user_prompts(case), size=(columns * PATCH, rows * PATCH), **options), watch


def tapes(case: Case) -> list[Tape]:
    """Recorded randomness, one tape an image; a round's rows are stored image by image."""
    tensors, batch = case.tensors, case.batch
    rounds = [int(found[1]) for name in tensors if (found := re.fullmatch(r"step(\d+)\.noise", name))]
    return [
        Tape(
            tensors["orders"][image].long(),
            {s: tensors[f"step{s}.noise_init"].unflatten(0, (batch, -1))[image] for s in rounds},
            {s: tensors[f"step{s}.noise"].unflatten(1, (batch, -1))[:, image] for s in rounds},
        )
        for image in range(batch)
    ]


def user_prompts(case: Case) -> list[str]:
    """What the user typed, one an image, from the formatted prompts: the batch script adds a full stop of its own.

    Unconditional prompts stand behind the conditional ones; the list may hold each distinct prompt of a grid once.
    """
    settings, halves = case.settings, 1 if case.settings["cfg"] == 1.0 else 2
    formatted = settings.get("formatted_prompts") or [settings["formatted_prompt"]] * halves
    distinct = min(case.batch, len(formatted) // halves)
    prompts = [_between(text, turn("generate", "\0")) for text in formatted[:distinct]]
    return prompts * (case.batch // distinct)


def negative(case: Case) -> str | None:
    """The unconditional text as our `negative`, None for the usual one."""
    said = case.settings.get("cfg_prompt")
    kind = "edit" if case.kind == "image_edit" else "generate"
    if said in (None, UNCONDITIONAL[kind]):
        return None
    return said if kind == "edit" else _between(TURN.format(said), turn("generate", "\0"))


def _between(text: str, template: str) -> str:
    before, _, after = template.partition("\0")
    if not (text.startswith(before) and text.endswith(after)):
        raise ValueError(f"{text!r} does not follow the template {template!r}")
    return text[len(before) : len(text) - len(after)]


def compare_prompts(ledger: Ledger, engine: Engine, watch: Watch) -> None:
    """Ids, embeddings, hidden states and caches of every row, at the slots that hold a token."""
    conditions = watch.batches[0].conditions
    caches = [cache for cache, rows in conditions.rows for _ in range(rows)]
    prompts = [watch.prompt(cache, conditions.seen) for cache in caches]
    recorded = ledger.recorded
    mask = recorded["attention_mask"].bool()
    ids = [prompt_ids(prompt, engine.config.image_token) for prompt in _spread(prompts, len(mask))]
    slots = torch.arange(mask.shape[1])
    ledger.compare("attention_mask", torch.stack([slots < len(row) for row in ids]), EXACT)

    def compare(name: str, rows: list[Tensor], tolerance: float, position: int = 1) -> None:
        """`rows`: (L, ...) of each recorded row; `position` is the recorded tensor's dimension of slots."""
        if name in recorded:
            tensor = recorded[name].movedim(position, 1)
            valid = mask.repeat_interleave(len(tensor) // len(mask), 0)
            ledger.compare(name, torch.cat(_spread(rows, len(tensor))), tolerance, tensor[valid])
            if not mask.all():
                ledger.leave(name, PADS)

    compare("input_ids", [torch.tensor(row) for row in ids], EXACT)
    compare("inputs_embeds", [joined(prompt, "x") for prompt in prompts], NETWORK)
    compare("prefill.hidden", [joined(prompt, "hidden") for prompt in prompts], NETWORK)
    for layer in range(engine.config.llm.layers):
        keys, values = zip(*(_slots_first(cache, layer) for cache in caches), strict=True)
        compare(f"prefill.k.{layer}", list(keys), NETWORK, position=2)
        compare(f"prefill.v.{layer}", list(values), NETWORK, position=2)


def prompt_ids(prompt: list[Prefill], image_token: int) -> list[int]:
    """Text ids, and the placeholder wherever image features stand behind a stretch's text."""
    return [i for part in prompt for i in (*part.ids, *[image_token] * (part.x.shape[1] - len(part.ids)))]


def joined(prompt: list[Prefill], what: str) -> Tensor:
    return torch.cat([getattr(part, what)[0] for part in prompt])


def _slots_first(cache: KVCache, layer: int) -> tuple[Tensor, ...]:
    return tuple(x.transpose(0, 1).cpu() for x in cache.upto(layer, 0))  # (S, K, d)


def _spread(rows: list[Any], count: int) -> list[Any]:
    """`count` rows out of a multiple of them: records may hold one row for all equal ones."""
    return [rows[i * len(rows) // count] for i in range(count)]


def compare_source(ledger: Ledger, watch: Watch) -> None:
    """What the model made of the picture to edit."""
    task, source = watch.batches[0].task, watch.batches[0].conditions.source
    grid = (task.rows, task.columns)
    ledger.compare("source_pixels", task.sources[0], NETWORK)
    ledger.compare("source_latent_tokens", source.latents.unflatten(1, grid), NETWORK)
    ledger.compare("source_x_con", source.x_con, NETWORK)
    ledger.compare("source_z_enc", watch.stream.plain(source.features), NETWORK)


def compare_rounds(ledger: Ledger, watch: Watch, settings: dict[str, Any]) -> None:
    batch, recorded = watch.batches[0], ledger.recorded
    counts = [plan.predicted.shape[1] for plan, _ in batch.rounds]
    ledger.compare("schedule", counts, EXACT, [n for n in settings["num_tokens_predicted_per_iter"] if n])
    ledger.leave("orders", INJECTED)
    for plan, seen in batch.rounds:
        compare_plan(ledger, plan, watch.batches[0].tokens.shape[1])
        for name in ("noise_init", "noise", "position_ids"):
            compare_round(ledger, plan, seen, name, EXACT)
        for name in ("tokens_in", "enc", "llm_in", "llm_out", "enc_out", "head_z", "sampled", "cfg"):
            compare_round(ledger, plan, seen, name, NETWORK)
        full = f"step{plan.index}.z"
        if full in recorded:
            ledger.compare(full, seen["z"], NETWORK, predicted_rows(recorded[full], plan))
            ledger.leave(full, PRUNED)


def compare_plan(ledger: Ledger, plan: Round, tokens: int) -> None:
    """Which tokens were still masked, and which of them the round predicts; the guidance halves share both."""
    masked = torch.ones(len(plan.visible), tokens).scatter(1, plan.visible, 0)
    predicted = torch.zeros_like(masked).scatter(1, plan.predicted, 1)
    for name, ours in ((f"step{plan.index}.mask_in", masked), (f"step{plan.index}.pred_mask", predicted)):
        recorded = ledger.recorded[name]
        ledger.compare(name, _halves(ours, recorded), EXACT)


def compare_round(ledger: Ledger, plan: Round, seen: dict[str, Any], name: str, tolerance: float) -> None:
    full = f"step{plan.index}.{name}"
    if full in ledger.recorded:
        ours = torch.as_tensor(seen[name])
        shared = name in ("tokens_in", "enc")  # computed once for both guidance halves
        ledger.compare(full, _halves(ours, ledger.recorded[full]) if shared else ours, tolerance)


def predicted_rows(z: Tensor, plan: Round) -> Tensor:
    """(R, n, D) to the rows the plan predicts, (R, N, D)."""
    index = _halves(plan.predicted, z)
    return z.gather(1, index[..., None].expand(-1, -1, z.shape[-1]))


def _halves(ours: Tensor, recorded: Tensor) -> Tensor:
    """Rows of B images repeated for each guidance half that the record has."""
    return ours.repeat(len(recorded) // len(ours), *[1] * (ours.dim() - 1))


def compare_pictures(ledger: Ledger, case: Case, result: Result, watch: Watch, how: str) -> None:
    recorded = ledger.recorded
    tokens = torch.cat([batch.tokens for batch in watch.batches])
    ledger.compare(f"tokens{how}", tokens, NETWORK, recorded["tokens"])
    ledger.compare(f"image{how}", torch.cat(watch.images), NETWORK, recorded["image"])
    if "image_u8" in recorded:
        ledger.compare_levels(f"image_u8{how}", pasted(result, case.settings["grid_size"]), recorded["image_u8"])


def pasted(result: Result, grid: int) -> Tensor:
    """The images of a call in a square grid, row by row, as the released script saves them."""
    tiles = np.stack([np.asarray(image) for image in result.images])  # (g g, H, W, 3)
    _, height, width, _ = tiles.shape
    rows = tiles.reshape(grid, grid, height, width, 3).swapaxes(1, 2)
    return torch.from_numpy(rows.reshape(grid * height, grid * width, 3))
