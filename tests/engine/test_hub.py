"""Names to folders: a local server that speaks enough of the hub, prepared caches, and no network at all."""

import hashlib
import json
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlparse

import huggingface_hub.constants as hf
import pytest
from unipic_run.engine import families, hub
from unipic_run.engine.checkpoint import manifest
from unipic_run.engine.errors import CorruptWeightsError, ModelMissingError, UsageError

TINY = Path(__file__).parents[1] / "data" / "unipic-tiny"
REPO = "someone/tiny"
FIRST, SECOND = "a" * 40, "b" * 40


class FakeHub:
    """A repository on 127.0.0.1: files by name, branches, and the log of what was asked."""

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files, self.branches, self.log, self.ranges = files, {"main": FIRST}, [], []
        self.served = dict(files)  # what is really sent; tests spoil it
        self.cut = ""  # a file whose first answer stops half-way
        handler = type("Handler", (Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def entry(self, name: str) -> dict:
        data = self.files[name]
        git = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        large = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
        return {
            "size": len(data),
            "oid": git,
            "lfs": large if name.endswith((".bin", ".ckpt", ".safetensors")) else None,
        }


class Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        pass

    def answer(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command == "GET":
            cut = len(body) // 2 if self.hub.cut and self.path.endswith(self.hub.cut) else len(body)
            self.wfile.write(body[:cut])
            if cut < len(body):
                self.hub.cut = ""
                self.close_connection = True

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlparse(self.path).path)
        self.hub.log.append(f"{self.command} {path}")
        if path.startswith(f"/api/models/{REPO}/"):
            kind, revision = path.removeprefix(f"/api/models/{REPO}/").split("/", 1)
            commit = self.hub.branches.get(revision, revision if revision in self.hub.branches.values() else None)
            if commit is None:
                return self.answer(404, b"{}", X_Error_Code="RevisionNotFound")
            entries = {name: self.hub.entry(name) for name in self.hub.files}
            if kind == "tree":
                data = []
                for name, e in entries.items():
                    large = {**e["lfs"], "oid": e["lfs"]["sha256"]} if e["lfs"] else None
                    data.append({"type": "file", "path": name, "size": e["size"], "oid": e["oid"]})
                    data[-1] |= {"lfs": large} if large else {}
            else:
                siblings = [{"rfilename": n, "blobId": e["oid"], **e} for n, e in entries.items()]
                data = {"_id": "1", "id": REPO, "sha": commit, "siblings": siblings, "private": False, "tags": []}
            return self.answer(200, json.dumps(data).encode(), Content_Type="application/json")
        if path.startswith(f"/{REPO}/resolve/"):
            commit, name = path.removeprefix(f"/{REPO}/resolve/").split("/", 1)
            if name in self.hub.files:
                return self.send_file(commit, name)
        return self.answer(404, b"{}", X_Error_Code="RepoNotFound")

    def send_file(self, commit: str, name: str) -> None:
        entry, data = self.hub.entry(name), self.hub.served[name]
        etag = entry["lfs"]["sha256"] if entry["lfs"] else entry["oid"]
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if asked := self.headers.get("Range"):
            start = int(asked.removeprefix("bytes=").split("-")[0])
            if start:
                self.hub.ranges.append((name, start))
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
            return self.answer(206, data[start:], **headers)
        return self.answer(200, data, **headers)


@pytest.fixture
def server(monkeypatch, tmp_path):
    files = {path.relative_to(TINY).as_posix(): path.read_bytes() for path in TINY.rglob("*") if path.is_file()}
    unwanted = {"modeling.py": b"import os", "README.md": b"#", "siglip2-so400m/model.safetensors": b"x" * 9}
    unwanted |= {"Qwen2.5-1.5B-Instruct/model.safetensors": b"x" * 9, "Qwen2.5-1.5B-Instruct/pytorch_model.bin": b"x"}
    unwanted |= {"siglip2-so400m/config.json": b"{}"}
    fake = FakeHub(files | unwanted)
    fake.wanted, fake.unwanted = set(files), set(unwanted)
    monkeypatch.setenv("HF_ENDPOINT", fake.url)
    monkeypatch.setattr(hf, "HF_HUB_CACHE", str(tmp_path / "hf"))
    monkeypatch.setattr(hf, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    yield fake
    fake.close()


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("UNIPIC_RUN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def pin_of(cache):
    return json.loads((cache / "pins" / "someone--tiny.json").read_text())


def test_the_first_pull_pins_a_commit_and_the_hub_s_hashes(server, cache):
    said, progress = [], []
    folder = hub.resolve(REPO, say=said.append, on_progress=lambda *event: progress.append(event))
    assert folder == cache / "models" / f"someone--tiny@{FIRST[:12]}"
    pin = pin_of(cache)
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


def test_later_runs_need_no_network_and_stay_until_moved(server, cache):
    first = hub.resolve(REPO)
    server.branches["main"] = SECOND
    server.log.clear()
    assert hub.resolve(REPO) == first and hub.resolve(REPO, revision=FIRST) == first and server.log == []
    second = hub.resolve(REPO, revision="main")
    assert second.name.endswith(SECOND[:12]) and pin_of(cache)["commit"] == SECOND
    server.close()
    assert hub.resolve(REPO) == second
    assert hub.resolve(REPO, offline=True, revision="main") == second
    names = {row.name for row in hub.list_models() if row.path}
    assert names == {first.name, second.name}


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


def test_no_network_says_what_why_and_what_works(server, cache):
    local = hub.resolve(TINY)
    server.close()
    with pytest.raises(ModelMissingError) as caught:
        hub.resolve("unipic")
    said = str(caught.value)
    assert "Skywork/Skywork-UniPic-1.5B at main" in said and "Connect" in said and str(local) in said
    with pytest.raises(ModelMissingError, match="could not be had"):
        hub.resolve("unipic", offline=True)


def test_offline_never_asks(server, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ModelMissingError):
        hub.resolve(REPO)
    assert server.log == []


def test_offline_finds_what_another_tool_downloaded(server, cache):
    from huggingface_hub import snapshot_download

    snapshot_download(REPO, endpoint=server.url)
    server.close()
    folder = hub.resolve(REPO, offline=True)
    pin = pin_of(cache)
    assert pin["commit"] == FIRST and manifest.verify(folder)["source"]["hub"]["commit"] == FIRST
    assert pin["files"]["kl16.ckpt"]["sha256"] == server.entry("kl16.ckpt")["lfs"]["sha256"]


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


def test_a_released_folder_that_changed_is_converted_again(tmp_path):
    source = shutil.copytree(TINY, tmp_path / "source")
    before = hub.resolve(source)
    (source / "kl16.ckpt").touch()
    assert hub.resolve(source) != before


def test_names_that_are_none(tmp_path):
    for name in ("../x/y", "a/../../b", "..", "a/..", "nosuch", "/nosuch/folder", "a/b/c", "", "a/b\n", "https://x/y"):
        with pytest.raises(ModelMissingError):
            hub.resolve(name, offline=True)
    with pytest.raises(ModelMissingError, match="neither"):
        hub.resolve(tmp_path)
    with pytest.raises(UsageError, match="no revision"):
        hub.resolve(TINY, revision="main")


def test_known_families_are_listed_with_licence_and_note():
    (row,) = hub.list_models()
    assert row.path is None and row.source == "Skywork/Skywork-UniPic-1.5B"
    assert "MIT" in row.licence and "never run" in row.note
