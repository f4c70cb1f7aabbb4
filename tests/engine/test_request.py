"""Bad requests get a typed error that says value, rule and remedy; nothing is computed."""

import re
from typing import Any

import numpy as np
import pytest
from PIL import Image
from unipic_run.engine.checks import check_size
from unipic_run.engine.errors import UnipicError, UsageError
from unipic_run.engine.request import AskRequest, EditRequest, GenerateRequest
from unipic_run.engine.sampling import MAX_SEED, Sampling, as_sampling

IMAGE = Image.new("RGB", (32, 32))


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ((0, 64), "width 0 is out of range: use 16 to 16384"),
        ((7, 64), "width 7 is out of range: use 16 to 16384"),
        ((64, 1000), "height 1000 is not a multiple of 16: use 992 or 1008"),
        ((10**6, 64), "width 1000000 is out of range"),
        ((64.0, 64), "width 64.0 is not a whole number"),
        ((True, 64), "width True is not a whole number"),
    ],
)
def test_sizes(size: tuple[Any, Any], message: str) -> None:
    with pytest.raises(UsageError, match=re.escape(message)):
        check_size(*size)


@pytest.mark.parametrize(
    "options",
    [
        {"seed": -1},
        {"seed": MAX_SEED + 1},
        {"n": 0},
        {"n": 10**6},
        {"steps": 0},
        {"guidance": float("nan")},
        {"guidance": "3"},
        {"guidance": 10**400},
        {"temperature": -0.1},
        {"cfg_schedule": "cosine"},
        {"order": "raster"},
        {"solver": "heun"},
        {"cfg_cache": 0.9},
        {"head_steps": (50, 1)},
        {"head_steps": (50,)},
        {"head_steps": 50},
        {"head_steps": (50.0, 5)},
        {"cfg_interval": (0.0, 1.5)},
        {"cfg_interval": (0.5, 0.5)},
        {"cfg_interval": 0.5},
        {"block_cache": -0.1},
        {"block_cache": 1.5},
        {"block_cache": "0.1"},
        {"negative": "  "},
        {"negative": False},
        {"batch_size": 0},
        {"preview_every": -1},
    ],
)
def test_sampling_options(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        Sampling(**{"seed": 1, **options})


def test_guidance_and_temperature_of_zero_are_kept() -> None:
    sampling = Sampling(seed=0, guidance=0.0, temperature=0.0)
    assert sampling.guidance == 0.0 and sampling.temperature == 0.0


def test_pairs_come_as_any_sequence_and_are_kept_as_tuples() -> None:
    sampling = Sampling(seed=0, head_steps=[50, 5], cfg_interval=[0, 1])
    assert sampling.head_steps == (50, 5) and sampling.cfg_interval == (0.0, 1.0)


def test_numbers_of_numpy_are_kept_as_pythons() -> None:
    how = {"steps": np.int32(4), "guidance": np.float32(3), "cfg_cache": np.float32(2), "head_steps": np.array([9, 5])}
    sampling = as_sampling(1, how | {"cfg_interval": np.array([0, 0.5])})
    kept = sampling.steps, sampling.guidance, sampling.cfg_cache, sampling.head_steps, sampling.cfg_interval
    assert kept == (4, 3.0, 2.0, (9, 5), (0.0, 0.5))
    assert [type(number) for number in (*kept[:3], *kept[3], *kept[4])] == [int, float, float, int, int, float, float]
    assert Sampling(seed=0, guidance=np.float32(3)).guidance == 3.0
    with pytest.raises(UsageError, match="guidance nan is not a number"):
        as_sampling(1, {"guidance": np.float32("nan")})


def test_unknown_options_are_errors() -> None:
    with pytest.raises(UsageError, match="option 'stepz' is unknown: known are seed, n, steps"):
        as_sampling(1, {"stepz": 3})


def test_a_seed_is_drawn_when_none_is_given() -> None:
    assert as_sampling(None, {}).seed != as_sampling(None, {}).seed


@pytest.mark.parametrize("prompts", [(), ("",), (" \n",), ("ok", ""), (3,)])
def test_prompts(prompts: tuple[Any, ...]) -> None:
    with pytest.raises(UsageError):
        GenerateRequest(prompts, (64, 64), Sampling(seed=1))
    with pytest.raises(UsageError):
        EditRequest(IMAGE, prompts, Sampling(seed=1), res=64)


@pytest.mark.parametrize("outpaint", [(0, 0, 0, 0), (1, 2, 3), (-1, 0, 0, 0), (10**6, 0, 0, 0)])
def test_outpaint(outpaint: tuple[int, ...]) -> None:
    with pytest.raises(UsageError):
        EditRequest(IMAGE, ("x",), Sampling(seed=1), res=64, outpaint=outpaint)


def test_mask_and_outpaint_exclude_each_other() -> None:
    with pytest.raises(UsageError, match="both a mask and outpaint"):
        EditRequest(IMAGE, ("x",), Sampling(seed=1), res=64, mask=IMAGE, outpaint=(1, 0, 0, 0))


@pytest.mark.parametrize(
    "options", [{"question": ""}, {"max_new_tokens": 0}, {"temperature": float("inf")}, {"top_p": 0.0}, {"top_p": 1.1}]
)
def test_questions(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        AskRequest(**{"question": "what?", "res": 64, **options})


def test_every_error_has_a_code_and_the_documented_exit_code() -> None:
    kinds = UnipicError.__subclasses__() + UsageError.__subclasses__()
    codes = {kind.code: kind.exit_code for kind in kinds}
    assert codes == {
        "usage": 2,
        "image": 2,
        "output": 2,
        "memory": 3,
        "model-missing": 4,
        "corrupt-weights": 5,
        "device": 6,
        "cancelled": 130,
    }
