"""What DeepGen reads of prompts and pictures, against recorded runs and against transformers on random weights."""

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from unipic_run.engine.graphs import Graphs
from unipic_run.engine.layers.attention import Attention
from unipic_run.engine.layers.linear import as_row, logits
from unipic_run.engine.layers.qwen2 import Qwen2, Qwen2Config, axes_tables
from unipic_run.engine.models.deepgen import conditioner, vision
from unipic_run.engine.models.deepgen.conditioner import PictureCache, Row
from unipic_run.engine.models.deepgen.config import ConnectorConfig, VisionConfig
from unipic_run.engine.models.deepgen.connector import Connector
from unipic_run.engine.models.deepgen.vision import VisionTower
from unipic_run.engine.next_token import next_logits

ROOT = Path(__file__).resolve().parents[2]
FULL = Path(os.environ.get("UNIPIC_RUN_GOLDENS", ROOT.parent / "shared" / "goldens")) / "deepgen"
recorded = pytest.mark.skipif(not FULL.is_dir(), reason="needs the recorded runs of DeepGen beside the checkout")

COPIED = ROOT / "tests" / "data" / "goldens" / "deepgen" / "mq_conditioner.safetensors"

LLM = Qwen2Config(
    vocab=416, width=32, layers=36, heads=2, kv_heads=1, head_dim=16, mlp=48, rope_theta=1e6, norm_eps=1e-6,
    max_positions=4096,
)  # fmt: skip
MROPE = (2, 3, 3)
VISION = VisionConfig(
    width=32, depth=4, heads=2, mlp=44, patch=14, temporal=2, merge=2, window=112, full=(1, 3), out=32, eps=1e-6
)
SCB = ConnectorConfig(width=48, depth=3, heads=4, mlp=96, queries=12, taps=6, pooled=36, text=40, norm_eps=1e-6)
MQ = ConnectorConfig(width=32, depth=2, heads=2, mlp=80, queries=10, taps=0, pooled=36, text=40, norm_eps=1e-6)
SMALL = replace(LLM, layers=3)
IMAGE, PAD = 412, 400

NAMES = {  # our modules -> theirs, joined along dimension 0
    "norm": ("norm",),
    "layers.{}.input_norm": ("layers.{}.input_layernorm",),
    "layers.{}.qkv": tuple(f"layers.{{}}.self_attn.{x}_proj" for x in "qkv"),
    "layers.{}.o": ("layers.{}.self_attn.o_proj",),
    "layers.{}.post_norm": ("layers.{}.post_attention_layernorm",),
    "layers.{}.gate_up": ("layers.{}.mlp.gate_proj", "layers.{}.mlp.up_proj"),
    "layers.{}.down": ("layers.{}.mlp.down_proj",),
    "patch_embed": ("patch_embed.proj",),
    "blocks.{}.norm1": ("blocks.{}.norm1",),
    "blocks.{}.qkv": ("blocks.{}.attn.qkv",),
    "blocks.{}.proj": ("blocks.{}.attn.proj",),
    "blocks.{}.norm2": ("blocks.{}.norm2",),
    "blocks.{}.gate_up": ("blocks.{}.mlp.gate_proj", "blocks.{}.mlp.up_proj"),
    "blocks.{}.down": ("blocks.{}.mlp.down_proj",),
    "merger.norm": ("merger.ln_q",),
    "merger.fc1": ("merger.mlp.0",),
    "merger.fc2": ("merger.mlp.2",),
    **{f"projector_{i}": (f"projector_{i}",) for i in (1, 2, 3)},
    "encoder.{}.norm1": ("connector.layers.{}.layer_norm1",),
    "encoder.{}.qkv": tuple(f"connector.layers.{{}}.self_attn.{x}_proj" for x in "qkv"),
    "encoder.{}.proj": ("connector.layers.{}.self_attn.out_proj",),
    "encoder.{}.norm2": ("connector.layers.{}.layer_norm2",),
    "encoder.{}.fc1": ("connector.layers.{}.mlp.fc1",),
    "encoder.{}.fc2": ("connector.layers.{}.mlp.fc2",),
}


def fill(module: nn.Module, theirs: Mapping[str, Tensor], prefix: str = "") -> nn.Module:
    """Copies their tensors, with zeros where ours are padded."""
    module.requires_grad_(False)
    for name, ours in module.state_dict().items():
        if name == "queries":
            ours.copy_(theirs["meta_queries"])
            continue
        stem, kind = name.rsplit(".", 1)
        numbers = [word for word in stem.split(".") if word.isdigit()]
        pattern = ".".join("{}" if word.isdigit() else word for word in stem.split("."))
        joined = torch.cat([theirs[f"{prefix}{other.format(*numbers)}.{kind}"] for other in NAMES[pattern]])
        if joined.dim() > 2:
            joined = joined.flatten(1)
        ours.zero_()[tuple(map(slice, joined.shape))] = joined
    return module


