"""UniPic2-SD3.5M-Kontext: CLIP and T5 condition DeepGen's diffusion transformer, as verbs and one module.

`look` runs both CLIPs and encodes the source, `read` runs T5, `condition` makes the modulations; each leaves when it is
done. What follows the conditions is DeepGen's.

Letters: B pictures, K guidance rows of a picture (1 or 2), M text tokens (77 + 256), D their width.
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from ....errors import UnipicWarning
from ....graphs import Graphs
from ....layers.attention import Attention
from ....layers.vae import VAEDecoder, VAEEncoder
from ....task import Batch, Task
from ....tokens import Tokens
from ...deepgen.limits import check_task, max_image_tokens  # noqa: F401 (the engine asks the family)
from ...deepgen.mmdit import MMDiT
from ...deepgen.model import decode, latents, rows_of, sample, schedule, taken_over  # noqa: F401
from ...deepgen.modulation import Modulation
from ...deepgen.sampler import Guided
from ...deepgen.speeds import speeds  # noqa: F401 (the engine asks the family)
from ..limits import fitted_size  # noqa: F401
from . import text_encoders
from .config import CLIPS
from .config import KontextConfig as Config
from .prompts import IMAGE, TOKENIZERS, ids_of, texts_of  # noqa: F401 (IMAGE: as above)

kinds = ("generate", "edit")
fits = ("longest", "crop")
posteriors = ("sample", "mean")
shortcuts = ("cfg_interval", "block_cache")
most_sources = 1  # which the result has the size of
parts_guidance = True
tuned = ()
lookups: Mapping[str, Sequence[str]] = {}
stacks = ("t5", "modulation", "dit")
# Costs the same for equal shapes, so a dry run looks once.
repeated = (("dit", "forward"), ("dit", "first"), ("dit", "rest"), ("dit.blocks.*", "forward"))


def needs(kind: str) -> dict[str, tuple[str, ...]]:
    """Stage by stage, the parts that it runs."""
    return {
        "look": ("clip_l", "clip_g", *(("vae_encoder",) if kind == "edit" else ())),
        "read": ("t5",),
        "condition": ("modulation",),
        "sample": ("dit",),
        "decode": ("vae_decoder",),
    }


class Kontext(nn.Module):
    """The parts by name. `graphs` belong to these weights where they lie."""

    def __init__(self, config: Config, attend: Attention) -> None:
        super().__init__()
        self.config, self.attend, self.graphs = config, attend, Graphs()
        self.clip_l = text_encoders.clip(config.clip_l)
        self.clip_g = text_encoders.clip(config.clip_g)
        self.t5 = text_encoders.t5(config.t5)
        self.modulation = Modulation(config.dit)
        self.dit = MMDiT(config.dit, attend)
        self.vae_encoder = VAEEncoder(config.vae)
        self.vae_decoder = VAEDecoder(config.vae)


def build(config: Config, attend: Attention | None = None) -> Kontext:
    """Uninitialised parts; call under `torch.device("meta")` and let `engine/weights.py` fill them.

    Raises UnsupportedDeviceError without the package transformers.
    """
    return Kontext(config, attend or Attention())


def attention_backend(model: Kontext) -> str:
    return model.attend.backend


@dataclass(frozen=True)
class Picture:
    moments: Tensor  # (1, 2 channels, h, w) mean and log variance of its latents


@dataclass(frozen=True)
class Conditions:
    """What is known of a task. `clip`, `pooled` and then `text` are of the prompts that were read, `prompts` maps
    (prompt, negative) to what the transformer takes.
    """

    pictures: tuple[Picture, ...]
    clip: Mapping[str, Tensor] = field(default_factory=dict)  # (1, 77, D)
    pooled: Mapping[str, Tensor] = field(default_factory=dict)  # (1, pooled)
    text: Mapping[str, Tensor] = field(default_factory=dict)  # (1, M, D)
    prompts: dict[tuple[str, str], Guided] = field(default_factory=dict)
    rows: tuple[tuple[str, str], ...] = ()  # of each picture of the batch, its entry of `prompts`


def look(model: Kontext, tokens: Tokens, task: Task, batch: Batch, reuse: Conditions | None = None) -> Conditions:
    """Both CLIPs' view of the prompts; the source, and prompts that are there already, are kept from `reuse`."""
    rows = texts_of(task, batch.prompts)
    wanted = {text for pair in rows for text in rows_of(pair, task)}
    if reuse is None:
        found = Conditions(tuple(Picture(model.vae_encoder(pixels)) for pixels in task.sources))
    else:
        pooled, text = ({name: x for name, x in each.items() if name in wanted} for each in (reuse.pooled, reuse.text))
        found = Conditions(reuse.pictures, {}, pooled, text, taken_over(reuse.prompts, rows))
    new = sorted(wanted - {*found.text})
    if not new:
        return found
    read = [text_encoders.read_clip(getattr(model, name), ids(model, tokens, name, new)) for name in CLIPS]
    states, pooled = zip(*read, strict=True)
    clip = text_encoders.side_by_side([*states], model.config.t5.width)
    pooled = dict(zip(new, torch.cat(pooled, dim=-1).split(1), strict=True))
    return replace(found, clip=dict(zip(new, clip.split(1), strict=True)), pooled={**found.pooled, **pooled})


def read(model: Kontext, tokens: Tokens, task: Task, batch: Batch, seen: Conditions) -> Conditions:
    """T5's view of the same prompts, behind that of the CLIPs."""
    if not seen.clip:
        return seen
    states = text_encoders.read_t5(model.t5, ids(model, tokens, "t5", [*seen.clip]))
    joined = torch.cat([torch.cat([*seen.clip.values()]), states], dim=1)
    text = {**seen.text, **dict(zip(seen.clip, joined.split(1), strict=True))}
    return replace(seen, clip={}, text=text)


def ids(model: Kontext, tokens: Tokens, encoder: str, texts: Sequence[str]) -> Tensor:
    """Token ids (R, L) int64 for an encoder."""
    rows = [ids_of(tokens, model.config, encoder, text) for text in texts]
    return torch.tensor(rows, device=getattr(model, encoder).get_input_embeddings().weight.device)


def condition(model: Kontext, tokens: Tokens, task: Task, batch: Batch, reuse: Conditions) -> Conditions:
    """What the transformer takes of each prompt."""
    rows, prompts = texts_of(task, batch.prompts), dict(reuse.prompts)
    timesteps = schedule(model.config, task, batch).timesteps
    for pair in dict.fromkeys(row for row in rows if row not in prompts):
        own = rows_of(pair, task)
        text, pooled = (torch.cat([states[text] for text in own]) for states in (reuse.text, reuse.pooled))
        prompts[pair] = Guided(text, model.modulation(timesteps.to(text.device), pooled))
    return replace(reuse, prompts=prompts, rows=tuple(rows))


def check_prompts(config: Config, tokens: Tokens, task: Task, prompts: Sequence[str]) -> None:
    """Raise UsageError for sizes beyond the table and options of other families; say where a prompt will be cut."""
    check_task(config.dit, task)
    for text in {text for pair in texts_of(task, prompts) for text in pair}:
        count, most = len(tokens.encode(text, TOKENIZERS["t5"])) + 1, config.t5.positions
        if count > most:
            note = f"a prompt of {count} tokens: the model reads {most}, and its end is lost"
            warnings.warn(note, UnipicWarning, stacklevel=2)
