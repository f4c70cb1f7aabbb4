"""The configuration in a converted folder: what no model can be built from is refused with value and rule."""

import copy
import json
import math
from functools import reduce

import pytest
from unipic_run.engine import families
from unipic_run.engine.checkpoint.config_file import write_config_file
from unipic_run.engine.errors import CorruptWeightsError
from unipic_run.engine.models.unipic.config import BOUNDS, UniPicConfig
from unipic_run.engine.models.unipic.released import Released


@pytest.fixture(scope="module")
def good(tiny_release):
    with Released(tiny_release) as checkpoint:
        return json.loads(json.dumps(checkpoint.config.to_json()))


def changed(good, path, value):
    data = copy.deepcopy(good)
    *parts, name = path.split(".")
    reduce(dict.__getitem__, parts, data)[name] = value
    return data


def test_every_field_has_bounds(good):
    leaves = {f"{part}.{name}" for part, values in good.items() if type(values) is dict for name in values}
    leaves |= {name for name, value in good.items() if type(value) is not dict}
    assert leaves - {"round_inv_freq"} == set(BOUNDS)


def test_whole_numbers_do_for_fractions(good):
    config = UniPicConfig.from_json(changed(good, "llm.rope_theta", 1000000))
    assert type(config.llm.rope_theta) is float and UniPicConfig.from_json(config.to_json()) == config


@pytest.mark.parametrize("path", sorted(BOUNDS))
def test_no_field_takes_another_type_or_nonsense(good, path):
    for value in (None, "3", True, [3], {}, -1, -1.0, math.nan, math.inf, 10**400):
        with pytest.raises(ValueError, match=path):
            UniPicConfig.from_json(changed(good, path, value))


@pytest.mark.parametrize(
    ("path", "value", "rule"),
    [
        ("llm.layers", "3", "llm.layers is '3', which is not a whole number from 1 to 256"),
        ("llm.layers", 10**6, "llm.layers is 1000000"),
        ("llm.rope_theta", 0, "llm.rope_theta is 0"),
        ("llm.kv_heads", 3, "llm.heads is 4, which is not a multiple of llm.kv_heads, 3"),
        ("llm.heads", 8, "llm.width is 64, which is not equal to llm.heads x llm.head_dim, 128"),
        ("mar.heads", 5, "mar.width is 64, which is not a multiple of mar.heads, 5"),
        ("head.steps", 0, "head.steps is 0"),
        ("head.steps", 1001, "head.steps is 1001, which is not at most head.train_steps, 1000"),
        ("head.max_beta", 1.0, "head.max_beta is 1.0"),
        ("head.channels", 8, "not equal to mar.channels, 16"),
        ("vae.base", 48, "vae.base is 48, which is not a multiple of vae.groups, 32"),
        ("vae.multipliers", [], "not a list of 5 numbers"),
        ("vae.multipliers", [1, 1, 2, 2, 0], "vae.multipliers is 0"),
        ("vae_scale", 0.0, "vae_scale is 0.0"),
        ("image_token", 448, "not below llm.vocab, 448"),
        ("round_inv_freq", 1, "not true or false"),
        ("resolution", 100, "not a multiple of 16"),
        ("rounds", 0, "rounds is 0"),
        ("surprise", 1, "surprise"),
        ("llm", [], "llm has"),
    ],
)
def test_a_bad_value_is_a_damaged_folder_with_value_and_rule(good, tmp_path, path, value, rule):
    write_config_file(tmp_path, "unipic", changed(good, path, value))
    with pytest.raises(CorruptWeightsError) as caught:
        families.read(tmp_path)
    assert rule in caught.value.what and "convert it again" in caught.value.remedy


def test_a_missing_field_is_told(good, tmp_path):
    for data in ({}, {name: value for name, value in good.items() if name != "vae"}):
        write_config_file(tmp_path, "unipic", data)
        with pytest.raises(CorruptWeightsError, match=r"not the fields .*'vae'"):
            families.read(tmp_path)
