"""DeepGen's configuration: the released sizes, and what no model can be built from is refused with value and rule."""

import copy
import json
import math
from functools import reduce

import pytest
import torch
from unipic_run.engine import families
from unipic_run.engine.checkpoint.config_file import write_config_file
from unipic_run.engine.errors import CorruptWeightsError
from unipic_run.engine.models.deepgen.config import BOUNDS, CHECKS, RELEASED, DeepGenConfig

GOOD = json.loads(json.dumps(RELEASED.to_json()))


def changed(path, value):
    data = copy.deepcopy(GOOD)
    *parts, name = path.split(".")
    reduce(dict.__getitem__, parts, data)[name] = value
    return data


def test_the_released_configuration_comes_back():
    assert DeepGenConfig.from_json(GOOD) == RELEASED
    assert DeepGenConfig.from_json(changed("llm.rope_theta", 1000000)) == RELEASED


def test_the_released_sizes_are_those_of_the_published_files():
    """Parameters as counted in the headers of the original files, plus what is padded, less what is cut off."""
    with torch.device("meta"):
        model = families.model("deepgen").build(RELEASED)
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}
    assert counts["embed"] + counts["llm"] == 3_085_938_688
    assert counts["vision"] == 668_684_288 + 32 * (3456 - 3420) * (2 * (1280 + 1) + 1280)
    assert counts["connector"] == 432_449_532 + 6 * (12032 - 11946) * (2048 + 1 + 2048)
    assert counts["dit"] + counts["modulation"] == 2_243_171_520 + 128 * 128 * 1536
    modulation = sum(p.numel() for name, p in model.modulation.named_parameters() if "embed" not in name)
    assert modulation == 767_270_400
    assert (counts["vae_encoder"], counts["vae_decoder"]) == (34_274_208, 49_545_475)


def test_every_field_has_bounds():
    leaves = {f"{part}.{name}" for part, values in GOOD.items() if type(values) is dict for name in values}
    leaves |= {name for name, value in GOOD.items() if type(value) is not dict}
    assert leaves == set(BOUNDS)


@pytest.mark.parametrize("path", sorted(BOUNDS))
def test_no_field_takes_another_type_or_nonsense(path):
    for value in (None, "3", True, {}, math.nan, math.inf, 10**400, [], ["3"], [3] * 300, [-1] * 3, -1e9):
        if value != [] or path != "vision.full":
            with pytest.raises(ValueError, match=path):
                DeepGenConfig.from_json(changed(path, value))


@pytest.mark.parametrize(
    ("path", "value", "rule"),
    [
        ("llm.heads", 8, "llm.width is 2048, which is not equal to llm.heads x llm.head_dim, 1024"),
        ("mrope", [16, 24, 25], "llm.head_dim is 128, which is not twice the sum of mrope, (16, 24, 25)"),
        ("mrope", [64], "not a list of 3 numbers"),
        ("vision.heads", 100, "vision.width is 1280, which is not a multiple of vision.heads x 4, 400"),
        ("vision.full", [7, 32], "vision.full is (7, 32), which is not below vision.depth, 32"),
        ("vision.full", [1.5], "vision.full is 1.5, which is not a whole number"),
        ("vision.window", 100, "not a multiple of vision.patch x vision.merge, 28"),
        ("vision.mlp", 3420, "vision.mlp is 3420, which is not a multiple of 16"),
        ("vision.out", 1024, "not equal to llm.width, 2048"),
        ("connector.mlp", 11946, "connector.mlp is 11946, which is not a multiple of 16"),
        ("connector.taps", 37, "not at most llm.layers, 36"),
        ("connector.text", 2048, "not equal to dit.text, 4096"),
        ("dit.dual", 25, "not at most dit.depth, 24"),
        ("dit.patch", 4, "dit.patch is 4, which is not equal to 2"),
        ("dit.channels", 8, "not equal to vae.latent, 16"),
        ("vae.blocks", 0, "vae.blocks is 0"),
        ("vae.multipliers", [1, 2, 4], "not a list of 4 numbers"),
        ("pad_token", 151936, "not below llm.vocab, 151936"),
        ("resolution", 500, "not a multiple of 16"),
        ("surprise", 1, "surprise"),
    ],
)
def test_a_bad_value_is_a_damaged_folder_with_value_and_rule(tmp_path, path, value, rule):
    write_config_file(tmp_path, "deepgen", changed(path, value))
    with pytest.raises(CorruptWeightsError) as caught:
        families.read(tmp_path)
    assert rule in caught.value.what and "convert it again" in caught.value.remedy


def test_a_model_without_taps_is_that_of_queries_alone():
    """As the conditioner of UniPic-2 has it."""
    assert DeepGenConfig.from_json(changed("connector.taps", 0)).connector.taps == 0
    assert CHECKS.number("vae_shift", 0) == 0.0
