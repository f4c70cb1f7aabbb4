"""Pulling a repository of the other family: it is known by its files, and no more of it is fetched than is used."""

from pathlib import Path

import pytest
from huggingface_hub import snapshot_download
from unipic_run.engine import families, hub
from unipic_run.engine.checkpoint import manifest

UNWANTED = ("deepgen_pipeline.py", "README.md", "model.pt", "text_encoder/model.safetensors", "vlm/modeling.py")


@pytest.fixture
def deepgen(server, tiny_deepgen):
    paths = [path for path in tiny_deepgen.rglob("*") if path.is_file()]
    files = {path.relative_to(tiny_deepgen).as_posix(): path.read_bytes() for path in paths}
    server.wanted = set(files)
    server.files = files | dict.fromkeys(UNWANTED, b"x")
    server.served = dict(server.files)
    return server


def test_a_repository_is_known_by_its_files(deepgen):
    said = []
    folder = hub.resolve("someone/tiny", say=said.append)
    assert families.read(folder)[0].name == "deepgen" and manifest.verify(folder)
    assert set(manifest.read(folder)["source"]["hub"]["files"]) == deepgen.wanted
    asked = {line.split("/resolve/")[1].split("/", 1)[1] for line in deepgen.log if "/resolve/" in line}
    assert asked == deepgen.wanted
    assert "see https://huggingface.co/someone/tiny" in said[0] and "never run" in said[0]
    deepgen.close()
    assert hub.resolve("someone/tiny", offline=True) == folder


def test_a_copy_without_hashes_is_known_by_what_it_holds(deepgen):
    snapshot = Path(snapshot_download("someone/tiny", endpoint=deepgen.url))
    for path in [path for path in snapshot.rglob("*") if path.is_symlink()]:
        data = path.read_bytes()
        path.unlink()
        path.write_bytes(data)
    deepgen.close()
    folder = hub.resolve("someone/tiny", offline=True)
    assert families.read(folder)[0].name == "deepgen"
    assert manifest.read(folder)["source"]["hub"]["files"] == {}
