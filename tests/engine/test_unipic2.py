"""UniPic-2 against recorded runs: from the released folders and the prompt to the picture, every tensor."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from unipic_run import Engine
from unipic_run.engine import families, weights
from unipic_run.engine.checkpoint.convert import convert
from unipic_run.engine.errors import ModelMissingError, UnsupportedDeviceError, UsageError
from unipic_run.engine.models.deepgen import model as deepgen
from unipic_run.engine.models.deepgen.sampler import Sampler
from unipic_run.engine.models.unipic2.kontext import text_encoders
from unipic_run.engine.models.unipic2.kontext.prompts import TOKENIZERS, ids_of
from unipic_run.engine.models.unipic2.limits import fitted_size
from unipic_run.engine.models.unipic2.metaquery import released
from unipic_run.engine.models.unipic2.metaquery.shrink import smaller
from unipic_run.engine.noise import FlowTape
from unipic_run.engine.prepare import Defaults, edit_task, generate_task
from unipic_run.engine.request import EditRequest, GenerateRequest
from unipic_run.engine.run import to_levels
from unipic_run.engine.sampling import Sampling
from unipic_run.engine.task import Batch, Task
from unipic_run.engine.tokens import Tokens
from unipic_run.quant.recipe import NONE

ROOT = Path(__file__).resolve().parents[2]
GOLDENS = Path(os.environ.get("UNIPIC_RUN_GOLDENS", ROOT.parent / "shared" / "goldens")) / "deepgen"
recorded = pytest.mark.skipif(not GOLDENS.is_dir(), reason="needs the recorded runs of DeepGen beside the checkout")

PAINTER = {name: f"weights/{name}" for name in ("transformer", "vae", "scheduler")}
ENDS = ("", "_2", "_3")
RELEASES = {
    "unipic2-kontext": PAINTER
    | {f"{n}{end}": f"weights/{n}{end}" for n in ("text_encoder", "tokenizer") for end in ENDS},
    "unipic2-metaquery": PAINTER
    | {"conditioner": "weights/conditioner", "vlm": "weights/vlm_base", "tokenizer": "tokenizer"},
}
CASES = ["kontext_t2i", "kontext_edit", "mq_t2i", "mq_edit"]


@dataclass
class Model:
    family: ModuleType
    folder: Path
    module: nn.Module
    tokens: Tokens


def test_all_of_the_language_model_is_read_from_its_folder_whatever_it_is_called(tmp_path: Path) -> None:
    for name in ("transformer", "conditioner", "Qwen2.5-VL-7B-Instruct"):
        (tmp_path / name).mkdir()
    small = released.locate(tmp_path).small()
    assert {small[use].parent.name for use in ("vlm", "generation")} == {"Qwen2.5-VL-7B-Instruct"}


def release(name: str, into: Path) -> Path:
    """The released layout, made of links to what is recorded."""
    into.mkdir()
    for ours, theirs in RELEASES[name].items():
        (into / ours).symlink_to(GOLDENS / theirs)
    return into


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Model]:
    pytest.importorskip("transformers")
    found, place = {}, tmp_path_factory.mktemp("unipic2")
    for name in RELEASES:
        source = release(name, place / name)
        assert families.of_released(source).name == name
        folder, family = convert(source, place / f"{name}-converted", family=name), families.model(name)
        row, config = families.read(folder)
        assert row.name == name
        module = weights.prepared(partial(family.build, config), NONE)
        weights.load(module, folder, "cpu", torch.float32)
        found[name] = Model(
            family, folder, module.eval(), Tokens(folder / "tokenizer.json", family.IMAGE, config.image_token)
        )
    return found


class WatchedSampler(Sampler):
    """Keeps the unguided velocities, conditional row first, and the latents after every step."""

    velocities: list[Tensor]
    latents: list[Tensor]

    def rows(self, *given: Any) -> Tensor:
        self.velocities.append(super().rows(*given))
        return self.velocities[-1]

    def step(self, *given: Any) -> tuple[Tensor, Tensor]:
        made = super().step(*given)
        self.latents.append(made[0])
        return made


def close(found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape
    error = ((found - expected).abs().max() / expected.abs().max()).item()
    assert error <= 1e-4, error
    print(f"{error:.1e}", end=" ")


def task_of(model: Model, told: dict[str, Any], tensors: Mapping[str, Tensor]) -> Task:
    """The recorded request, as the engine makes a task of it."""
    sampling = Sampling(45, steps=told["num_steps"], guidance=told["guidance_scale"])
    if "ref0.raw_uint8" not in tensors:
        request = GenerateRequest((told["prompt"],), (told["width"], told["height"]), sampling)
        return generate_task(request, Defaults(50, 3.5))[0]
    picture = Image.fromarray(tensors["ref0.raw_uint8"].numpy())
    request = EditRequest(picture, (told["prompt"],), sampling, res=told["resize_longest_edge"])
    config, where = model.module.config, (torch.device("cpu"), torch.float32)
    task, _ = edit_task(request, model.family, config, Defaults(50, 3.5), *where)
    levels = ((task.sources[0][0].permute(1, 2, 0) + 1) * 127.5).round().to(torch.uint8)
    assert torch.equal(levels, tensors["ref0.resized_uint8"])
    return task


@recorded
@pytest.mark.parametrize("name", CASES)
def test_runs_equal_the_recorded_ones(name: str, models: Mapping[str, Model], monkeypatch: pytest.MonkeyPatch) -> None:
    model = models["unipic2-kontext" if name.startswith("kontext") else "unipic2-metaquery"]
    tensors = load_file(GOLDENS / "cases" / f"unipic2_{name}.safetensors")
    told = json.loads((GOLDENS / "cases" / f"unipic2_{name}.json").read_text("utf-8"))
    task, family, config = task_of(model, told, tensors), model.family, model.module.config
    batch = Batch(
        [told["prompt"]], [FlowTape(tensors["noise"][0], [x[0] for n, x in tensors.items() if "vae_noise" in n])]
    )
    monkeypatch.setattr(WatchedSampler, "velocities", [], raising=False)
    monkeypatch.setattr(WatchedSampler, "latents", [], raising=False)
    monkeypatch.setattr(deepgen, "Sampler", WatchedSampler)
    with torch.inference_mode():
        family.check_prompts(config, model.tokens, task, batch.prompts)
        conditions = seen = None
        for stage in ("look", "read", "condition"):
            conditions = getattr(family, stage)(model.module, model.tokens, task, batch, conditions)
            seen = conditions if stage == "read" else seen
        schedule = family.schedule(config, task, batch)
        *_, latents = family.sample(model.module, conditions, task, batch, schedule)
        pixels = family.decode(model.module, latents, task.rows, task.columns)
        if task.sources:
            close(deepgen.posterior(config, conditions.pictures[0], 0, batch.noises), tensors["ref0.latents"])
    compare = compare_kontext if name.startswith("kontext") else compare_metaquery
    compare(model, told, tensors, seen)
    (prompt,) = conditions.prompts.values()
    close(prompt.text.flip(0), tensors["dit_seq_uncond_cond"])
    torch.testing.assert_close(torch.tensor(schedule.sigmas), tensors["sigmas"], rtol=1e-6, atol=0)
    close(torch.stack(WatchedSampler.velocities).flip(1), tensors["noise_pred"])
    close(torch.stack(WatchedSampler.latents), tensors["latents"])
    levels, expected = to_levels(pixels)[0].int(), tensors["image_uint8_hwc"].int()
    assert (levels - expected).abs().max() <= 1 and (levels != expected).float().mean() <= 0.002


def compare_kontext(model: Model, told: dict[str, Any], tensors: Mapping[str, Tensor], seen: Any) -> None:
    texts = [told["prompt"], told["negative_prompt"]]
    assert {*seen.text} == {*texts}
    for encoder, end in zip(TOKENIZERS, ENDS, strict=True):
        ids = [ids_of(model.tokens, model.module.config, encoder, text) for text in texts]
        assert torch.equal(torch.tensor(ids), tensors[f"tokenizer{end}.input_ids"])
    for text, prefix in zip(texts, ("", "negative_"), strict=True):
        close(seen.text[text], tensors[f"{prefix}prompt_embeds"])
        close(seen.pooled[text], tensors[f"{prefix}pooled_prompt_embeds"])


def compare_metaquery(model: Model, told: dict[str, Any], tensors: Mapping[str, Tensor], seen: Any) -> None:
    states = torch.cat([*seen.states.values()])  # conditional row first
    close(states, tensors["query_hidden"])
    with torch.inference_mode():
        text, pooled = model.module.connector(states)
    close(text, tensors["seq"])
    close(pooled, tensors["pooled"])
    if seen.pictures:
        features = seen.pictures[0].features
        close(features, tensors["vis.embeds"][: len(features)])  # the same picture in both rows


@recorded
def test_the_language_model_comes_apart(tmp_path: Path) -> None:
    source = release("unipic2-metaquery", tmp_path / "released")
    (source / "vlm").unlink()
    with pytest.raises(ModelMissingError, match=r"vlm.*Qwen/Qwen2\.5-VL-7B-Instruct"):
        families.released("unipic2-metaquery").Released(source)


@recorded
def test_questions_go_to_the_output_layer(models: Mapping[str, Model]) -> None:
    """It is the table of words where the released language model has no other."""
    model = models["unipic2-metaquery"]
    assert torch.equal(model.module.lm_head.weight, model.module.embed.weight)
    pixels = torch.rand(1, 3, 56, 84) * 2 - 1
    with torch.inference_mode():
        ids = model.family.question_ids(model.tokens, "how many?")
        seen = model.family.look_to_answer(model.module, pixels)
        caches = [model.family.read_image(model.module, model.tokens, seen, len(ids)) for _ in range(2)]
        found = model.family.next_logits(model.module, caches[0], ids)
        hidden = model.module.llm.extend(model.module.embed(torch.tensor([ids])), caches[1])[0, -1]
        close(found, deepgen.DeepGen.logits(model.module, hidden))
        model.module.lm_head.weight.mul_(-2.0)
        caches[0].cut(caches[0].length - len(ids))
        close(model.family.next_logits(model.module, caches[0], ids), -2.0 * found)
        model.module.lm_head.weight.div_(-2.0)


@recorded
@pytest.mark.parametrize("name", RELEASES)
def test_the_engine_paints_in_8_bits_as_in_float(name: str, models: Mapping[str, Model]) -> None:
    made = []
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (96, 64, 3), dtype=np.uint8))
    for quant in ("none", "int8"):
        with Engine.from_pretrained(models[name].folder, device="cpu", dtype="fp32", quant=quant) as engine:
            result = engine.edit(picture, "make it night", res=96, steps=2, seed=1)
            assert result.images[0].size == (64, 96)
            made.append(np.asarray(result.images[0]).astype(float))
            drawn = engine.generate(["a fox", "a boat"], size=(48, 64), steps=2, seed=1)
            assert [image.size for image in drawn.images] == [(48, 64)] * 2
            if "ask" not in models[name].family.kinds:
                with pytest.raises(UsageError, match="does not answer questions"):
                    engine.ask(picture, "how many?")
            else:
                assert engine.ask(picture, "how many?", max_new_tokens=2).ids
    wrong = np.abs(made[0] - made[1]).mean() / np.abs(made[0] - made[0].mean()).mean()
    assert 0 < wrong < 0.15, wrong


def test_pictures_shrink_as_pillow_shrinks_them() -> None:
    levels = np.random.default_rng(0).integers(0, 256, (160, 96, 3), dtype=np.uint8)
    levels[:64, :64] = np.where(levels[:64, :64] > 127, 255, 0)  # overshoots
    expected = np.asarray(Image.fromarray(levels).resize((84, 140), Image.Resampling.BICUBIC))
    for dtype in (torch.float32, torch.bfloat16):  # which still tells all 256 levels apart
        pixels = (torch.from_numpy(levels).permute(2, 0, 1)[None] / 255 * 2 - 1).to(dtype)
        found = ((smaller(pixels)[0].permute(1, 2, 0) + 1) * 127.5).round()
        assert np.array_equal(found.numpy(), expected)


@pytest.mark.parametrize(
    ("size", "expected"),
    [((640, 480), (512, 384)), ((300, 200), (512, 352)), ((31, 33), (480, 512)), ((2048, 100), (512, 32))],
)
def test_sizes_of_edits(size: tuple[int, int], expected: tuple[int, int]) -> None:
    """Of the recorded table of sizes; and a strip that the original would round to nothing."""
    assert fitted_size(size, "longest", 512) == expected
    assert fitted_size(size, "crop", 512) == (512, 512)
    assert fitted_size((4096, 9), "longest", 512) == (512, 32)


def test_without_transformers_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(text_encoders, "import_module", missing)
    with pytest.raises(UnsupportedDeviceError, match=r"unipic-run\[unipic2\]"):
        text_encoders.transformers()
