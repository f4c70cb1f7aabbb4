"""DeepGen 1.0: a vision-language model that conditions a diffusion transformer, as verbs and one module.

`look` embeds prompts and source pictures, `read` runs the language model, `condition` makes of its states what the
transformer takes, `sample` denoises, `decode` makes pixels. `needs` says which parts each of them runs: none but the
transformer is there while it denoises.

Letters: B pictures, K guidance rows of a picture (1 or 2), L tokens of a row, T of the longer of two, C = taps * width
of the language model, S steps.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor, nn

from ...graphs import Graphs
from ...layers.attention import Attention
from ...layers.linear import as_row, logits, table
from ...layers.qwen2 import Qwen2
from ...layers.vae import VAEDecoder, VAEEncoder
from ...layers.vae_bands import decode_in_bands
from ...next_token import cache_to_answer, next_logits  # noqa: F401 (the engine asks the family)
from ...noise import Noise
from ...task import Batch, Task
from ...tokens import Tokens
from . import conditioner
from .conditioner import Grid, PictureCache, Row, positions, side_by_side, tapped, with_queries
from .config import DeepGenConfig as Config
from .connector import Connector
from .keys import TUNED as tuned  # noqa: F401 (the engine asks the family)
from .limits import (  # noqa: F401 (the engine asks the family)
    check_prompts,
    check_question,
    fitted_size,
    max_image_tokens,
    question_picture,
    question_size,
)
from .mmdit import MMDiT
from .modulation import Modulation
from .prompts import IMAGE, PICTURE, SYSTEM, TURN, as_ids, texts_of, turn  # noqa: F401 (IMAGE: as above)
from .sampler import Guided, Levels, Sampler
from .speeds import speeds  # noqa: F401 (the engine asks the family)
from .vision import VisionTower, as_patches, patches

kinds = ("generate", "edit", "ask")
fits = ("keep", "longest", "crop")
posteriors = ("sample", "mean")
shortcuts = ("cfg_interval", "block_cache")
most_sources = 8
parts_guidance = True
lookups = {"look": ("embed",), "condition": ("embed",)}  # the latter of a question
stacks = ("llm", "vision", "modulation", "dit")
# Costs the same for equal shapes, so a dry run looks once.
repeated = (
    ("vision.blocks.*", "forward"),
    ("llm.layers.*", "follow"),
    ("llm.layers.*", "unattended"),
    ("dit", "forward"),
    ("dit", "first"),
    ("dit", "rest"),
    ("dit.blocks.*", "forward"),
)


def needs(kind: str) -> dict[str, tuple[str, ...]]:
    """Stage by stage, the parts that it runs."""
    if kind == "ask":
        return {"look": ("vision",), "condition": ("embed", "llm"), "answer": ("embed", "llm")}
    source = ("vision", "vae_encoder") if kind == "edit" else ()
    return {
        "look": ("embed", "connector", *source),  # of the connector the queries
        "read": ("llm",),
        "condition": ("connector", "modulation"),
        "sample": ("dit",),
        "decode": ("vae_decoder",),
    }


class DeepGen(nn.Module):
    """The parts by name. `graphs` belong to these weights where they lie."""

    def __init__(self, config: Config, attend: Attention) -> None:
        super().__init__()
        self.config, self.graphs = config, Graphs()
        self.embed = table(config.llm.vocab, config.llm.width)  # tied with the logits
        self.llm = Qwen2(config.llm, attend, round_inv_freq=False, sections=config.mrope)
        self.vision = VisionTower(config.vision, attend)
        self.connector = Connector(config.connector, config.llm.width, attend)
        self.modulation = Modulation(config.dit)
        self.dit = MMDiT(config.dit, attend)
        self.vae_encoder = VAEEncoder(config.vae)
        self.vae_decoder = VAEDecoder(config.vae)

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores (..., vocab) of the words after final hidden states (..., D)."""
        return logits(hidden, self.embed)


def build(config: Config, attend: Attention | None = None) -> DeepGen:
    """Uninitialised parts; call under `torch.device("meta")` and let `engine/weights.py` fill them."""
    return DeepGen(config, attend or Attention())


def attention_backend(model: DeepGen) -> str:
    return model.llm.attend.backend


@dataclass(frozen=True)
class Picture:
    """A source that the model has looked at, once for all rows."""

    features: Tensor  # (tokens, H) LLM inputs
    grid: Grid  # rows, columns of these
    moments: Tensor  # (1, 2 channels, h, w) mean and log variance of its latents


