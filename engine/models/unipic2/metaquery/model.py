"""UniPic2-MetaQuery: Qwen2.5-VL conditions DeepGen's diffusion transformer through learned queries, as verbs.

Unlike DeepGen's connector, the conditioner reads the queries alone, behind the last norm: every prompt becomes as many
tokens as there are queries, and no pad counts. What follows the conditions is DeepGen's.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ....layers.attention import Attention
from ....layers.linear import Linear
from ....task import Batch, Task
from ....tokens import Tokens
from ...deepgen import prompts as prompts_of
from ...deepgen.conditioner import Row, in_a_row, last_states, with_queries
from ...deepgen.config import DeepGenConfig as Config
from ...deepgen.limits import (  # noqa: F401 (the engine asks the family)
    check_question,
    check_task,
    check_texts,
    max_image_tokens,
    question_picture,
    question_size,
)
from ...deepgen.model import (  # noqa: F401 (as above)
    Conditions,
    DeepGen,
    Picture,
    attention_backend,
    decode,
    guided,
    latents,
    look_to_answer,
    lookups,
    next_logits,
    question_ids,
    read_image,
    repeated,
    rows_of,
    sample,
    schedule,
    stacks,
    taken_over,
)
from ...deepgen.model import needs as _needs
from ...deepgen.prompts import IMAGE, as_ids  # noqa: F401
from ...deepgen.speeds import speeds  # noqa: F401 (the engine asks the family)
from ...deepgen.vision import MERGE, as_patches
from ..limits import fitted_size  # noqa: F401
from .prompts import turn
from .shrink import smaller

kinds = ("generate", "edit", "ask")
fits = ("longest", "crop")
posteriors = ("sample", "mean")
shortcuts = ("cfg_interval", "block_cache")
most_sources = 1  # which the result has the size of
parts_guidance = True
tuned = ()


def needs(kind: str) -> dict[str, tuple[str, ...]]:
    """Stage by stage, the parts that it runs."""
    stages = _needs(kind)
    return stages | {"answer": (*stages["answer"], "lm_head")} if kind == "ask" else stages


class MetaQuery(DeepGen):
    """The parts by name. Unlike DeepGen's language model this one does not make logits from the table of its words."""

    def __init__(self, config: Config, attend: Attention) -> None:
        super().__init__(config, attend)
        self.lm_head = Linear(config.llm.width, config.llm.vocab, bias=False)

    def logits(self, hidden: Tensor) -> Tensor:
        return self.lm_head(hidden)


def build(config: Config, attend: Attention | None = None) -> MetaQuery:
    """Uninitialised parts; call under `torch.device("meta")` and let `engine/weights.py` fill them."""
    return MetaQuery(config, attend or Attention())


def texts_of(task: Task, prompts: Sequence[str]) -> list[tuple[str, str]]:
    """Of each picture its prompt and what is to be avoided, in their templates."""
    return prompts_of.texts_of(task, prompts, turn)


def look(model: MetaQuery, tokens: Tokens, task: Task, batch: Batch, reuse: Conditions | None = None) -> Conditions:
    """Embed what the language model has not read yet; of `reuse`, an earlier batch of the task, pictures are kept, and
    prompts that come again.
    """
    pictures = reuse.pictures if reuse else tuple(see(model, pixels) for pixels in task.sources)
    known, prompts, rows = {}, {}, texts_of(task, batch.prompts)
    if reuse:
        known, prompts = reuse.states, taken_over(reuse.prompts, rows)
    image_token, queries = model.config.image_token, model.connector.queries
    features, grids = [x.features for x in pictures], [x.grid for x in pictures]
    lengths, inputs = {}, {}
    for pair in dict.fromkeys(row for row in rows if row not in prompts):
        for text in rows_of(pair, task):
            lengths[text] = len(queries)
            if text not in known:
                row = Row(as_ids(tokens, text, image_token, grids), features, grids)
                (x,) = with_queries(model.embed, queries, [row], image_token)
                inputs[text] = x, in_a_row(x)  # as it was trained: placeholders count as text
    return Conditions(pictures, lengths, inputs, known, prompts)


def see(model: MetaQuery, pixels: Tensor) -> Picture:
    """pixels (1, 3, H, W) in [-1, 1], sides multiples of 32."""
    x, rows, columns = as_patches(smaller(pixels).to(pixels.dtype))
    return Picture(model.vision(x, rows, columns), (rows // MERGE, columns // MERGE), model.vae_encoder(pixels))


def read(model: MetaQuery, tokens: Tokens, task: Task, batch: Batch, seen: Conditions) -> Conditions:
    """Final states of the queries, all rows through a layer before the next; states of other rows are kept where this
    batch has them.
    """
    wanted = {text for pair in texts_of(task, batch.prompts) for text in pair}
    states = {text: x for text, x in seen.states.items() if text in wanted}
    if seen.inputs:
        inputs, at = zip(*seen.inputs.values(), strict=True)
        found = last_states(model.llm, inputs, at, len(model.connector.queries))
        states |= zip(seen.inputs, found.split(1), strict=True)
    return replace(seen, inputs={}, states=states)


def condition(model: MetaQuery, tokens: Tokens, task: Task, batch: Batch, reuse: Conditions) -> Conditions:
    """What the transformer takes of each prompt."""
    rows, prompts = texts_of(task, batch.prompts), dict(reuse.prompts)
    timesteps = schedule(model.config, task, batch).timesteps
    for pair in dict.fromkeys(row for row in rows if row not in prompts):
        states = torch.cat([reuse.states[text] for text in rows_of(pair, task)])
        prompts[pair] = guided(model, states, timesteps)
    return replace(reuse, prompts=prompts, rows=tuple(rows))


def check_prompts(config: Config, tokens: Tokens, task: Task, prompts: Sequence[str]) -> None:
    """Raise UsageError for sizes beyond the tables, prompts that do not fit, and options of other families."""
    check_task(config.dit, task)
    texts = dict(zip((pair[0] for pair in texts_of(task, prompts)), prompts, strict=True))
    texts[turn(task.kind, prompts_of.avoided(task), len(task.sources))] = task.negative or ""
    check_texts(config, tokens, task, texts)
