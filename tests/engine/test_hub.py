"""Names to folders: what is on this machine. Downloads are tested in hub/."""

import shutil
from pathlib import Path

import pytest
import torch
from unipic_run.engine import families, hub
from unipic_run.engine.checkpoint import manifest
from unipic_run.engine.errors import CorruptWeightsError, ModelMissingError, UsageError

TINY = Path(__file__).parents[1] / "data" / "unipic-tiny"


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("UNIPIC_RUN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def flip(folder):
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_folders(cache, tmp_path):
    said = []
    converted = hub.resolve(TINY, say=said.append)
    assert converted.parent == cache / "models" and "once" in said[0]
    assert hub.resolve(str(TINY), say=said.append) == converted and len(said) == 1
    assert hub.resolve(converted) == converted
    moved = shutil.copytree(converted, tmp_path / "mine")
    assert hub.resolve(moved) == moved
    row = hub.describe(moved)
    assert (row.family, row.source) == ("unipic", str(TINY)) and row.nbytes > 1e7 and row.licence.startswith("if these")
    family, config = families.read(moved)
    assert family.name == "unipic" and config.resolution == 128
    (converted / "tokenizer.json").write_text("damaged")
    assert hub.resolve(TINY, say=said.append) == converted and "removed" in said[1]
    manifest.verify(converted)


def test_a_released_folder_that_changed_is_converted_again_in_its_place(cache, tmp_path):
    source = shutil.copytree(TINY, tmp_path / "source")
    folder, said = hub.resolve(source), []
    before = manifest.read(folder)
    (source / "kl16.ckpt").touch()
    assert hub.resolve(source, say=said.append) == folder and "has changed" in said[0]
    assert manifest.verify(folder)["source"] != before["source"]
    assert [path for path in (cache / "models").iterdir() if path.name[0] != "."] == [folder]
    assert hub.resolve(source, say=said.append) == folder and len(said) == 1


def test_a_pull_repairs_a_flipped_bit_of_a_local_model(cache):
    folder, said = hub.resolve(TINY), []
    flip(folder)
    hub.resolve(TINY)  # the quick look sees sizes only
    assert hub.pull(str(TINY), say=said.append).path == folder
    assert "checking every file" in said[0] and "model.safetensors has changed" in said[1]
    manifest.verify(folder)
    before = (folder / "manifest.json").stat().st_mtime_ns
    assert hub.pull(str(TINY)).path == folder and (folder / "manifest.json").stat().st_mtime_ns == before
    assert [path for path in (cache / "models").iterdir() if path.name[0] != "."] == [folder]


def test_a_pull_of_a_damaged_folder_that_is_not_ours_says_what_helps(tmp_path):
    mine = shutil.copytree(hub.resolve(TINY), tmp_path / "mine")
    flip(mine)
    with pytest.raises(CorruptWeightsError, match=r"has changed.*convert it again"):
        hub.pull(str(mine))


def test_extra_tensors_are_told_in_one_sentence(tmp_path):
    source, said = shutil.copytree(TINY, tmp_path / "source"), []
    state = torch.load(source / "pytorch_model.bin", weights_only=True)
    torch.save(state | {"mar.surprise": torch.zeros(1)}, source / "pytorch_model.bin")
    hub.resolve(source, say=said.append)
    assert len(said) == 2 and "left out" in said[1] and "mar.surprise" in said[1]


def test_at_most_three_models_are_offered(cache):
    first = hub.resolve(TINY)
    for i in range(4):
        shutil.copytree(first, first.with_name(f"other{i}"))
    said = hub.works_now()
    assert "pocket" in said and said.count(str(cache)) == 2 and "and 3 more (`unipic-run list`)" in said


def test_names_that_are_none(tmp_path):
    for name in ("../x/y", "a/../../b", "..", "a/..", "nosuch", "/nosuch/folder", "a/b/c", "", "a/b\n", "https://x/y"):
        with pytest.raises(ModelMissingError):
            hub.resolve(name, offline=True)
    with pytest.raises(ModelMissingError, match=r"neither manifest\.json.*pytorch_model\.bin \(unipic\); the folders"):
        hub.resolve(tmp_path)
    with pytest.raises(UsageError, match="no revision"):
        hub.resolve(TINY, revision="main")


def test_known_families_are_listed_with_licence_and_note():
    pocket, *others = hub.list_models()
    assert pocket.name == "pocket" and pocket.path is not None and pocket.licence.startswith("Apache-2.0")
    rows = {row.name: row for row in others}
    assert [*rows] == [*families.FAMILIES] and all(row.path is None and "never run" in row.note for row in others)
    assert rows["unipic"].source == "Skywork/Skywork-UniPic-1.5B" and "MIT" in rows["unipic"].licence
    assert rows["deepgen"].source == "deepgenteam/DeepGen-1.0-diffusers"
    assert "no commercial use" in rows["deepgen"].licence and "Stability" in rows["deepgen"].licence
