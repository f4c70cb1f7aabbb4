"""Pulling from the hub: pins, hashes, resuming, repairs."""

import huggingface_hub.constants as hf
import pytest
from unipic_run.engine import hub
from unipic_run.engine.checkpoint import manifest
from unipic_run.engine.errors import CorruptWeightsError, ModelMissingError

REPO = "someone/tiny"
FIRST, SECOND = "a" * 40, "b" * 40


def test_the_first_pull_pins_a_commit_and_the_hub_s_hashes(server, cache, pin_of):
    said, progress = [], []
    folder = hub.resolve(REPO, say=said.append, on_progress=lambda *event: progress.append(event))
    assert folder == cache / "models" / f"someone--tiny@{FIRST[:12]}"
    pin = pin_of()
    assert (pin["repo"], pin["revision"], pin["commit"]) == (REPO, "main", FIRST)
    assert set(pin["files"]) == server.wanted
    for name, entry in pin["files"].items():
        truth = server.entry(name)
        assert entry["size"] == truth["size"]
        assert entry.get("sha256") == (truth["lfs"] or {}).get("sha256")
    assert manifest.verify(folder)["source"]["hub"] == pin
    asked = {line.split("/resolve/")[1].split("/", 1)[1] for line in server.log if "/resolve/" in line}
    assert asked == server.wanted  # no code, no unused towers
    assert "someone/tiny" in said[0] and "licence" in said[0] and "never run" in said[0]
    assert {what for what, *_ in progress} == {"download", "convert", "hash"}
    assert max(done for what, done, _ in progress if what == "download") > 8e6


def test_later_runs_need_no_network_and_stay_until_moved(server, pin_of):
    first = hub.resolve(REPO)
    server.branches["main"] = SECOND
    server.log.clear()
    assert hub.resolve(REPO) == first and hub.resolve(REPO, revision=FIRST) == first and server.log == []
    second = hub.resolve(REPO, revision="main")
    assert second.name.endswith(SECOND[:12]) and pin_of()["commit"] == SECOND
    server.close()
    assert hub.resolve(REPO) == second
    assert hub.resolve(REPO, offline=True, revision="main") == second
    names = {row.name for row in hub.list_models() if row.path}
    assert names == {"pocket", first.name, second.name}


def test_what_the_repository_does_not_hold_is_said_with_its_remedy(server, monkeypatch):
    """As of UniPic-2 MetaQuery, whose language model comes apart."""

    whole, asked = hub._Job.convert, []

    def convert(self, src, *given):
        asked.append(src / "vlm")
        if not asked[-1].is_dir():
            raise ModelMissingError(f"{asked[-1]} holds no safetensors", "download its vlm into that folder")
        whole(self, src, *given)

    monkeypatch.setattr(hub._Job, "convert", convert)
    with pytest.raises(ModelMissingError, match=r"incomplete: .*vlm holds no.*download its vlm into that folder, or"):
        hub.resolve(REPO)
    asked[-1].mkdir()
    assert hub.resolve(REPO).is_dir(), "the next pull goes on from there"


def test_wrong_bytes_of_the_right_size_are_refused_and_removed(server, cache):
    good = server.files["kl16.ckpt"]
    server.served["kl16.ckpt"] = good[:-1] + bytes([good[-1] ^ 1])
    with pytest.raises(CorruptWeightsError, match=r"kl16\.ckpt .* not what the hub announced"):
        hub.resolve(REPO)
    assert not cache.exists() or not [*cache.rglob("*")]  # no pin, no folder
    server.served["kl16.ckpt"] = good
    assert hub.resolve(REPO).is_dir()


def test_a_broken_download_resumes(server, monkeypatch):
    monkeypatch.setattr(hf, "DOWNLOAD_CHUNK_SIZE", 2**20)  # less is never on disk when a connection breaks
    server.cut = "kl16.ckpt"
    assert hub.resolve(REPO).is_dir()
    assert server.ranges and server.ranges[0][0] == "kl16.ckpt" and server.ranges[0][1] > 0


def test_a_commit_or_file_name_that_is_none_never_becomes_a_path(server, cache):
    for commit in ("../../../etc", "main", "A" * 40, ""):
        server.branches["main"] = commit
        with pytest.raises((CorruptWeightsError, ModelMissingError)):
            hub.resolve(REPO)
    server.branches["main"] = FIRST
    server.files["../../pytorch_model.bin"] = b"x"
    with pytest.raises(CorruptWeightsError, match="hub answered"):
        hub.resolve(REPO)
    assert not cache.exists()


def test_repositories_that_do_not_help(server):
    with pytest.raises(ModelMissingError, match="nobody/nothing at main"):
        hub.resolve("nobody/nothing")
    with pytest.raises(ModelMissingError, match="nosuchbranch"):
        hub.resolve(REPO, revision="nosuchbranch")
    for name in [name for name in server.files if name.endswith("pytorch_model.bin")]:
        del server.files[name]
    with pytest.raises(ModelMissingError, match=r"no pytorch_model\.bin"):
        hub.resolve(REPO)


def test_a_pull_repairs_a_flipped_bit_of_a_hub_model(server):
    folder = hub.resolve(REPO)
    weights = folder / "model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    server.log.clear()
    assert hub.pull(REPO).path == folder
    manifest.verify(folder)
    assert not [line for line in server.log if "/resolve/" in line]  # the hub's own cache still has the files
