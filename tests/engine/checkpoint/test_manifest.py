"""Folders are whole or absent, and a changed byte is found."""

import json
from pathlib import Path

import pytest
from unipic_run.engine.checkpoint import manifest
from unipic_run.engine.errors import CorruptWeightsError, ModelMissingError, OutputError


@pytest.fixture
def folder(tmp_path):
    with manifest.publishing(tmp_path / "made", {"why": "test"}) as partial:
        (partial / "a.bin").write_bytes(bytes(1000))
        (partial / "b.txt").write_text("text")
    return tmp_path / "made"


def test_verify_finds_any_changed_byte(folder):
    assert manifest.verify(folder)["source"] == {"why": "test"}
    for at in (0, 500, 999):
        with (folder / "a.bin").open("r+b") as file:
            file.seek(at)
            file.write(b"\x01")
        manifest.check(folder)  # sizes are all that the quick look sees
        with pytest.raises(CorruptWeightsError, match=r"a\.bin has changed"):
            manifest.verify(folder)
        (folder / "a.bin").write_bytes(bytes(1000))


def test_check_finds_missing_and_resized_files(folder):
    (folder / "b.txt").write_text("tex")
    with pytest.raises(CorruptWeightsError, match="3 bytes, not 4"):
        manifest.check(folder)
    (folder / "b.txt").unlink()
    with pytest.raises(CorruptWeightsError, match="missing"):
        manifest.check(folder)


def test_a_damaged_or_hostile_manifest(folder):
    good = json.loads((folder / "manifest.json").read_text())
    entry = good["files"]["a.bin"]
    for bad in (
        "",
        "[]",
        "[" * 100_000,
        json.dumps({**good, "format": 2}),
        json.dumps({**good, "source": "nowhere"}),
        json.dumps({**good, "files": {"../../etc/passwd": entry}}),
        json.dumps({**good, "files": {"/etc/passwd": entry}}),
        json.dumps({**good, "files": {"a.bin": {"size": "1000", "sha256": "x"}}}),
        json.dumps({**good, "files": {"a.bin": {"size": 1000}}}),
        json.dumps({**good, "files": ["a.bin"]}),
    ):
        (folder / "manifest.json").write_text(bad)
        with pytest.raises(CorruptWeightsError):
            manifest.check(folder)
    (folder / "manifest.json").unlink()
    with pytest.raises(ModelMissingError):
        manifest.check(folder)


def test_an_error_while_filling_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError), manifest.publishing(tmp_path / "made", {}) as partial:
        (partial / "a").write_text("a")
        raise RuntimeError
    assert [*tmp_path.iterdir()] == []


def test_a_folder_that_appears_meanwhile_is_kept(tmp_path):
    with pytest.raises(OutputError, match="appeared"), manifest.publishing(tmp_path / "made", {}) as partial:
        (partial / "a").write_text("a")
        (tmp_path / "made").mkdir()
        (tmp_path / "made" / "mine").write_text("mine")
    assert [path.name for path in tmp_path.rglob("*")] == ["made", "mine"]


def test_a_place_that_cannot_be_written_says_which_variable_names_it(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(OutputError, match=r"cannot write into .*UNIPIC_RUN_CACHE"),
        manifest.locked(tmp_path / "file/a"),
    ):
        pass


def test_the_lock_removes_what_killed_processes_left(tmp_path):
    dst = tmp_path / "na[m]e"
    for name in ("na[m]e.partial-1", "na[m]e.partial-2", "other.partial-1"):
        (tmp_path / name).mkdir()
    with manifest.locked(dst):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["other.partial-1"]


def test_a_swap_that_was_cut_short_is_undone(folder):
    """A kill between the two renames: the old folder has gone aside, the new one has not come."""
    folder.rename(folder.with_name("made.partial-1.old"))
    folder.with_name("made.partial-1").mkdir()
    with manifest.locked(folder):
        assert manifest.verify(folder)["source"] == {"why": "test"}
        assert [path.name for path in folder.parent.iterdir() if path.name[0] != "."] == ["made"]


def test_a_folder_is_replaced_only_when_asked_and_put_back_when_that_fails(folder, monkeypatch):
    def make(replace):
        with manifest.publishing(folder, {"why": "new"}, replace=replace) as partial:
            (partial / "a").write_text("a")

    with pytest.raises(OutputError, match="appeared"):
        make(False)
    rename = Path.rename
    monkeypatch.setattr(
        Path,
        "rename",
        lambda self, to: (
            (_ for _ in ()).throw(PermissionError(13, "no"))
            if to == folder and not self.name.endswith(".old")
            else rename(self, to)
        ),
    )
    with pytest.raises(OutputError, match="cannot write"):
        make(True)
    assert manifest.verify(folder)["source"] == {"why": "test"}
    monkeypatch.undo()
    make(True)
    assert manifest.verify(folder)["source"] == {"why": "new"} and [*folder.parent.iterdir()] == [folder]


def test_small_files_are_replaced_in_one_step(tmp_path):
    path = tmp_path / "deep" / "pin.json"
    manifest.write_file(path, "one")
    manifest.write_file(path, "two")
    assert path.read_text() == "two" and len([*path.parent.iterdir()]) == 1
    with pytest.raises(OutputError):
        manifest.write_file(path / "below", "x")
