"""Parity with the recorded runs holds here, and the bench that says so can say no."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from unipic_run import Engine
from unipic_run.bench import parity
from unipic_run.bench.parity_case import Case
from unipic_run.bench.parity_runs import make_images
from unipic_run.engine.models.deepgen import model as deepgen
from unipic_run.engine.models.unipic.head import DiffusionHead
from unipic_run.engine.noise import PhiloxNoise
from unipic_run.quant.int8 import Int8Linear

ROOT = Path(__file__).resolve().parents[2]
FULL = Path(os.environ.get("UNIPIC_RUN_GOLDENS", ROOT.parent / "shared" / "goldens")) / "unipic1"
DEEPGEN = FULL.parent / "deepgen"
second_family = pytest.mark.skipif(not DEEPGEN.is_dir(), reason=f"the recorded runs of DeepGen are not at {DEEPGEN}")


@pytest.fixture
def replay(tiny_release, capsys):
    """parity's exit status and its JSON line for a folder and more arguments."""

    def run(folder, *arguments):
        status = parity.main([str(folder), "--checkpoint", str(tiny_release), *arguments])
        return status, json.loads(capsys.readouterr().out.splitlines()[-1])

    return run


@pytest.fixture
def copied(goldens, tmp_path):
    """A folder with copies of some recorded cases."""

    def copy(*names):
        (tmp_path / "cases").mkdir()
        for name in names:
            for file in (goldens / "cases").glob(f"{name}*"):
                shutil.copy(file, tmp_path / "cases")
        return tmp_path

    return copy


def missed(summary):
    return {name: case["failures"] for name, case in summary["cases"].items() if not case["passed"]}


def test_the_compact_copy_passes(replay, goldens):
    status, summary = replay(goldens)
    assert status == 0, missed(summary)
    kinds = {case["kind"] for case in summary["cases"].values()}
    assert kinds >= {"text2image_batch", "image_edit", "image_to_text", "units", "preprocess", "rope", "tokenizer"}
    assert all(case["compared"] for case in summary["cases"].values())


@pytest.mark.skipif(not FULL.is_dir(), reason=f"the full recorded runs are not at {FULL}: set UNIPIC_RUN_GOLDENS")
def test_the_full_set_passes(capsys):
    status = parity.main([str(FULL), "--json"])
    assert status == 0, missed(json.loads(capsys.readouterr().out))


@second_family
def test_the_second_family_passes(capsys):
    status = parity.main([str(DEEPGEN), "--json"])
    summary = json.loads(capsys.readouterr().out)
    assert status == 0, missed(summary)
    assert {case["kind"] for case in summary["cases"].values()} >= {"deepgen", "deepgen_units"}


@second_family
def test_pads_of_the_second_family_count(capsys, monkeypatch):
    """They stand in front of a shorter row, where nothing masks them."""
    padded = deepgen.padded
    monkeypatch.setattr(deepgen, "padded", lambda states, pad, longest: padded(states, torch.zeros_like(pad), longest))
    assert parity.main([str(DEEPGEN), "--json", "--case", "deepgen_t2i_cfg"]) == 1
    report = json.loads(capsys.readouterr().out)["cases"]["deepgen_t2i_cfg"]
    assert {"scb_in", "seq", "pooled", "noise_pred", "image", "image_uint8 (through the engine)"} <= {
        *report["failures"]
    }
    assert "input_ids" not in report["failures"]


@pytest.mark.parametrize("attention", ["sdpa", "int8-qk"])
def test_in_int8_every_error_stands_beside_that_of_float32(replay, copied, attention):
    folder = copied("edit", "units", "understand", "tokenizer")
    status, summary = replay(folder, "--quant", "int8", "--attn", attention)
    assert status == 0, missed(summary)
    assert summary["informative"] and summary["left_out"] == {"tokenizer": "no weights take part"}
    cases = {name: case["tensors"] for name, case in summary["cases"].items()}
    for case, name in (
        ("units", "llm.hidden_causal"),
        ("units", "head.out"),
        ("edit", "image"),
        ("understand", "logits"),
    ):
        assert (
            1e-3 < cases[case][name]["error"] < cases[case][name]["tolerance"] and cases[case][name]["float32"] < 1e-5
        )
    # what no int8 layer has touched: the rotated stream is turned back exactly
    assert cases["units"]["proj_in.y"]["error"] < 1e-6 and cases["units"]["proj_out.y"]["error"] < 1e-6
    assert cases["edit"]["step3.pred_mask"] == {"error": 0.0, "tolerance": 0.0, "passed": True, "float32": 0.0}
    assert cases["understand"]["generated_ids"]["tolerance"] is None