def table(weight: Tensor) -> nn.Embedding:
    return nn.Embedding.from_pretrained(weight)


def close(got: Tensor, expected: Tensor) -> None:
    assert got.shape == expected.shape
    assert (got - expected).abs().max() <= 1e-4 * expected.abs().max()


class Reader:
    """The recorded Qwen2.5-VL in our modules."""

    def __init__(self, folder: str) -> None:
        theirs = load_file(FULL / "weights" / folder / "model.safetensors")
        self.vision = fill(VisionTower(VISION, Attention()), theirs, "visual.")
        self.llm = fill(Qwen2(LLM, Attention(), round_inv_freq=False, sections=MROPE), theirs, "model.")
        self.embed = table(theirs["model.embed_tokens.weight"])


@pytest.fixture(scope="module")
def deepgen() -> Reader:
    return Reader("vlm")


@pytest.fixture(scope="module")
def scb() -> nn.Module:
    return fill(Connector(SCB, LLM.width, Attention()), load_file(FULL / "weights" / "connector" / "model.safetensors"))


@pytest.fixture(scope="module")
def conditioner_of_metaquery() -> nn.Module:
    return fill(Connector(MQ, LLM.width, Attention()), load_file(COPIED))


def case(name: str) -> tuple[dict[str, Tensor], dict]:
    file = FULL / "cases" / name
    return load_file(file.with_suffix(".safetensors")), json.loads(file.with_suffix(".json").read_text())


