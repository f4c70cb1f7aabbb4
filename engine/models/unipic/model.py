"""UniPic 1.0 (arXiv 2508.03320): a masked autoregressive image model around an LLM, as three verbs and one module.

`condition` turns prompts (and a source image) into LLM caches, `sample` reveals latent tokens round by round,
`decode` makes pixels. `needs` says which parts each of them touches.

Letters: B images, R guidance rows (B, or 2B with guidance: conditional rows first), n grid tokens, V visible tokens,
N tokens predicted in a round, D MAR width, H LLM width, S prompt length.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ....kernels._op import launches
from ....kernels.ddpm_step import GUIDANCE, Drawn, step_table
from ....kernels.mar_tokens import select_tokens
from ....kernels.philox import token_noise
from ...kv_cache import KVCache, Prompts
from ...layers.attention import Attention
from ...layers.linear import Linear, logits
from ...layers.qwen2 import Qwen2
from ...layers.vae import VAEDecoder, VAEEncoder
from ...noise import Noise, Stream
from ...schedules import Round, Rounds, ddpm_table, guidance_at
from ...task import Batch, Task
from ...tokens import Tokens
from .config import UniPicConfig as Config
from .head import DiffusionHead
from .limits import check_prompts, check_question, max_image_tokens  # noqa: F401 (the engine asks the family)
from .mar import MarDecoder, MarEncoder, all_visible, buffers_first, buffers_last
from .prompts import IMAGE, turn, unconditional_turn

needs = {
    "encode": ("vae_encoder", "mar_encoder", "proj_in"),
    "condition": ("embed", "llm"),
    "sample": ("mar_encoder", "proj_in", "llm", "proj_out", "mar_decoder", "head"),
    "decode": ("vae_decoder",),
    "answer": ("embed", "llm"),
}


# Costs the same for equal shapes, so a dry run looks once: attribute of the model, method.
repeated = ("head", "advance")


class UniPic(nn.Module):
    """The parts by name. Nothing here runs them; the verbs below do."""

    def __init__(self, config: Config, attend: Attention) -> None:
        super().__init__()
        self.config = config
        self.vae_encoder = VAEEncoder(config.vae)
        self.vae_decoder = VAEDecoder(config.vae)
        self.embed = nn.Embedding(config.llm.vocab, config.llm.width)  # tied with the logits
        self.llm = Qwen2(config.llm, attend, config.round_inv_freq)
        self.mar_encoder = MarEncoder(config.mar, attend)
        self.mar_decoder = MarDecoder(config.mar, attend)
        self.head = DiffusionHead(config.head)
        self.proj_in = projection(config.mar.width, config.llm.width, config.llm.width)
        self.proj_out = projection(config.llm.width, config.llm.width, config.mar.width)


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
    """Prompt caches of a batch. `prompts` maps each distinct text to its cache, `rows` lists them in row order."""

    prompts: dict[str, KVCache]
    rows: tuple[tuple[KVCache, int], ...]
    source: Source | None
    seen: KVCache | None  # the part all prompts of an edit share: the turn's start and the image


def encode(model: UniPic, pixels: Tensor, rows: int, columns: int) -> Source:
    """pixels (1, 3, 16 rows, 16 columns) in [-1, 1], through the VAE's mean and the MAR encoder with nothing masked."""
    latents = encode_latents(model, pixels)
    x_con = model.mar_encoder(latents, all_visible(latents), model.mar_encoder.positions(rows, columns))
    return Source(latents, x_con, buffers_last(model.proj_in(x_con), model.config.mar.buffer))


def encode_latents(model: UniPic, pixels: Tensor) -> Tensor:
    """pixels (B, 3, 16 rows, 16 columns) to scaled latent tokens (B, n, 16): the posterior's mean, never sampled."""
    mean = model.vae_encoder(pixels).chunk(2, dim=1)[0]
    return mean.flatten(2).transpose(1, 2) * model.config.vae_scale


