"""Output names: what a prompt may not do to the file system."""

from pathlib import Path

import pytest
from unipic_run.engine.errors import UsageError
from unipic_run.engine.naming import DEFAULT_TEMPLATE, MAX_NAME_BYTES, expand_template, free_path, safe_text

SETTINGS = {"prompt": "A red fox,  in snow!", "seed": 7, "guidance": 3.0, "model": "unipic"}


@pytest.mark.parametrize(
    ("template", "name"),
    [
        (DEFAULT_TEMPLATE, "A_red_fox,_in_snow!-7.png"),
        ("out/{prompt:.5}-{index:03}.png", "out/A_red-004.png"),
        ("{guidance:.2f}_{{x}}_{model}.png", "3.00_{x}_unipic.png"),
        ("/tmp/../{seed}.png", "/tmp/../7.png"),  # the user's own folders stand
    ],
)
def test_templates(template, name):
    assert expand_template(template, SETTINGS, index=4) == Path(name)


@pytest.mark.parametrize(
    "prompt",
    [
        "../../etc/passwd",
        "/etc/passwd",
        "..",
        ".",
        "C:\\Windows\\x",
        "a\0b\nc\x1b[2J",
        "~root",
        "-rf",
        "",
        "???",
        "\u202egnp",
    ],
)
def test_a_prompt_stays_one_harmless_name(prompt):
    path = expand_template("{prompt}.png", {"prompt": prompt})
    assert path.name == str(path) and path.suffix == ".png"
    assert not set(path.name) & set('/\\:*?"<>|\0\n\x1b\u202e') and path.name[0] not in ".-"


@pytest.mark.parametrize("name", ["con", "NUL", "com1", "LPT9"])
def test_device_names_of_windows_are_avoided(name):
    assert expand_template("{prompt}.png", {"prompt": name}).name == f"_{name}.png"
    assert expand_template("{prompt}.png", {"prompt": f"{name}cert"}).name == f"{name}cert.png"


def test_a_long_prompt_fits_the_file_system():
    name = expand_template("{prompt}.png", {"prompt": "狐" * 100_000}).name
    assert name.endswith(".png") and MAX_NAME_BYTES - 4 < len(name.encode()) <= MAX_NAME_BYTES


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{promt}.png", "unknown field 'promt': known are guidance, index, model, prompt, seed"),
        ("{prompt.__class__}.png", "unknown field"),
        ("{prompt[0]}.png", "unknown field"),
        ("{}.png", "unknown field ''"),
        ("{prompt!r}.png", "unknown way"),
        ("{seed:999999999}.png", "unknown way"),
        ("{prompt:{seed}}.png", "unknown way"),
        ("{prompt:03d}.png", "cannot show prompt"),
        ("{prompt.png", "malformed"),
    ],
)
def test_bad_templates_are_typed_errors(template, message):
    with pytest.raises(UsageError, match=message.replace("[", r"\[")):
        expand_template(template, SETTINGS)


def test_the_next_free_name(tmp_path):
    path = tmp_path / "a.png"
    assert free_path(path) == path
    path.touch()
    (tmp_path / "a-2.png").symlink_to(tmp_path / "nowhere")  # taken, though it leads nowhere
    assert free_path(path) == tmp_path / "a-3.png"
    assert free_path(path, frozenset({tmp_path / "a-3.png"})) == tmp_path / "a-4.png"


def test_ordinary_text_stays_readable():
    assert safe_text("Ein Fuchs (rot) & Schnee 狐") == "Ein_Fuchs_(rot)_&_Schnee_狐"