def scales_one_row_off(layer):
    layer.scale.copy_(layer.scale.roll(1))


def scales_twice_as_large(layer):
    layer.scale.mul_(2)


def one_column_in_four_lost(layer):
    layer.weight[:, ::4] = 0


@pytest.mark.parametrize("broken", [scales_one_row_off, scales_twice_as_large, one_column_in_four_lost])
def test_a_broken_quantisation_is_a_miss(replay, copied, monkeypatch, broken):
    load = Engine.from_pretrained

    def loaded(*args, **how):
        engine = load(*args, **how)
        for layer in engine.loaded.model.modules():
            if isinstance(layer, Int8Linear):
                broken(layer)
        return engine

    monkeypatch.setattr(Engine, "from_pretrained", loaded)
    status, summary = replay(copied("units"), "--quant", "int8")
    assert status == 1
    units = {"mar.native.enc", "mar.interp.z", "llm.hidden_causal", "head.out", "loop.cfg3.out"}
    assert units <= set(missed(summary)["units"])
    assert not {"proj_in.y", "proj_out.y", "vae.dec.image"} & set(missed(summary)["units"])


def test_a_corrupted_expectation_is_a_miss(replay, copied):
    flipped = {"edit": "step1.head_z", "understand": "logits", "units": "proj_in.y", "rope_real_size": "cos_upstream"}
    folder = copied(*flipped)
    for name, tensor in flipped.items():
        path = folder / "cases" / f"{name}.safetensors"
        tensors = load_file(path)
        tensors[tensor].view(-1)[7] += 0.01
        save_file(tensors, path)
    status, summary = replay(folder)
    assert status == 1
    assert missed(summary) == {name: [tensor] for name, tensor in flipped.items()}


def ignoring_temperature(sample):
    return lambda self, *args: sample(self, *args[:-1], 1.0)


def noise_off_by_one(sample):
    return lambda self, z, start, noise, *rest: sample(self, z, start, noise.roll(1, 0), *rest)


@pytest.mark.parametrize("broken", [ignoring_temperature, noise_off_by_one])
def test_a_broken_sampler_is_a_miss(replay, copied, monkeypatch, broken):
    monkeypatch.setattr(DiffusionHead, "sample", broken(DiffusionHead.sample))
    status, summary = replay(copied("edit"))
    assert status == 1
    assert {"step0.sampled", "tokens", "image"} <= set(summary["cases"]["edit"]["failures"])


def test_cases_are_told_by_their_content_not_their_names(replay, copied):
    folder = copied("edit", "tokenizer", "pre")
    cases = folder / "cases"
    settings = json.loads((cases / "edit.json").read_text())
    for old, new in (("edit.safetensors", "units.safetensors"), ("edit_source.png", "photo.png")):
        (cases / old).rename(cases / new)
    (cases / "edit.json").unlink()
    (cases / "units.json").write_text(json.dumps(settings | {"source": "photo.png"}))
    (cases / "tokenizer.json").rename(cases / "words.json")
    status, summary = replay(folder)
    assert status == 0
    assert {n: c["kind"] for n, c in summary["cases"].items()} == {
        "units": "image_edit",
        "words": "tokenizer",
        "preprocess": "preprocess",
    }


@pytest.mark.parametrize(
    ("guidance", "prompts", "shape"), [(1.0, ["a cat"], (5, 3)), (4.0, ["one", "two ", "3"], (2, 7))]
)
def test_other_sizes_seeds_and_settings(replay, tiny_release, tmp_path, monkeypatch, guidance, prompts, shape):
    monkeypatch.setenv("UNIPIC_RUN_CACHE", str(tmp_path / "cache"))
    case = recorded_by_us(tiny_release, tmp_path / "cases", guidance, prompts, shape)
    status, summary = replay(tmp_path)
    assert status == 0, missed(summary)
    assert {"tokens", "image", "step2.sampled", "step1.mask_in"} <= set(summary["cases"][case]["tensors"])