@dataclass(frozen=True)
class Conditions:
    """What is known of a task. `prompts` maps (prompt, negative) to what the transformer takes.

    `inputs`, with their positions, is what the language model has still to read; None is the pad.
    """

    pictures: tuple[Picture, ...]
    lengths: Mapping[str, int]  # of every row's text, with the queries
    inputs: Mapping[str | None, tuple[Tensor, Tensor | None]] = field(default_factory=dict)
    states: Mapping[str | None, Tensor] = field(default_factory=dict)  # (1, L, C)
    prompts: dict[tuple[str, str], Guided] = field(default_factory=dict)
    rows: tuple[tuple[str, str], ...] = ()  # of each picture of the batch, its entry of `prompts`


def look(model: DeepGen, tokens: Tokens, task: Task, batch: Batch, reuse: Conditions | None = None) -> Conditions:
    """Embed what the language model has not read yet; pictures of `reuse` (an earlier batch of the task) are kept.

    So are prompts that come again. All others are let go here: the modulation of a prompt is large.
    """
    pictures = reuse.pictures if reuse else tuple(see(model, pixels) for pixels in task.sources)
    known, prompts, rows = {}, {}, texts_of(task, batch.prompts)
    if reuse:
        known, prompts = reuse.states, taken_over(reuse.prompts, rows)
    image_token, grids, more = model.config.image_token, [x.grid for x in pictures], model.config.connector.queries
    lengths, inputs = {}, {}
    for pair in dict.fromkeys(row for row in rows if row not in prompts):
        ids = {text: as_ids(tokens, text, image_token, grids) for text in pair}
        lengths |= {text: len(ids[text]) + more for text in pair}
        for text in rows_of(pair, task):
            if text not in known:
                inputs[text] = embedded(model, ids[text], pictures)
    if None not in known:
        inputs[None] = pad(model)
    return Conditions(pictures, lengths, inputs, known, prompts)


def taken_over(
    prompts: dict[tuple[str, str], Guided], rows: Sequence[tuple[str, str]]
) -> dict[tuple[str, str], Guided]:
    """Of an earlier batch's prompts those that come again; it has none afterwards."""
    kept = {row: prompts[row] for row in rows if row in prompts}
    prompts.clear()
    return kept


def rows_of(pair: tuple[str, str], task: Task) -> tuple[str, ...]:
    """The rows that are denoised: without guidance the conditional one."""
    return pair if task.guidance > 1.0 else pair[:1]


def embedded(model: DeepGen, ids: Sequence[int], pictures: Sequence[Picture]) -> tuple[Tensor, Tensor]:
    """What the language model reads of a prompt (1, L, H), with the queries behind it, and at which positions."""
    row, queries = Row(ids, [x.features for x in pictures], [x.grid for x in pictures]), model.connector.queries
    (x,) = with_queries(model.embed, queries, [row], model.config.image_token)
    return x, positions(row, model.config.image_token, more=len(queries)).to(x.device)


def pad(model: DeepGen) -> tuple[Tensor, None]:
    """A pad (1, 1, H), which attends to nothing: all pads are alike, wherever they stand."""
    return model.embed(as_row([model.config.pad_token], model.embed)), None


