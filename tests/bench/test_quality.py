"""The pocket model's score: the shipped weights hold their baseline, and worse models and settings score lower."""

import json
from dataclasses import replace

import pytest
import torch
from PIL import Image
from unipic_run import Engine
from unipic_run.bench import quality
from unipic_run.engine import families
from unipic_run.engine.checkpoint import manifest
from unipic_run.engine.checkpoint.cache import PACKAGED
from unipic_run.pocket.exam import CATEGORIES, Outcome, answered, draw_exam, generations
from unipic_run.pocket.samples import SCORED
from unipic_run.pocket.train_joint import Joint, initialise

EXAM = draw_exam(8)
VISIBLY = 0.15


@pytest.fixture(scope="module")
def engine():
    with Engine.from_pretrained("pocket", device="cpu") as engine:
        yield engine


@pytest.fixture(scope="module")
def score(engine):
    return share(generations(engine, EXAM.samples, {}))


def share(outcomes):
    return sum(not outcome.faults for outcome in outcomes) / len(outcomes)


def test_the_quick_score_holds_its_baseline(capsys, tmp_path):
    assert quality.main(["--quick", "--json", "--device", "cpu", "--sheet", str(tmp_path / "sheet.png")]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert set(summary["scores"]) == {"generation", *CATEGORIES} and summary["each"] == quality.QUICK
    assert Image.open(tmp_path / "sheet.png").mode == "RGB"


def test_shuffled_prompts_score_lower(engine, score):
    """Each picture is made for the prompt of the next test."""
    samples = [
        replace(sample, prompt=other.prompt)
        for sample, other in zip(EXAM.samples, EXAM.samples[1:] + EXAM.samples[:1], strict=True)
    ]
    assert share(generations(engine, samples, {})) < score - VISIBLY


@pytest.mark.xfail(strict=True, reason="after 23 phases guidance gains 1.4 points (-2.1 to 5.6), not fifteen")
def test_no_guidance_scores_lower(engine, score):
    assert share(generations(engine, EXAM.samples, {"guidance": 1.0})) < score - VISIBLY


def test_an_untrained_model_scores_nothing(engine):
    joint = Joint(engine.config)
    initialise(joint, 0)
    joint.model.load_state_dict(
        {name: tensor for name, tensor in engine.loaded.model.state_dict().items() if name.startswith("vae_")},
        strict=False,
    )
    model = joint.model.requires_grad_(False).eval()
    with Engine(families.model("unipic"), model, engine.loaded.tokens, "untrained") as untrained:
        assert share(generations(untrained, EXAM.samples[::4], {"steps": 4})) == 0
        assert share(answered(untrained, EXAM.questions)) == 0


def test_a_shorter_exam_is_the_beginning_of_a_longer_one():
    long = [sample for sample in draw_exam(8).samples if sample.category == "binding"]
    short = [sample for sample in draw_exam(3).samples if sample.category == "binding"]
    assert [sample.prompt for sample in short] == [sample.prompt for sample in long[:3]]
    assert {sample.category for sample in EXAM.samples} == set(SCORED)


def test_a_score_says_of_which_weights_it_is(tiny_release, tmp_path):
    held = manifest.read(PACKAGED["pocket"])["files"]["model.safetensors"]["sha256"]
    assert quality.weights_of("pocket") == quality.weights_of(str(PACKAGED["pocket"])) == held[:12]
    assert quality.weights_of(str(tiny_release)) is quality.weights_of("somebody/model") is None


def test_wilson_intervals():
    """Against the table of Newcombe 1998, method 3."""
    assert quality.wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert quality.wilson(15, 148) == pytest.approx((0.0624, 0.1605), abs=5e-5)
    assert quality.wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)
    assert quality.wilson(1, 29) == pytest.approx((0.0061, 0.1718), abs=5e-5)


def test_a_fallen_score_is_named_and_fails():
    def outcomes(right):
        picture = Image.new("RGB", (128, 128))
        return [Outcome(c, "", () if i < right else ("wrong",), (picture,)) for c in CATEGORIES for i in range(10)]

    baseline = quality.scored(outcomes(9))
    assert quality.fallen(quality.scored(outcomes(8)), baseline) == []
    failures = quality.fallen(quality.scored(outcomes(3)), baseline)
    assert len(failures) == len(baseline) and "0.30, the baseline has 0.90" in failures[0]
    assert torch.tensor([score["share"] for score in baseline.values()]).allclose(torch.tensor(0.9))
