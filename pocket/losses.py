"""What the joint phase makes small: noise left in the tokens, words not foreseen; and the forward pass to it.

The same arithmetic as inference, on the engine's own modules, but a prompt and its image block are one causal
sequence, since gradients do not pass through a cache. Letters as in the model: B rows, n tokens, V visible tokens,
N predicted ones, S the longest prompt.
"""

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..engine.models.unipic.mar import all_visible, buffers_first, buffers_last
from ..engine.models.unipic.model import UniPic
from ..engine.models.unipic.prompts import IMAGE, turn
from ..engine.tokens import Tokens
from ..kernels.mar_tokens import select_tokens
from .batches import Answers, Pictures, Seen, Words
from .data import looks
from .head_losses import head_losses, weighted_mean
from .scenes import BACKGROUNDS, COLOURS, SHAPES, SIZES
from .sitting import Losses

VARIANCE_WEIGHT = 1.0  # of one timestep's term, a thousandth of the whole bound
PREDICTED = 32  # tokens a picture at most
GOLDEN = 0.6180339887  # fractional parts of its multiples are spread evenly
SLIPS = 0.3  # deviations of noise on visible tokens, at most: those of a request were drawn by the model


class Named(nn.Module):
    """Whether a cell shows an object, its shape, colour and size, and the background, each read linearly from features.

    One by one: a class for every combination would learn that those held out do not exist.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        options = {"object": 2, "ground": len(BACKGROUNDS)}
        options |= {"shape": len(SHAPES), "colour": len(COLOURS), "size": len(SIZES)}
        self.read = nn.ModuleDict({name: nn.Linear(width, count) for name, count in options.items()})

    def forward(self, features: Tensor, labels: Tensor, at: Tensor) -> Tensor:
        """Cross-entropy of features (B, N, D) of the cells `at` (B, N), looks of objects alone; labels (B, n + 1).

        All cells given count the same: what is learned is to tell them apart, not how many there are.
        """
        kinds = labels[:, :-1].gather(1, at)
        shows = kinds > 0
        asked = {"object": shows.long(), "ground": labels[:, -1:].expand_as(at)}
        asked |= dict(zip(("shape", "colour", "size"), looks(kinds.clamp(min=1)), strict=True))
        missed = {
            name: F.cross_entropy(self.read[name](features).transpose(1, 2), asked[name], reduction="none")
            for name in asked
        }
        of_looks = sum(weighted_mean(missed[name], shows.float()) for name in ("shape", "colour", "size"))
        return missed["object"].mean() + missed["ground"].mean() + of_looks


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


def chosen(masked: Tensor, shows: Tensor, object_weight: float) -> tuple[Tensor, Tensor]:
    """Which PREDICTED of the masked cells (B, M), in random order, are learned from: (B, N), ascending, with weights.

    Cells that show an object come first, up to half of the room, so that pictures are not mostly learned from plain
    ground; the weights (B, N) are how many cells of its sort, object or ground, one stands for, times `object_weight`
    for an object. shows (B, n). Where a picture is all but full of objects no ground may be left to stand for ground;
    none of ours is.
    """
    of = shows.gather(1, masked)
    room = min(masked.shape[1], PREDICTED)
    early = of & (of.cumsum(1) <= room // 2)
    first = (~early).long().argsort(dim=1, stable=True)[:, :room]
    predicted = masked.gather(1, first).sort(dim=1).values
    taken = shows.gather(1, predicted)

    def share(sort: Tensor, all_of: Tensor) -> Tensor:
        return all_of.sum(1, keepdim=True) / sort.sum(1, keepdim=True).clamp(min=1)

    return predicted, torch.where(taken, object_weight * share(taken, of), share(~taken, ~of))


def picture_losses(
    model: UniPic,
    hints: Hints,
    tokens: Tokens,
    batch: Pictures,
    share: float,
    noise: torch.Generator,
    object_weight: float,
) -> Losses:
    """Losses of a generation or an edit with about `share` of the tokens masked."""
    latents, labels = batch.made.latents, batch.made.labels
    rows, n = latents.shape[:2]
    masked = max(1, math.ceil(share * n))
    order = torch.rand(rows, n, generator=noise).argsort(dim=1).to(latents.device)
    visible = order[:, masked:].sort(dim=1).values
    predicted, weights = chosen(order[:, :masked], labels[:, :-1] > 0, object_weight)
    sources = batch.source and batch.source.latents
    slips = SLIPS * torch.rand(rows, 1, 1, generator=noise) * torch.randn(latents.shape, generator=noise)
    known = latents + slips.to(latents.device)
    z, x_con = conditions(model, tokens, batch.words, sources, known, visible, predicted)
    made = select_tokens(latents, predicted)
    losses = head_losses(model.head, z.flatten(0, 1), made.flatten(0, 1), weights.flatten(), noise)
    losses["hint"] = hints.foreseen(z, labels, predicted)
    if batch.source is not None:
        losses |= hints.of_picture(x_con, batch.source)
        losses["copy"] = losses["copy"] + weighted_mean((hints.made(z) - made).square().mean(-1), weights)
    return losses


def answer_losses(model: UniPic, hints: Hints, tokens: Tokens, batch: Answers) -> Losses:
    """Cross-entropy of the answers' words and their end.

    The questions about one picture stand behind it in one sequence: each sees the picture and itself, as if alone.
    """
    x_con, image = looked_at(model, tokens, batch.seen.latents)
    pictures, seen, _ = image.shape
    ids, answers, number, place = packed(batch.words, pictures)
    before = torch.arange(seen, device=image.device).expand(pictures, -1)
    positions = torch.cat([before, seen + place], dim=1)
    number = torch.cat([torch.full_like(before, -1), number], dim=1)  # the picture's is below zero
    own = (number[:, None] < 0) | (number[:, :, None] == number[:, None])
    mask = own & (positions[:, :, None] >= positions[:, None])
    hidden = read(model, torch.cat([image, model.embed(ids)], dim=1), positions, mask[:, None])[:, seen:]
    logits = F.linear(hidden[:, :-1][answers[:, 1:]], model.embed.weight)  # a row begins with a question, not an answer
    return {"answer": F.cross_entropy(logits, ids[answers]), **hints.of_picture(x_con, batch.seen)}


def packed(words: Words, pictures: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(ids, whether one is an answer's, number of its question, place in it) of each picture's questions without pads.

    All (B, T) for B pictures; shorter rows end in pads, which come behind the words of their question.
    """
    length = words.ids.shape[1]
    real = torch.arange(length, device=words.ids.device) < words.lengths[:, None]
    real = real.view(pictures, -1)
    kept = (~real).long().argsort(dim=1, stable=True)[:, : int(real.sum(1).max())]
    ids, answers = (x.view(pictures, -1).gather(1, kept) for x in (words.ids, words.answers))
    return ids, answers, kept.div(length, rounding_mode="floor"), kept % length


def masked_share(step: int, words_first: int) -> float:
    """Share of masked tokens: often everything, which words alone foretell, then 0.7 or more as MAR trains, then less.

    In the first `words_first` steps everything: once it looks at its neighbours, a model is slow to learn to read.

    Steps of the golden ratio: evenly spread over any stretch of training.
    """
    u = (step * GOLDEN) % 1.0
    if step < words_first or u < 0.35:
        return 1.0
    if u < 0.75:
        return 1.0 - 0.3 * (u - 0.35) / 0.4
    return 0.7 - 0.65 * (u - 0.75) / 0.25