def see(model: DeepGen, pixels: Tensor) -> Picture:
    """pixels (1, 3, H, W) in [-1, 1], sides multiples of 32."""
    x, rows, columns = patches(pixels)
    merge = model.config.vision.merge
    return Picture(model.vision(x, rows, columns), (rows // merge, columns // merge), model.vae_encoder(pixels))


def read(model: DeepGen, tokens: Tokens, task: Task, batch: Batch, seen: Conditions) -> Conditions:
    """Hidden states of what was embedded, all rows through a layer before the next.

    Those of an earlier batch are kept where any row of this one has them.
    """
    wanted = {None, *(text for pair in texts_of(task, batch.prompts) for text in pair)}
    states = {text: x for text, x in seen.states.items() if text in wanted}
    if seen.inputs:
        states |= zip(seen.inputs, states_of(model, seen.inputs.values()), strict=True)
    return replace(seen, inputs={}, states=states)


def states_of(model: DeepGen, inputs: Iterable[tuple[Tensor, Tensor | None]]) -> list[Tensor]:
    """Of rows (1, L, H) at their positions, or of a pad at none, what the connector reads: (1, L, C)."""
    rows, at = zip(*inputs, strict=True)
    return side_by_side(model.llm.outputs(rows, at), tapped(model.config.llm.layers, model.config.connector.taps))


def condition(model: DeepGen, tokens: Tokens, task: Task, batch: Batch, reuse: Conditions) -> Conditions:
    """What the transformer takes of each prompt. Its two rows, and only these, are padded to the same length.

    Pads count even without guidance: they stand in front of a prompt that is shorter than what is to be avoided.
    """
    rows, prompts = texts_of(task, batch.prompts), dict(reuse.prompts)
    timesteps = schedule(model.config, task, batch).timesteps
    for pair in dict.fromkeys(row for row in rows if row not in prompts):
        longest = max(reuse.lengths[text] for text in pair)
        states = [reuse.states[text] for text in rows_of(pair, task)]
        prompts[pair] = guided(model, padded(states, reuse.states[None], longest), timesteps)
    return replace(reuse, prompts=prompts, rows=tuple(rows))


def padded(states: Sequence[Tensor], pad: Tensor, longest: int) -> Tensor:
    """States (1, L, C) of rows, and of a pad (1, 1, C) as often as is missing in front: (K, longest, C)."""
    return torch.cat([torch.cat([pad.expand(1, longest - x.shape[1], -1), x], dim=1) for x in states])


def guided(model: DeepGen, states: Tensor, timesteps: Tensor) -> Guided:
    """States (K, T, C) of a prompt's rows through the connector, and the modulation of all steps (S)."""
    text, pooled = model.connector(states)
    return Guided(text, model.modulation(timesteps.to(states.device), pooled))


def schedule(config: Config, task: Task, batch: Batch) -> Levels:
    return Levels.of(task.steps, config.shift)


def latents(config: Config, images: int, rows: int, columns: int) -> tuple[int, ...]:
    """The shape of what `sample` yields."""
    patch = config.dit.patch
    return images, config.dit.channels, rows * patch, columns * patch


def sample(model: DeepGen, conditions: Conditions, task: Task, batch: Batch, schedule: Levels) -> Iterator[Tensor]:
    """Yield the clean latents (B, channels, h, w) that each step predicts."""
    prompts = [conditions.prompts[row] for row in conditions.rows]
    like, shape = prompts[0].text, latents(model.config, 1, task.rows, task.columns)[1:]
    how, pictures = (batch.noises, task.posterior == "mean"), enumerate(conditions.pictures)
    references = [posterior(model.config, picture, index, *how) for index, picture in pictures]
    how = {"interval": task.cfg_interval, "block_cache": task.block_cache}
    sampler = Sampler(model, prompts, references, task.guidance, apart=batch.apart, **how)
    x = torch.stack([noise.flow_start(shape, like.device) for noise in batch.noises]).to(like.dtype)
    for step in range(len(schedule)):
        x, clean = sampler.step(x, schedule, step)
        yield clean


def posterior(config: Config, picture: Picture, index: int, noises: Sequence[Noise], likeliest: bool = False) -> Tensor:
    """Latents (B, channels, h, w) of source `index`, drawn anew for every image of a batch from its own noise.

    `likeliest`: the mean instead.
    """
    mean, log_variance = picture.moments.float().chunk(2, dim=1)
    drawn = mean.expand(len(noises), -1, -1, -1)
    if not likeliest:
        eps = torch.stack([noise.posterior(index, mean.shape[1:], mean.device) for noise in noises])
        drawn = mean + (0.5 * log_variance.clamp(-30, 20)).exp() * eps
    return ((drawn - config.vae_shift) * config.vae_scale).to(picture.moments.dtype)


def decode(model: DeepGen, latents: Tensor, rows: int, columns: int, bands: bool = False) -> Tensor:
    """Latents (B, channels, h, w) to pixels (B, H, W, 3), about [-1, 1], one image at a time."""
    maps = latents / model.config.vae_scale + model.config.vae_shift
    whole = partial(decode_in_bands, model.vae_decoder) if bands else model.vae_decoder
    pixels = torch.cat([whole(image) for image in maps.split(1)])
    return pixels.permute(0, 2, 3, 1)


def look_to_answer(model: DeepGen, pixels: Tensor) -> tuple[Tensor, Grid]:
    """LLM inputs (tokens, H) of a picture (1, 3, H, W), sides multiples of 28, and its grid of them."""
    x, rows, columns = as_patches(pixels)
    merge = model.config.vision.merge
    return model.vision(x, rows, columns), (rows // merge, columns // merge)


def read_image(model: DeepGen, tokens: Tokens, seen: tuple[Tensor, Grid], spare: int = 0) -> PictureCache:
    """The cache of a picture that was looked at, with room for `spare` positions behind it."""
    c, (features, grid) = model.config, seen
    before = SYSTEM + TURN.partition("{}")[0] + PICTURE
    row = Row(as_ids(tokens, before, c.image_token, [grid]), [features], [grid])
    cache = cache_to_answer(model, PictureCache, len(row.ids) + spare, features)
    conditioner.prefill(model.llm, model.embed, row, c.image_token, cache)
    return cache


def question_ids(tokens: Tokens, question: str) -> list[int]:
    """What follows the picture in the prompt of a question."""
    return tokens.encode(turn("ask", question, 1).partition(PICTURE)[2])
