"""UniPic 1.0 (arXiv 2508.03320): a masked autoregressive image model around an LLM, as verbs and one module.

`look` encodes a source image, `condition` turns it and the prompts into LLM caches, `sample` reveals latent tokens
round by round, `decode` makes pixels. `needs` says which parts each runs: who looks has left when the LLM reads.

Letters: B images, R guidance rows (B, or 2B with guidance: conditional rows first), n grid tokens, V visible tokens,
N tokens predicted in a round, D MAR width, H LLM width, S prompt length.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from ....kernels.mar_tokens import select_tokens
from ...checks import PATCH
from ...graphs import Graphs
from ...kv_cache import ROUNDED, KVCache, Prompts
from ...layers.attention import Attention
from ...layers.linear import Linear, as_row, logits, table
from ...layers.qwen2 import Qwen2
from ...layers.vae import VAEDecoder, VAEEncoder
from ...layers.vae_bands import decode_in_bands
from ...next_token import cache_to_answer, next_logits  # noqa: F401 (the engine asks the family)
from ...schedules import Rounds, gtr_counts, gtr_orders, reveal_rounds
from ...task import Batch, Task
from ...tokens import Tokens
from .config import UniPicConfig as Config
from .head import DiffusionHead
from .limits import (  # noqa: F401 (the engine asks the family)
    check_prompts,
    check_question,
    fitted_size,
    max_image_tokens,
    question_picture,
    question_size,
)
from .mar import MarDecoder, MarEncoder, all_visible, buffers_first, buffers_last
from .prompts import IMAGE, turn, unconditional_turn
from .sampler import Sampler
from .speeds import speeds  # noqa: F401 (the engine asks the family)

# Of what a stage needs: tables of which it only looks up rows, and stacks whose layers are gone through in order.
lookups = {"condition": ("embed",)}
stacks = ("llm", "mar_encoder", "mar_decoder")
kinds = ("generate", "edit", "inpaint", "ask")
fits = ("keep", "crop")
posteriors = ("mean",)
shortcuts = ("head_steps", "order", "cfg_interval", "solver", "cfg_cache")
most_sources = 1
parts_guidance = False
tuned = ()


def needs(kind: str) -> dict[str, tuple[str, ...]]:
    """Stage by stage, the parts that it runs."""
    encoders = ("vae_encoder",) if kind == "inpaint" else ("vae_encoder", "mar_encoder", "proj_in")
    before = ({} if kind == "generate" else {"look": encoders}) | {"condition": ("embed", "llm")}
    if kind == "ask":
        return before | {"answer": ("embed", "llm")}
    sample = ("mar_encoder", "proj_in", "llm", "proj_out", "mar_decoder", "head")
    return before | {"sample": sample, "decode": ("vae_decoder",)}


# Costs the same for equal shapes, so a dry run looks once: modules with * for a layer's number, method.
repeated = (
    ("head", "advance"),
    ("head.blocks.*", "forward"),
    ("llm.layers.*", "follow"),
    ("llm.layers.*", "follow_in_int8"),
    ("mar_encoder.blocks.*", "forward"),
    ("mar_decoder.blocks.*", "forward"),
)


class UniPic(nn.Module):
    """The parts by name, and what a round runs of them. `graphs` belong to these weights where they lie."""

    def __init__(self, config: Config, attend: Attention) -> None:
        super().__init__()
        self.config, self.graphs = config, Graphs()
        self.vae_encoder = VAEEncoder(config.vae)
        self.vae_decoder = VAEDecoder(config.vae)
        self.embed = table(config.llm.vocab, config.llm.width)  # tied with the logits
        self.llm = Qwen2(config.llm, attend, config.round_inv_freq)
        self.mar_encoder = MarEncoder(config.mar, attend)
        self.mar_decoder = MarDecoder(config.mar, attend)
        self.head = DiffusionHead(config.head)
        self.proj_in = projection(config.mar.width, config.llm.width, config.llm.width)
        self.proj_out = projection(config.llm.width, config.llm.width, config.mar.width)

    def understand(
        self,
        tokens: Tensor,
        visible: Tensor,
        predicted: Tensor,
        source: Tensor,
        encoder_position: Tensor,
        base: Tensor,
        decoder_position: Tensor,
        diffusion_position: Tensor,
        prompts: Prompts,
    ) -> Tensor:
        """Conditions z (R, N, D) of the tokens to predict in a round: encoder, LLM, decoder.

        tokens (B, n, 16), index plans of `Round`, positions and base as in mar.py. Encoder and proj_in run once: their
        input is the same in both guidance halves.
        """
        buffer, copies = self.config.mar.buffer, len(prompts.prefix_of) // len(tokens)
        x = self.mar_encoder(tokens, visible, encoder_position)  # (B, buffer + V, D)
        read = buffers_last(self.proj_in(x), buffer).repeat(copies, 1, 1)  # (R, V + buffer, H)
        read = self.llm(read, prompts)
        x = x.repeat(copies, 1, 1) + self.proj_out(buffers_first(read, buffer))
        return self.mar_decoder(x, visible, predicted, base, decoder_position, diffusion_position, source)

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores (..., vocab) of the words after final hidden states (..., H)."""
        return logits(hidden, self.embed)

    def understand_tensors(self, *given: Tensor) -> Tensor:
        """`understand` of tensors alone, for a graph that serves any prompts; the last four make `Prompts`."""
        return self.understand(*given[:-4], Prompts(*given[-4:], runs=()))