def condition(model: UniPic, tokens: Tokens, task: Task, batch: Batch, reuse: Conditions | None = None) -> Conditions:
    """Prefill each distinct prompt once, without pads; prompts of `reuse` (an earlier batch of the task) are kept."""
    source, seen = (reuse.source, reuse.seen) if reuse else look(model, tokens, task)
    texts = [turn(task.kind, prompt) for prompt in batch.prompts]
    if task.guidance != 1.0:
        texts += [unconditional_turn(task.kind, task.negative)] * len(texts)
    known = reuse.prompts if reuse else {}
    prompts: dict[str, KVCache] = {}
    rows: list[tuple[KVCache, int]] = []
    for text in texts:
        if text not in prompts:
            prompts[text] = known.get(text) or prefill(model, tokens, text, seen)
        cache = prompts[text]
        if rows and rows[-1][0] is cache:
            rows[-1] = (cache, rows[-1][1] + 1)
        else:
            rows.append((cache, 1))
    return Conditions(prompts, tuple(rows), source, seen)


def look(model: UniPic, tokens: Tokens, task: Task) -> tuple[Source | None, KVCache | None]:
    """The source of an edit, and the LLM's cache of the prompt up to and with the image."""
    if task.kind == "inpaint":
        latents = encode_latents(model, task.pixels)
        return Source(latents), None
    if task.pixels is None:
        return None, None
    source = encode(model, task.pixels, task.rows, task.columns)
    return source, read_image(model, tokens, source.features)


def read_image(model: UniPic, tokens: Tokens, features: Tensor, spare: int = 0) -> KVCache:
    """Prefill a turn's start and the image (1, n + buffer, H), which every prompt about it shares.

    `spare` positions are left for what follows.
    """
    start = tokens.encode(turn("edit", "").partition(IMAGE)[0])
    x = torch.cat([model.embed(as_row(start, features)), features], dim=1)
    cache = new_cache(model, x.shape[1] + spare, features)
    model.llm.extend(x, cache)
    return cache


def prefill(model: UniPic, tokens: Tokens, text: str, seen: KVCache | None) -> KVCache:
    """The cache of one prompt; with `seen`, only what follows the image is computed."""
    weight = model.embed.weight
    ids = tokens.encode(text if seen is None else text.partition(IMAGE)[2])
    cache = new_cache(model, len(ids), weight, base=seen)
    model.llm.extend(model.embed(as_row(ids, weight)), cache)
    return cache


def as_row(ids: Sequence[int], like: Tensor) -> Tensor:
    return torch.tensor([ids], device=like.device)


def look_to_answer(model: UniPic, tokens: Tokens, pixels: Tensor, rows: int, columns: int, spare: int) -> KVCache:
    """The cache of an image about which questions follow, with room for `spare` positions."""
    return read_image(model, tokens, encode(model, pixels, rows, columns).features, spare)


def question_ids(tokens: Tokens, question: str) -> list[int]:
    """What follows the image in the prompt of a question."""
    return tokens.encode(turn("ask", question).partition(IMAGE)[2])


def next_logits(model: UniPic, cache: KVCache, ids: Sequence[int]) -> Tensor:
    """Append ids to the cached text; logits (vocab) float32 of the token after them."""
    hidden = model.llm.extend(model.embed(as_row(ids, model.embed.weight)), cache)
    return logits(hidden[0, -1], model.embed).float()


def new_cache(model: UniPic, capacity: int, like: Tensor, base: KVCache | None = None) -> KVCache:
    c = model.config.llm
    return KVCache(c.layers, c.kv_heads, capacity, c.head_dim, like.dtype, like.device, base)


