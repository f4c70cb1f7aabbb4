"""What the joint phase makes small: noise left in the tokens, words not foreseen; and the forward pass to it.

The same arithmetic as inference, on the engine's own modules, but a prompt and its image block are one causal
sequence, since gradients do not pass through a cache. Letters as in the model: B rows, n tokens, V visible tokens,
N predicted ones, S the longest prompt.
"""

import math
from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..engine.layers.timesteps import timestep_features
from ..engine.models.unipic.head import DiffusionHead
from ..engine.models.unipic.mar import all_visible, buffers_first, buffers_last
from ..engine.models.unipic.model import UniPic
from ..engine.models.unipic.prompts import IMAGE, turn
from ..engine.schedules import cosine_betas
from ..engine.tokens import Tokens
from ..kernels.mar_tokens import select_tokens
from .batches import Answers, Pictures, Seen, Words
from .data import LABELS
from .scenes import BACKGROUNDS
from .sitting import Losses

VARIANCE_WEIGHT = 1.0  # of one timestep's term, a thousandth of the whole bound
DRAWS = 4  # noise levels per token
LEVELS = 64  # timesteps a step; each is embedded once
PREDICTED = 32  # tokens a picture at most


class Named(nn.Module):
    """Which object a cell shows, and the background, read linearly from features."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.objects, self.ground = nn.Linear(width, LABELS), nn.Linear(width, len(BACKGROUNDS))

    def forward(self, features: Tensor, labels: Tensor, at: Tensor) -> Tensor:
        """Cross-entropy of features (B, N, D) of the cells `at` (B, N); labels (B, n + 1)."""
        objects = labels[:, :-1].gather(1, at)
        ground = labels[:, -1:].expand_as(at)
        return F.cross_entropy(self.objects(features).flatten(0, 1), objects.flatten()) + F.cross_entropy(
            self.ground(features).flatten(0, 1), ground.flatten()
        )


class Hints(nn.Module):
    """What is read from the features on the way, by teachers that are not in the model.

    From z what the cells to predict will show, from x_con of a whole picture what its cells show. From an edit's z its
    tokens, and from x_con the picture's: left alone, the encoder keeps little of what it sees, and edits copy badly.
    """

    def __init__(self, width: int, channels: int) -> None:
        super().__init__()
        self.foreseen, self.shown = Named(width), Named(width)
        self.seen, self.made = nn.Linear(width, channels), nn.Linear(width, channels)

    def of_picture(self, x_con: Tensor, seen: Seen) -> Losses:
        """Squared error of the tokens, and cross-entropy of what they show, read from x_con (B, buffer + n, D)."""
        features = x_con[:, -seen.latents.shape[1] :]
        return {
            "copy": F.mse_loss(self.seen(features), seen.latents),
            "shown": self.shown(features, seen.labels, all_visible(seen.latents)),
        }


def read(model: UniPic, x: Tensor, positions: Tensor, mask: Tensor | None) -> Tensor:
    """The LLM over whole sequences x (B, L, H); mask (B, 1, L, L) of what is seen, None for causal."""
    llm = model.llm
    cos, sin = llm.rotary(positions, x.dtype)
    for layer in llm.layers:
        x = layer(x, cos, sin, partial(_mix, mask))
    return llm.norm(x)


def _mix(mask: Tensor | None, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)


def read_behind(model: UniPic, prompt: Tensor, lengths: Tensor, block: Tensor) -> Tensor:
    """LLM output (B, L, H) for a block behind prompts (B, S, H) of different lengths (B), padded on the right.

    Every row goes on where its own prompt ends, and no pad is seen by what is not a pad.
    """
    padded, behind = prompt.shape[1], block.shape[1]
    at = torch.arange(padded + behind, device=prompt.device)
    positions = torch.where(at < padded, at, lengths[:, None] + at - padded)  # (B, S + L)
    is_pad = (at >= lengths[:, None]) & (at < padded)
    seen = (at[:, None] >= at) & ~is_pad[:, None]  # (B, S + L, S + L)
    return read(model, torch.cat([prompt, block], dim=1), positions, seen[:, None])[:, padded:]


def looked_at(model: UniPic, tokens: Tokens, latents: Tensor) -> tuple[Tensor, Tensor]:
    """x_con (B, buffer + n, D) of whole images, and the prompt up to and with each of them, (B, ., H)."""
    side = math.isqrt(latents.shape[1])
    x_con = model.mar_encoder(latents, all_visible(latents), model.mar_encoder.positions(side, side))
    start = torch.tensor(tokens.encode(turn("edit", "").partition(IMAGE)[0]), device=latents.device)
    features = buffers_last(model.proj_in(x_con), model.config.mar.buffer)
    return x_con, torch.cat([model.embed(start).expand(len(latents), -1, -1), features], dim=1)


def conditions(
    model: UniPic,
    tokens: Tokens,
    words: Words,
    sources: Tensor | None,
    known: Tensor,
    visible: Tensor,
    predicted: Tensor,
) -> tuple[Tensor, Tensor | None]:
    """z (B, N, D) of the tokens to predict, as `Sampler.understand` computes it; x_con of an edit's source.

    sources and known (B, n, 16).
    """
    side = math.isqrt(known.shape[1])
    prompt, lengths, x_con = model.embed(words.ids), words.lengths, None
    if sources is not None:
        x_con, image = looked_at(model, tokens, sources)
        prompt, lengths = torch.cat([image, prompt], dim=1), lengths + image.shape[1]
    x = model.mar_encoder(known, visible, model.mar_encoder.positions(side, side))
    block = buffers_last(model.proj_in(x), model.config.mar.buffer)
    block = read_behind(model, prompt, lengths, block)
    x = x + model.proj_out(buffers_first(block, model.config.mar.buffer))
    base = model.mar_decoder.base(x_con)
    return model.mar_decoder(x, visible, predicted, base, *model.mar_decoder.positions(side, side)), x_con


def picture_losses(
    model: UniPic, hints: Hints, tokens: Tokens, batch: Pictures, share: float, noise: torch.Generator
) -> Losses:
    """Losses of a generation or an edit with about `share` of the tokens masked."""
    latents, labels = batch.made.latents, batch.made.labels
    rows, n = latents.shape[:2]
    masked = max(1, math.ceil(share * n))
    order = torch.rand(rows, n, generator=noise).argsort(dim=1).to(latents.device)
    visible = order[:, masked:].sort(dim=1).values
    predicted = order[:, : min(masked, PREDICTED)].sort(dim=1).values
    sources = batch.source and batch.source.latents
    z, x_con = conditions(model, tokens, batch.words, sources, latents, visible, predicted)
    made = select_tokens(latents, predicted)
    losses = head_losses(model.head, z.flatten(0, 1), made.flatten(0, 1), noise)
    losses["hint"] = hints.foreseen(z, labels, predicted)
    if batch.source is not None:
        losses |= hints.of_picture(x_con, batch.source)
        losses["copy"] = losses["copy"] + F.mse_loss(hints.made(z), made)
    return losses


def head_losses(head: DiffusionHead, z: Tensor, x: Tensor, noise: torch.Generator) -> Losses:
    """Error of the predicted noise, and the bound's term for its variance; z (N, D), x (N, C).

    As in Improved DDPM (arXiv 2102.09672) the variance does not move the mean. Random numbers are the CPU's, so that
    they are the same on every device.
    """
    config, device = head.config, x.device
    process = process_of(config.train_steps, config.max_beta, device)
    levels = stratified(LEVELS, config.train_steps, noise).to(device)  # (T)
    embedded = head.time_embed(timestep_features(levels, config.frequencies))
    which = torch.randint(LEVELS, (DRAWS * len(x),), generator=noise).to(device)
    t = levels[which]
    clean = x.repeat(DRAWS, 1)
    true = torch.randn(clean.shape, generator=noise).to(device)
    noisy = process.signal[t] * clean + process.noise[t] * true
    eps, v = head(noisy, embedded[which], head.cond_embed(z).repeat(DRAWS, 1)).chunk(2, dim=-1)
    return {"noise": F.mse_loss(eps, true), "variance": process.bound(clean, noisy, eps.detach(), v, t)}


def stratified(count: int, steps: int, noise: torch.Generator) -> Tensor:
    """`count` timesteps, one from each equal part of the schedule."""
    spread = (torch.arange(count) + torch.rand(count, generator=noise)) * steps / count
    return spread.long().clamp(max=steps - 1)


class Process:
    """The full noising process; tensors (steps, 1) float32."""

    def __init__(self, steps: int, max_beta: float, device: torch.device) -> None:
        betas = cosine_betas(steps, max_beta)
        kept = torch.cumprod(1 - betas, 0)
        before = torch.cat([torch.ones(1, dtype=torch.float64), kept[:-1]])
        variance = betas * (1 - before) / (1 - kept)
        variance[0] = variance[1]  # as the sampler does

        def column(values: Tensor) -> Tensor:
            return values.float()[:, None].to(device)

        self.signal, self.noise = column(kept.sqrt()), column((1 - kept).sqrt())
        self.least, self.most = column(variance.log()), column(betas.log())
        self.c1 = column(betas * before.sqrt() / (1 - kept))
        self.c2 = column((1 - before) * (1 - betas).sqrt() / (1 - kept))

    def bound(self, clean: Tensor, noisy: Tensor, eps: Tensor, v: Tensor, t: Tensor) -> Tensor:
        """Mean KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)) in bits."""
        guess = (noisy - self.noise[t] * eps) / self.signal[t]
        between = self.c1[t] * (clean - guess)  # of the two means
        f = (v + 1) / 2
        log_variance = f * self.most[t] + (1 - f) * self.least[t]
        kl = 0.5 * (log_variance - self.least[t] - 1 + (self.least[t] - log_variance).exp())
        return (kl + 0.5 * between.square() * (-log_variance).exp()).mean() / math.log(2)


@cache
def process_of(steps: int, max_beta: float, device: torch.device) -> Process:
    return Process(steps, max_beta, device)


def answer_losses(model: UniPic, hints: Hints, tokens: Tokens, batch: Answers) -> Losses:
    """Cross-entropy of the answers' words and their end.

    The questions about one picture stand behind it in one sequence: each sees the picture and itself, as if alone.
    """
    x_con, image = looked_at(model, tokens, batch.seen.latents)
    asked = model.embed(batch.words.ids)  # (B K, L, H)
    (pictures, seen, width), (questions, length) = image.shape, batch.words.ids.shape
    each = questions // pictures
    at = torch.arange(seen + each * length, device=image.device)
    number = (at - seen).div(length, rounding_mode="floor")  # of the question; below zero for the picture
    positions = torch.where(at < seen, at, seen + (at - seen) % length)
    mask = (positions[:, None] >= positions) & ((number < 0) | (number[:, None] == number))
    x = torch.cat([image, asked.view(pictures, -1, width)], dim=1)
    hidden = read(model, x, positions[None], mask[None, None])[:, seen:].reshape(asked.shape)
    answers = batch.words.answers
    before = hidden[:, :-1][answers[:, 1:]]  # what each answer word follows; a row begins with the question
    logits = F.linear(before, model.embed.weight)
    said = F.cross_entropy(logits, batch.words.ids[answers])
    return {"answer": said, **hints.of_picture(x_con, batch.seen)}


def masked_share(step: int, words_first: int) -> float:
    """Share of masked tokens: often everything, which words alone foretell, then 0.7 or more as MAR trains, then less.

    In the first `words_first` steps everything: once it looks at its neighbours, a model is slow to learn to read.

    Steps of the golden ratio: evenly spread over any stretch of training.
    """
    u = (step * 0.6180339887) % 1.0
    if step < words_first or u < 0.35:
        return 1.0
    if u < 0.75:
        return 1.0 - 0.3 * (u - 0.35) / 0.4
    return 0.7 - 0.65 * (u - 0.75) / 0.25
