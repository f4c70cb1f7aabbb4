"""A picture by our kernels in Triton's interpreter: the one torch makes, by the launches that meta foresees."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from unipic_run.bench.random_model import any_tokens, architecture, fill
from unipic_run.engine import families
from unipic_run.engine.layers.attention import Attention
from unipic_run.engine.loaded import Loaded
from unipic_run.engine.noise import PhiloxNoise
from unipic_run.engine.plan import META, dry_run, shapes
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
    *_, last = family.sample(model, conditions, TASK, BATCH, family.schedule(model.config, TASK, BATCH).to(device))
    return last


def counted(launches: list[Launch]) -> Counter:
    return Counter((launch.kernel.__name__, launch.grid) for launch in launches)


def test_the_interpreter_makes_torchs_picture_by_the_launches_of_the_meta_device(tiny_release) -> None:
    pytest.importorskip("triton")
    family, config = families.model("unipic"), architecture(str(tiny_release))
    config = replace(config, head=replace(config.head, steps=7))  # a chunk of modulations and a smaller one
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
    assert names["_head_step_kernel"] == 2 * 7 and names["_prefix_attention_kernel"] == 2 * config.llm.layers


def test_in_int8_whole_numbers_go_from_product_to_product(tiny_release) -> None:
    family, config = families.model("unipic"), architecture(str(tiny_release))
    config = replace(
        config,
        llm=replace(config.llm, mlp=384, head_dim=128),
        mar=replace(config.mar, width=160, heads=2, mlp=256),  # heads of 80, as in the released model
        head=replace(config.head, condition=160, steps=6),
    )
    tokens = any_tokens(tiny_release / "Qwen2.5-1.5B-Instruct" / "tokenizer.json", family.IMAGE)
    model = shapes(family, config, families.recipe("unipic", "int8"), torch.bfloat16, Attention("int8-qk"))
    plan = dry_run(Loaded(family, model, tokens, META), replace(TASK, rows=6, columns=6), BATCH)
    calls = [call for call in plan.calls if call.stage.startswith("sample")]
    names = {call.name for call in calls}
    assert {"int8_linear_to_heads", "keys_off", "int8_linear_to_groups", "int8_linear_of_groups"} <= names
    assert {"int8_linear_to_rotary", "rotary_keys_off", "prefix_attention_int8"} <= names
    assert names.isdisjoint({"quantise_qkv", "rope_split"}), "no pass over queries and keys"
    inside = [call for call in calls if call.name in ("quantise", "rotated") and call.shape[-1] in (256, 384)]
    assert not inside, "nor over what is between the products of an MLP"
