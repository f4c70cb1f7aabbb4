"""A local server that speaks enough of the hub, and caches of the test's own."""

import hashlib
import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlparse

import huggingface_hub.constants as hf
import pytest

TINY = Path(__file__).parents[2] / "data" / "unipic-tiny"
REPO = "someone/tiny"
FIRST = "a" * 40


class FakeHub:
    """A repository on 127.0.0.1: files by name, branches, and the log of what was asked."""

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files, self.branches, self.log, self.ranges = files, {"main": FIRST}, [], []
        self.served = dict(files)  # what is really sent; tests spoil it
        self.refusal = None  # (status, error code) of every answer
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
        if self.hub.refusal:
            return self.answer(self.hub.refusal[0], b"{}", X_Error_Code=self.hub.refusal[1])
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


@pytest.fixture
def pin_of(cache) -> Callable[[], dict]:
    """Reads the pin of the repository."""
    return lambda: json.loads((cache / "pins" / "someone--tiny.json").read_text())