def recorded_by_us(checkpoint, folder, guidance, prompts, shape):
    """A case in the recorded layout from a run of this engine: what the bench reads, not what is right."""
    rows, columns = shape
    halves = 1 if guidance == 1.0 else 2
    settings = {"kind": "text2image_batch", "num_iter": 3, "cfg": guidance, "cfg_schedule": "constant"}
    settings |= {
        "temperature": 0.7,
        "image_shape": list(shape),
        "batch": len(prompts),
        "cfg_prompt": "Generate an image.",
    }
    template = "<|im_start|>user\nGenerate an image: {}<|im_end|>\n<|im_start|>assistant\n"
    unconditional = template.replace(": {}", ".")
    settings["formatted_prompts"] = [template.format(prompt) for prompt in prompts]
    settings["formatted_prompts"] += [unconditional] * (len(prompts) * (halves - 1))
    with Engine.from_pretrained(checkpoint, device="cpu", dtype="fp32") as engine:
        ids = [engine.loaded.tokens.encode(text) for text in settings["formatted_prompts"]]
        tensors = {"orders": torch.stack([PhiloxNoise(seed).order(rows * columns) for seed in range(len(prompts))])}
        counts = add_noise(tensors, rows * columns, len(prompts))
        _, watch = make_images(engine, Case("", folder, settings, tensors), len(prompts))
    padded = max(map(len, ids))
    tensors["input_ids"] = torch.tensor([row + [0] * (padded - len(row)) for row in ids])
    tensors["attention_mask"] = torch.arange(padded) < torch.tensor([[len(row)] for row in ids])
    tensors |= {"tokens": watch.batches[0].tokens, "image": torch.cat(watch.images)}
    for plan, seen in watch.batches[0].rounds:
        masked = torch.ones(len(prompts), rows * columns).scatter(1, plan.visible, 0)
        predicted = torch.zeros_like(masked).scatter(1, plan.predicted, 1)
        tensors |= {f"step{plan.index}.{name}": seen[name] for name in ("sampled", "position_ids", "llm_out", "head_z")}
        tensors[f"step{plan.index}.mask_in"] = masked.repeat(halves, 1)
        tensors[f"step{plan.index}.pred_mask"] = predicted.repeat(halves, 1)
    folder.mkdir(exist_ok=True)
    (folder / "mine.json").write_text(json.dumps(settings | {"num_tokens_predicted_per_iter": counts}))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "mine.safetensors")
    return "mine"


def add_noise(tensors, count, images):
    """Recorded noise of three rounds; returns the tokens each of them predicts."""
    counts = [count - int(count * 0.75**0.5), int(count * 0.75**0.5) - int(count * 0.5), int(count * 0.5)]
    generator = torch.Generator().manual_seed(1)
    for index, predicted in enumerate(counts):
        tensors[f"step{index}.noise_init"] = torch.randn(images * predicted, 16, generator=generator)
        tensors[f"step{index}.noise"] = torch.randn(100, images * predicted, 16, generator=generator)
    return counts


def test_what_nobody_accounts_for_is_a_miss(replay, copied):
    folder = copied("rope_real_size")
    path = folder / "cases" / "rope_real_size.safetensors"
    save_file(load_file(path) | {"tan": torch.ones(2)}, path)
    (folder / "cases" / "odd.json").write_text('{"kind": "text2song"}')
    status, summary = replay(folder)
    assert status == 1
    assert summary["cases"]["rope_real_size"]["failures"] == ["tan: recorded but neither compared nor explained"]
    assert "text2song" in summary["cases"]["odd"]["failures"][0]


@pytest.mark.parametrize("arguments", [[], ["--case", "other"]])
def test_no_case_is_a_miss(replay, copied, arguments):
    status, summary = replay(copied("rope_real_size") if arguments else copied(), *arguments)
    assert status == 1 and summary["cases"] == {} and not summary["passed"]


def script(path, *arguments, cwd):
    command = [sys.executable, str(path), *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120)


def test_runs_as_a_script_from_anywhere(goldens, tiny_release, tmp_path):
    done = script(
        ROOT / "bench" / "parity.py", goldens, "--checkpoint", tiny_release, "--case", "tokenizer", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    first, *_, last = done.stdout.splitlines()
    assert first.startswith("ok   tokenizer") and json.loads(last)["passed"]


def test_a_script_of_another_checkout_refuses(goldens, tmp_path):
    (tmp_path / "bench").mkdir()
    copy = Path(shutil.copy(ROOT / "bench" / "parity.py", tmp_path / "bench"))
    done = script(copy, goldens, cwd=tmp_path)
    assert done.returncode == 1 and str(tmp_path) in done.stderr and "pip install -e" in done.stderr