def build(config: Config, attend: Attention | None = None) -> UniPic:
    """Uninitialised parts; call under `torch.device("meta")` and let `engine/weights.py` fill them."""
    return UniPic(config, attend or Attention())


def attention_backend(model: UniPic) -> str:
    return model.llm.attend.backend


def projection(width_in: int, inner: int, width: int) -> nn.Sequential:
    return nn.Sequential(Linear(width_in, inner), nn.SiLU(), Linear(inner, width))


@dataclass(frozen=True)
class Source:
    """An image the model has looked at."""

    latents: Tensor  # (1, n, 16), scaled
    x_con: Tensor | None = None  # (1, buffer + n, D) MAR features, buffers first; None where only latents are wanted
    features: Tensor | None = None  # (1, n + buffer, H) LLM inputs, buffers last


@dataclass(frozen=True)
class Conditions:
    """What is known of a task. `prompts` maps each distinct text to its cache, `rows` lists a batch's in row order."""

    source: Source | None = None
    seen: KVCache | None = None  # the part all prompts of an edit share: the turn's start and the image
    prompts: dict[str, KVCache] = field(default_factory=dict)
    rows: tuple[tuple[KVCache, int], ...] = ()


def encode(model: UniPic, pixels: Tensor) -> Source:
    """pixels (1, 3, H, W) in [-1, 1], through the VAE's mean and the MAR encoder with nothing masked."""
    latents, (rows, columns) = encode_latents(model, pixels), (side // PATCH for side in pixels.shape[2:])
    x_con = model.mar_encoder(latents, all_visible(latents), model.mar_encoder.positions(rows, columns))
    return Source(latents, x_con, buffers_last(model.proj_in(x_con), model.config.mar.buffer))


def encode_latents(model: UniPic, pixels: Tensor) -> Tensor:
    """pixels (B, 3, 16 rows, 16 columns) to scaled latent tokens (B, n, 16): the posterior's mean, never sampled."""
    mean = model.vae_encoder(pixels).chunk(2, dim=1)[0]
    return mean.flatten(2).transpose(1, 2) * model.config.vae_scale


def look(model: UniPic, tokens: Tokens, task: Task, batch: Batch, reuse: Conditions | None = None) -> Conditions:
    """Encode the source of an edit; an earlier batch of the task has done that."""
    if reuse:
        return reuse
    (pixels,) = task.sources
    return Conditions(Source(encode_latents(model, pixels)) if task.kind == "inpaint" else encode(model, pixels))


def condition(model: UniPic, tokens: Tokens, task: Task, batch: Batch, reuse: Conditions | None = None) -> Conditions:
    """Prefill the image once, and each distinct prompt once, without pads; what `reuse` has of them is kept."""
    reuse = reuse or Conditions()
    source, seen = reuse.source, reuse.seen
    if task.kind == "edit" and seen is None:
        x = with_image(model, tokens, source.features)
        seen = filled(model, x, new_cache(model, x.shape[1], x))
    texts = [turn(task.kind, prompt) for prompt in batch.prompts]
    if task.guidance != 1.0:
        texts += [unconditional_turn(task.kind, task.negative)] * len(texts)
    prompts: dict[str, KVCache] = {}
    rows: list[tuple[KVCache, int]] = []
    for text in texts:
        if text not in prompts:
            prompts[text] = reuse.prompts.get(text) or prefill(model, tokens, text, seen)
        cache = prompts[text]
        if rows and rows[-1][0] is cache:
            rows[-1] = (cache, rows[-1][1] + 1)
        else:
            rows.append((cache, 1))
    return Conditions(source, seen, prompts, tuple(rows))


def read_image(model: UniPic, tokens: Tokens, seen: Tensor, spare: int = 0) -> KVCache:
    """The cache of an image (1, n + buffer, H), which all questions about it share, with room for `spare` positions."""
    x = with_image(model, tokens, seen)
    return filled(model, x, cache_to_answer(model, KVCache, x.shape[1] + spare, x))


def with_image(model: UniPic, tokens: Tokens, seen: Tensor) -> Tensor:
    """LLM inputs (1, S, H) that all prompts and questions about an image begin with."""
    start = tokens.encode(turn("edit", "").partition(IMAGE)[0])
    return torch.cat([model.embed(as_row(start, model.embed)), seen], dim=1)


def prefill(model: UniPic, tokens: Tokens, text: str, seen: KVCache | None) -> KVCache:
    """The cache of one prompt; with `seen`, only what follows the image is computed."""
    ids = tokens.encode(text if seen is None else text.partition(IMAGE)[2])
    x = model.embed(as_row(ids, model.embed))
    return filled(model, x, new_cache(model, -(-len(ids) // ROUNDED) * ROUNDED, x, base=seen))


def filled(model: UniPic, x: Tensor, cache: KVCache) -> KVCache:
    """With the keys and values of x (1, S, H) behind what it holds."""
    model.llm.extend(x, cache)
    return cache


def look_to_answer(model: UniPic, pixels: Tensor) -> Tensor:
    """LLM inputs (1, n + buffer, H) of an image about which questions follow."""
    return encode(model, pixels).features


def question_ids(tokens: Tokens, question: str) -> list[int]:
    """What follows the image in the prompt of a question."""
    return tokens.encode(turn("ask", question).partition(IMAGE)[2])


def new_cache(model: UniPic, capacity: int, like: Tensor, base: KVCache | None = None) -> KVCache:
    c = model.config.llm
    return KVCache.empty(c.layers, c.kv_heads, capacity, c.head_dim, like.dtype, like.device, base)


def schedule(config: Config, task: Task, batch: Batch) -> Rounds:
    """Every image's reveal order, drawn before the loop. `task.cells` restricts it to part of the grid."""
    if task.cells is None:
        orders = torch.stack([noise.order(task.rows * task.columns) for noise in batch.noises])
    else:
        places = task.cells.flatten().nonzero()[:, 0]
        orders = torch.stack([places[noise.order(len(places))] for noise in batch.noises])
    if task.order == "random":
        return reveal_rounds(orders, task.rows, task.columns, task.steps)
    orders = gtr_orders(orders, task.columns)
    return reveal_rounds(orders, task.rows, task.columns, task.steps, gtr_counts(orders[0], task.columns, task.steps))


def latents(config: Config, images: int, rows: int, columns: int) -> tuple[int, ...]:
    """The shape of what `sample` yields."""
    return images, rows * columns, config.mar.channels


def sample(model: UniPic, conditions: Conditions, task: Task, batch: Batch, schedule: Rounds) -> Iterator[Tensor]:
    """Yield the latent tokens (B, n, 16) after every round; tokens not revealed yet are zero."""
    edited = conditions.source.x_con if task.kind == "edit" else None
    sampler = Sampler(model, conditions.rows, edited, task, batch.noises)
    shape = latents(model.config, len(batch.noises), task.rows, task.columns)
    tokens = sampler.base.new_zeros(shape)
    if task.kind == "inpaint":
        known = schedule.rounds[0].visible
        index = known[..., None].expand(-1, -1, shape[2])
        tokens = tokens.scatter(1, index, select_tokens(conditions.source.latents.expand(shape), known))
    for plan in schedule.rounds:  # before the loop, which is never to wait for the device
        sampler.table(plan)
    for plan in schedule.rounds:
        tokens = sampler.reveal(tokens, plan)
        yield tokens


def decode(model: UniPic, latents: Tensor, rows: int, columns: int, bands: bool = False) -> Tensor:
    """Latent tokens (B, n, 16) to pixels (B, 16 rows, 16 columns, 3), about [-1, 1], one image at a time.

    The widest maps of the VAE take 1.25 GiB an image at 1024x1024 in bfloat16, and a batch must not multiply that;
    in `bands` of rows a third of it, for a quarter more work.
    """
    maps = (latents / model.config.vae_scale).transpose(1, 2).unflatten(2, (rows, columns))
    whole = partial(decode_in_bands, model.vae_decoder) if bands else model.vae_decoder
    pixels = torch.cat([whole(image) for image in maps.split(1)])
    return pixels.permute(0, 2, 3, 1)
