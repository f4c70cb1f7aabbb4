"""A picture by our kernels in Triton's interpreter: the one torch makes, by the launches that meta foresees."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from unipic_run.bench.random_model import any_tokens, architecture, fill
from unipic_run.engine import families
from unipic_run.engine.noise import PhiloxNoise
from unipic_run.engine.run import plan_rounds
from unipic_run.engine.task import Batch, Task
from unipic_run.kernels._op import Launch, interpreted, recording

TASK = Task("generate", 3, 3, steps=2, guidance=3.0, cfg_schedule="linear", temperature=0.9)
BATCH = Batch(["a red fox"], [PhiloxNoise(1)])


@pytest.fixture(autouse=True)
def inference():
    with torch.inference_mode():
        yield


def latents(model, tokens):
    """(1, 9, 16), after the last round."""
    family, device = families.model("unipic"), model.embed.weight.device
    conditions = family.condition(model, tokens, TASK, BATCH)
    *_, last = family.sample(model, conditions, TASK, BATCH, plan_rounds(TASK, BATCH).to(device))
    return last


def counted(launches: list[Launch]) -> Counter:
    return Counter((launch.kernel.__name__, launch.grid) for launch in launches)


def test_the_interpreter_makes_torchs_picture_by_the_launches_of_the_meta_device(tiny_release) -> None:
    pytest.importorskip("triton")
    family, config = families.model("unipic"), architecture(str(tiny_release))
    config = replace(config, head=replace(config.head, steps=6))  # a chunk of modulations and a smaller one
    tokens = any_tokens(tiny_release / "Qwen2.5-1.5B-Instruct" / "tokenizer.json", family.IMAGE)
    with torch.device("meta"):
        shapes = family.build(config)
    real = family.build(config)
    fill(real)
    expected = latents(real, tokens)
    with interpreted(), recording() as launched:
        got = latents(real, tokens)
    with recording() as planned:
        latents(shapes, tokens)
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-3)
    assert counted(launched) == counted(planned)
    names = Counter(launch.kernel.__name__ for launch in launched)
    assert names["_ddpm_update_kernel"] == 2 * 6 and names["_prefix_attention_kernel"] == 2 * config.llm.layers