def seen(reader: Reader, tensors: Mapping[str, Tensor]) -> list[tuple[Tensor, tuple[int, int]]]:
    """Features and grid of every reference, checked against the record."""
    pictures = []
    for i in range(sum(name.endswith("resized_uint8") for name in tensors)):
        pixels = tensors[f"ref{i}.resized_uint8"].permute(2, 0, 1)[None].float() / 255 * 2 - 1
        patches, rows, columns = vision.patches(pixels)
        assert [1, rows, columns] == tensors[f"vis{i}.grid_thw"][0].tolist()
        if f"vis{i}.patches" in tensors:
            close(patches, tensors[f"vis{i}.patches"])
        features = reader.vision(patches, rows, columns)
        close(features, tensors[f"vis{i}.embeds"])
        pictures.append((features, (rows // 2, columns // 2)))
    return pictures


def pad_input(reader: Reader) -> Tensor:
    return reader.embed(as_row([PAD], reader.embed))


def tapped_states(reader: Reader, rows: list[Tensor], at: list[Tensor | None]) -> list[Tensor]:
    return conditioner.side_by_side(reader.llm.outputs(rows, at), conditioner.tapped(LLM.layers, SCB.taps))


def prompts(tensors: Mapping[str, Tensor], references: list[int], pictures: list) -> Iterator[Row]:
    """The recorded rows without their pads; conditional ones first, the same pictures in both halves."""
    stock = [pictures[sum(references[:i]) : sum(references[: i + 1])] for i in range(len(references))] * 2
    for ids, mask, own in zip(tensors["input_ids"], tensors["attention_mask"], stock, strict=True):
        kept = ids[mask[: len(ids)].bool()].tolist()
        yield Row(kept, *([p[k] for p in own] for k in range(2)))


@recorded
@pytest.mark.parametrize(
    "name", ["t2i_cfg", "t2i_nocfg", "t2i_batch2", "edit_one_ref", "edit_two_refs", "edit_ragged_batch"]
)
def test_conditions_equal_the_recorded_ones(name: str, deepgen: Reader, scb: Connector) -> None:
    tensors, told = case(f"deepgen_{name}")
    references = told["refs_per_sample"] or [0] * len(told["prompt"])
    rows = list(prompts(tensors, references, seen(deepgen, tensors)))
    for i, row in enumerate(rows):
        at = conditioner.positions(row, IMAGE, more=SCB.queries).expand(3, 1, -1)[:, 0]
        assert torch.equal(at, tensors["position_ids"][:, i, tensors["attention_mask"][i].bool()])
    read = conditioner.with_queries(deepgen.embed, scb.queries, rows, IMAGE)
    if "inputs_embeds" in tensors:
        for x, expected in zip(read, tensors["inputs_embeds"], strict=True):
            close(x[0], expected[-x.shape[1] :])
    at = [conditioner.positions(row, IMAGE, more=SCB.queries) for row in rows]
    *found, pad = tapped_states(deepgen, [*read, pad_input(deepgen)], [*at, None])
    missing = [tensors["scb_in"].shape[1] - x.shape[1] for x in found]
    states = torch.cat([torch.cat([pad.expand(1, n, -1), x], 1) for n, x in zip(missing, found, strict=True)])
    close(states, tensors["scb_in"])
    if "proj1_out" in tensors:
        close(scb.projector_1(states), tensors["proj1_out"])
    close(scb.encode(states), tensors["connector_out"])
    text, pooled = scb(states)
    close(text, tensors["seq"])
    close(pooled, tensors["pooled"])


@recorded
@pytest.mark.parametrize("name", ["t2i", "edit"])
def test_metaquery_equals_the_recorded_runs(name: str, conditioner_of_metaquery: Connector) -> None:
    (tensors, _), reader, pictures = case(f"unipic2_mq_{name}"), Reader("vlm_base"), []
    if name == "edit":
        _, rows, columns = tensors["vis.grid_thw"][0].tolist()
        features = reader.vision(tensors["vis.patches"], rows, columns)
        close(features, tensors["vis.embeds"][: len(features)])  # the same picture in both rows
        pictures = [(features, (rows // 2, columns // 2))]
    tensors["input_ids"] = tensors["input_ids"][:, : -MQ.queries]
    rows = list(prompts(tensors, [len(pictures)], pictures))
    queries = conditioner_of_metaquery.queries
    read = conditioner.with_queries(reader.embed, queries, rows, IMAGE)
    hidden = conditioner.last_states(reader.llm, read, [conditioner.in_a_row(x) for x in read], len(queries))
    close(hidden, tensors["query_hidden"])
    text, pooled = conditioner_of_metaquery(hidden)
    close(text, tensors["seq"])
    close(pooled, tensors["pooled"])


@recorded
def test_connector_and_pad_equal_the_recorded_ones(deepgen: Reader, scb: Connector) -> None:
    unit = load_file(FULL / "unit" / "unit.safetensors")
    close(scb.projector_1(unit["scb.in"]), unit["scb.proj1_out"])
    close(scb.encode(unit["scb.in"]), unit["scb.connector_out"])
    text, pooled = scb(unit["scb.in"])
    close(text, unit["scb.seq"])
    close(pooled, unit["scb.pooled"])
    (pad,) = tapped_states(deepgen, [pad_input(deepgen)], [None])
    close(pad[0, 0], unit["pad.scb_row"])


def test_conditioner_of_metaquery_equals_the_copied_record(conditioner_of_metaquery: Connector) -> None:
    unit = load_file(COPIED)
    text, pooled = conditioner_of_metaquery(unit["recorded.in"])
    close(text, unit["recorded.seq"])
    close(pooled, unit["recorded.pooled"])


def part_of(module: nn.Module, prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): x for name, x in module.state_dict().items() if name.startswith(prefix)}


@pytest.fixture(scope="module")
def pair() -> tuple[Callable[..., Tensor], VisionTower, Qwen2, nn.Embedding]:
    """Logits of transformers' Qwen2.5-VL with random weights, and the same weights in our modules."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    theirs = transformers.Qwen2_5_VLForConditionalGeneration(
        transformers.Qwen2_5_VLConfig(
            text_config={
                "vocab_size": SMALL.vocab, "hidden_size": SMALL.width, "num_hidden_layers": SMALL.layers,
                "num_attention_heads": SMALL.heads, "num_key_value_heads": SMALL.kv_heads,
                "intermediate_size": SMALL.mlp, "rms_norm_eps": SMALL.norm_eps, "tie_word_embeddings": True,
                "rope_parameters": {"rope_type": "default", "rope_theta": SMALL.rope_theta, "mrope_section": [*MROPE]},
            },
            vision_config={
                "depth": VISION.depth, "hidden_size": VISION.width, "intermediate_size": VISION.mlp,
                "num_heads": VISION.heads, "fullatt_block_indexes": [*VISION.full], "out_hidden_size": VISION.out,
                "window_size": VISION.window,
            },
            image_token_id=IMAGE, video_token_id=IMAGE + 1, vision_start_token_id=409, vision_end_token_id=410,
            tie_word_embeddings=True,
        )
    ).eval()  # fmt: skip
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.2)

    def reference(ids: list[int], patches: Tensor, grids: list[tuple[int, int]]) -> Tensor:
        given = torch.tensor([ids])
        thw = torch.tensor([(1, 2 * rows, 2 * columns) for rows, columns in grids])
        kinds = (given == IMAGE).int()
        with torch.no_grad():
            return theirs(
                input_ids=given, pixel_values=patches, image_grid_thw=thw, mm_token_type_ids=kinds, use_cache=False
            ).logits[0]

    tower = fill(VisionTower(VISION, Attention()), part_of(theirs, "model.visual."))
    text = part_of(theirs, "model.language_model.")
    llm = fill(Qwen2(SMALL, Attention(), round_inv_freq=False, sections=MROPE), text)
    return reference, tower, llm, table(text["embed_tokens.weight"])


def test_answers_about_pictures_of_odd_sizes_equal_transformers(pair: tuple) -> None:
    reference, tower, llm, embed = pair
    grids = [(5, 7), (9, 3), (4, 8)]  # windows cut at both edges, at the lower one and narrower than one, whole
    counts = [math.prod(grid) for grid in grids]
    patches = torch.randn(4 * sum(counts), 1176)
    parts = patches.split([4 * count for count in counts])
    features = [tower(x, 2 * rows, 2 * columns) for x, (rows, columns) in zip(parts, grids, strict=True)]
    first, second = [401, 7, *[IMAGE] * counts[0], 8, 9, *[IMAGE] * counts[1]], [410, *[IMAGE] * counts[2]]
    ids, answer = [*first, *second, 10, 11, 12], [13, 14, 15]
    expected = reference(ids + answer, patches, grids)
    cache = PictureCache.empty(
        SMALL.layers, SMALL.kv_heads, len(ids) + 3, SMALL.head_dim, torch.float32, torch.device("cpu")
    )
    hidden = [
        conditioner.prefill(llm, embed, row, IMAGE, cache)
        for row in (Row(first, features[:2], grids[:2]), Row([*second, 10, 11, 12], features[2:], grids[2:]))
    ]
    close(logits(torch.cat(hidden, 1)[0], embed), expected[: len(ids)])
    model = SimpleNamespace(llm=llm, embed=embed, graphs=Graphs(), logits=partial(logits, table=embed))
    for i, token in enumerate(answer):
        close(next_logits(model, cache, [token]), expected[len(ids) + i])
    cache.cut(len(ids))
    close(next_logits(model, cache, answer), expected[-1])


def test_windows_are_batches_of_what_a_mask_over_the_picture_leaves() -> None:
    rows, columns, side = 5, 7, 4
    order, sizes = vision.by_windows(rows, columns, side, torch.device("cpu"))
    assert sizes == ((1, 16), (1, 12), (1, 4), (1, 3)) and sorted(order.tolist()) == [*range(35)]
    window = torch.arange(rows)[:, None] // side * 2 + torch.arange(columns) // side
    same = window.flatten()[order][:, None] == window.flatten()[order]
    q, k, v = torch.randn(3, 1, 2, 35, 8)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=same)
    got = vision.attend_in(sizes, Attention(), q, k, v)
    torch.testing.assert_close(got, expected.transpose(1, 2).flatten(2))
    assert vision.by_windows(8, 12, side, torch.device("cpu"))[1] == ((6, 16),)


def test_positions_of_text_are_plain_and_a_picture_takes_its_longer_side() -> None:
    at = conditioner.positions(Row([1, 2, 0, 0, 0, 0, 0, 0, 3], grids=[(2, 3)]), image_token=0, more=1, start=10)
    frame, row, column = at[:, 0].tolist()
    assert frame == [10, 11, 12, 12, 12, 12, 12, 12, 15, 16]
    assert row == [10, 11, 12, 12, 12, 13, 13, 13, 15, 16]
    assert column == [10, 11, 12, 13, 14, 12, 13, 14, 15, 16]
    assert conditioner.positions(Row([1, 2, 3]), image_token=0).tolist() == [[0, 1, 2]]
    llm = Qwen2(SMALL, Attention(), round_inv_freq=False, sections=MROPE)
    plain = torch.arange(3000, 3005)[None]
    same = plain.expand(3, 1, 5)
    got = axes_tables(same, llm.frequencies_of(same, torch.float32), torch.float32)
    assert all(map(torch.equal, got, llm.rotary(plain, torch.float32)))


@pytest.mark.parametrize(("count", "message"), [(5, "fewer placeholders"), (7, "1 placeholders more")])
def test_placeholders_that_are_not_the_pictures_are_refused(count: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        conditioner.positions(Row([1, *[0] * count, 2], grids=[(2, 3)]), image_token=0)
