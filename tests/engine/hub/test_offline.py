"""No network, and caches that other tools filled: what is used, and why something cannot be had."""

import shutil
from pathlib import Path

import huggingface_hub.constants as hf
import pytest
from unipic_run.engine import hub
from unipic_run.engine.checkpoint import manifest
from unipic_run.engine.checkpoint.pickle_reader import TorchCheckpoint
from unipic_run.engine.errors import ModelMissingError

TINY = Path(__file__).parents[2] / "data" / "unipic-tiny"
REPO = "someone/tiny"
FIRST = "a" * 40


def test_no_network_says_what_why_and_what_works(server, cache):
    local = hub.resolve(TINY)
    server.close()
    with pytest.raises(ModelMissingError) as caught:
        hub.resolve("unipic")
    said = str(caught.value)
    assert "Skywork/Skywork-UniPic-1.5B at main" in said and "Connect" in said and str(local) in said
    with pytest.raises(ModelMissingError, match=r"could not be had .*switched off.*unipic-run pull Skywork"):
        hub.resolve("unipic", offline=True)


def test_offline_never_asks(server, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ModelMissingError):
        hub.resolve(REPO)
    assert server.log == []


def test_offline_finds_what_another_tool_downloaded(server, pin_of):
    from huggingface_hub import snapshot_download

    snapshot_download(REPO, endpoint=server.url)
    server.close()
    folder = hub.resolve(REPO, offline=True)
    pin = pin_of()
    assert pin["commit"] == FIRST and manifest.verify(folder)["source"]["hub"]["commit"] == FIRST
    assert pin["files"]["kl16.ckpt"]["sha256"] == server.entry("kl16.ckpt")["lfs"]["sha256"]


def test_our_own_words_say_why(server):
    with pytest.raises(ModelMissingError, match="the hub has no such model, or it is private"):
        hub.resolve("nobody/nothing")
    with pytest.raises(ModelMissingError, match="the hub has no such revision"):
        hub.resolve(REPO, revision="nosuchbranch")
    server.refusal = (401, "GatedRepo")
    with pytest.raises(ModelMissingError, match=r"asks for consent.*huggingface\.co/someone/tiny.*HF_TOKEN"):
        hub.resolve(REPO)
    server.refusal = (400, "")
    with pytest.raises(ModelMissingError, match="the hub answered with the error 400"):
        hub.resolve(REPO)


def test_an_offline_copy_without_weights_says_what_completes_it(server, cache):
    from huggingface_hub import snapshot_download

    snapshot_download(REPO, endpoint=server.url, allow_patterns=["*.json", "*.txt"])
    with pytest.raises(ModelMissingError, match=r"only a part of it.*unipic-run pull someone/tiny"):
        hub.resolve(REPO, offline=True)
    assert not (cache / "pins").exists()


def test_an_offline_copy_that_looks_whole_without_weights(server, cache):
    """Releases of huggingface_hub before 2.0 keep no list of what a snapshot should hold."""
    folder = Path(hf.HF_HUB_CACHE) / f"models--{REPO.replace('/', '--')}"
    shutil.copytree(TINY, folder / "snapshots" / FIRST, ignore=shutil.ignore_patterns("*.bin"))
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(FIRST)
    with pytest.raises(ModelMissingError, match=r"incomplete.*pytorch_model\.bin.*unipic-run pull someone/tiny"):
        hub.resolve(REPO, offline=True)
    assert not (cache / "pins").exists()


def without_hashes(server):
    """A hub cache as it is where links cannot be made: the files themselves in the snapshot."""
    from huggingface_hub import snapshot_download

    snapshot = Path(snapshot_download(REPO, endpoint=server.url))
    for path in [path for path in snapshot.rglob("*") if path.is_symlink()]:
        data = path.read_bytes()
        path.unlink()
        path.write_bytes(data)
    return snapshot


def test_a_pin_without_hashes_gets_them_once_the_hub_answers(server, pin_of):
    without_hashes(server)
    folder = hub.resolve(REPO, offline=True)
    assert pin_of()["files"] == {}
    before = (folder / "manifest.json").stat().st_mtime_ns
    server.refusal = (500, "")
    assert hub.resolve(REPO) == folder and pin_of()["files"] == {}  # it runs all the same
    server.refusal = None
    assert hub.resolve(REPO) == folder
    assert pin_of()["files"]["kl16.ckpt"]["sha256"] == server.entry("kl16.ckpt")["lfs"]["sha256"]
    assert pin_of()["revision"] == "main"
    assert (folder / "manifest.json").stat().st_mtime_ns == before  # the files were right


def test_files_that_turn_out_wrong_are_fetched_again(server):
    path = without_hashes(server) / "kl16.ckpt"
    good = path.read_bytes()
    with TorchCheckpoint(path) as checkpoint:
        at = checkpoint.records["quant_conv.bias"].offset
    path.write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
    folder = hub.resolve(REPO, offline=True)
    before = manifest.read(folder)["source"]["files"]
    assert hub.resolve(REPO) == folder
    assert manifest.verify(folder)["source"]["files"] != before and path.read_bytes() == good