class Sampler:
    """What stays the same over the rounds of one batch: position tables, embedded timesteps, the noise schedule.

    On a CPU the noise of all steps is made in one pass, which is faster there; recorded noise is in memory anyway.
    """

    def __init__(self, model: UniPic, conditions: Conditions, task: Task, noises: Sequence[Noise]) -> None:
        self.model, self.task, self.noises = model, task, noises
        self.prompts, head = Prompts.of(conditions.rows), model.config.head
        self.copies = len(self.prompts.prefix_of) // len(noises)  # 2 with guidance
        self.table = ddpm_table(head.train_steps, head.steps, head.max_beta)
        self.steps = model.head.embed_steps(self.table)
        self.keys: Tensor | None = None  # (B, 2) int64 of the images' seeds, where kernels draw the noise
        if launches(self.steps) and all(noise.key for noise in noises):
            device = self.steps.device
            self.keys = torch.tensor([noise.key for noise in noises], device=device)
            self.coefficients = step_table(self.table, task.guidance, task.temperature).to(device)
        self.encoder_positions = model.mar_encoder.positions(task.rows, task.columns)
        self.decoder_positions = model.mar_decoder.positions(task.rows, task.columns)
        edited = conditions.source if task.kind == "edit" else None
        self.base = model.mar_decoder.base(edited.x_con if edited else None)

    def reveal(self, tokens: Tensor, plan: Round) -> Tensor:
        """tokens (B, n, 16) with one more round's tokens filled in."""
        z = self.understand(tokens, plan)
        sampled = self.denoise(z, plan).to(tokens.dtype)
        return tokens.scatter(1, plan.predicted[..., None].expand_as(sampled), sampled)

    def understand(self, tokens: Tensor, plan: Round) -> Tensor:
        """Conditions z (R, N, D) of the tokens to predict: encoder, LLM, decoder.

        Encoder and proj_in run once: their input is the same in both guidance halves.
        """
        model, buffer = self.model, self.model.config.mar.buffer
        x = model.mar_encoder(tokens, plan.visible, self.encoder_positions)  # (B, buffer + V, D)
        read = buffers_last(model.proj_in(x), buffer).repeat(self.copies, 1, 1)  # (R, V + buffer, H)
        read = model.llm(read, self.prompts)
        x = x.repeat(self.copies, 1, 1) + model.proj_out(buffers_first(read, buffer))
        return model.mar_decoder(x, plan.visible, plan.predicted, self.base, *self.decoder_positions, plan.source)

    def denoise(self, z: Tensor, plan: Round) -> Tensor:
        """Latents (B, N, 16) float32 of the predicted tokens, from conditions z (R, N, D)."""
        guidance = guidance_at(self.task.cfg_schedule, self.task.guidance, plan.left)
        how = self.recorded if self.keys is None else self.drawn
        return how(z.flatten(0, 1), plan, guidance).view(*plan.predicted.shape, -1)

    def recorded(self, z: Tensor, plan: Round, guidance: float) -> Tensor:
        """With all noise in memory beforehand; z (R N, D), returns (B N, 16)."""
        channels, steps = self.model.config.head.channels, len(self.table)
        pairs = list(zip(self.noises, plan.predicted, strict=True))
        start = torch.cat([noise.head_start(plan.index, at, channels) for noise, at in pairs])
        noise = torch.cat([noise.head_steps(plan.index, at, channels, steps) for noise, at in pairs], dim=1)
        return self.model.head.sample(z, start, noise, self.table, self.steps, guidance, self.task.temperature)

    def drawn(self, z: Tensor, plan: Round, guidance: float) -> Tensor:
        """The same with noise that kernels draw where they use it."""
        key, position = self.keys.repeat_interleave(plan.predicted.shape[1], dim=0), plan.predicted.flatten()
        start = token_noise(key, position, Stream.HEAD_START, 1, self.model.config.head.channels)[0]
        self.coefficients[:, GUIDANCE].fill_(guidance)
        drawn = Drawn(key, position, Stream.HEAD_STEP)
        return self.model.head.sample_drawn(z, start, drawn, self.coefficients, self.steps)


def sample(model: UniPic, conditions: Conditions, task: Task, batch: Batch, rounds: Rounds) -> Iterator[Tensor]:
    """Yield the latent tokens (B, n, 16) after every round; tokens not revealed yet are zero."""
    sampler = Sampler(model, conditions, task, batch.noises)
    shape = (len(batch.noises), rounds.tokens, model.config.mar.channels)
    tokens = sampler.base.new_zeros(shape)
    if task.kind == "inpaint":
        known = rounds.rounds[0].visible
        index = known[..., None].expand(-1, -1, shape[2])
        latents = conditions.source.latents.expand(shape)
        tokens = tokens.scatter(1, index, select_tokens(latents, known))
    for plan in rounds.rounds:
        tokens = sampler.reveal(tokens, plan)
        yield tokens


def decode(model: UniPic, tokens: Tensor, rows: int, columns: int) -> Tensor:
    """Latent tokens (B, n, 16) to pixels (B, 16 rows, 16 columns, 3), about [-1, 1], one image at a time.

    The widest maps of the VAE take about 1 GiB an image at 1024x1024 in bfloat16: a batch must not multiply that.
    """
    latents = (tokens / model.config.vae_scale).transpose(1, 2).unflatten(2, (rows, columns))
    pixels = torch.cat([model.vae_decoder(image) for image in latents.split(1)])
    return pixels.permute(0, 2, 3, 1)
