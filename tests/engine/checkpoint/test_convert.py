"""Conversion: exact values, nothing half-done visible whatever happens, and little memory."""

import json
import os
import shutil
import subprocess
import sys
import textwrap

import pytest
import torch
from safetensors import safe_open
from unipic_run.engine.checkpoint import convert as module
from unipic_run.engine.checkpoint import manifest
from unipic_run.engine.checkpoint.convert import convert
from unipic_run.engine.errors import CorruptWeightsError, ModelMissingError, OutputError
from unipic_run.engine.models.unipic import keys
from unipic_run.engine.models.unipic.released import Released


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    tiny = module.Path(__file__).parents[2] / "data" / "unipic-tiny"
    return convert(tiny, tmp_path_factory.mktemp("converted") / "out")


def run(code: str, *args: object) -> subprocess.Popen:
    script = (
        "import sys\nfrom pathlib import Path\nsrc, dst, where = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]\n"
    )
    command = [sys.executable, "-c", script + textwrap.dedent(code), *map(str, args)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def tensors_of(folder):
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return tensors


def flip(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def leftovers(folder):
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))


def test_values_and_types_are_kept(tiny, done):
    theirs = {f"vae.{k}": v for k, v in torch.load(tiny / "kl16.ckpt", weights_only=True)["model"].items()}
    theirs |= torch.load(tiny / "pytorch_model.bin", weights_only=True)
    ours = tensors_of(done)
    rows = keys.table(3, 2, 2, 2) | {keys.vae_name(n[4:]): (n,) for n in theirs if n.startswith("vae.")}
    assert set(ours) == set(rows)
    for name, parts in rows.items():
        expected = torch.cat([theirs[part] for part in parts]) if len(parts) > 1 else theirs[parts[0]]
        assert ours[name].dtype == expected.dtype and torch.equal(ours[name], expected), name


def test_the_folder_says_what_it_is(tiny, done):
    assert leftovers(done) == ["config.json", "manifest.json", "model.safetensors", "tokenizer.json"]
    assert leftovers(done.parent) == ["out"]
    config = json.loads((done / "config.json").read_text())
    assert (config["format"], config["family"], config["config"]["image_token"]) == (1, "unipic", 422)
    written = manifest.verify(done)
    assert written["source"]["folder"] == str(tiny) and set(written["files"]) == {*leftovers(done)} - {"manifest.json"}
    assert written["tool"].startswith("unipic-run ")


def test_shards_and_their_index(tiny, tmp_path, monkeypatch, done):
    monkeypatch.setattr(module.plan_shards, "__defaults__", (2**21,))
    folder = convert(tiny, tmp_path / "sharded")
    shards = sorted(folder.glob("*.safetensors"))
    assert len(shards) > 3 and shards[0].name == f"model-00001-of-{len(shards):05}.safetensors"
    assert all(path.stat().st_size < 2**21 + 2**16 for path in shards)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    whole, parts = tensors_of(done), tensors_of(folder)
    assert set(index["weight_map"]) == set(whole) == set(parts)
    assert all(torch.equal(parts[name], whole[name]) for name in whole)


def test_an_existing_place_is_never_overwritten(tiny, tmp_path):
    for content in ({}, {"note.txt": "mine"}):
        dst = tmp_path / f"taken{len(content)}"
        dst.mkdir()
        for name, text in content.items():
            (dst / name).write_text(text)
        with pytest.raises(OutputError, match="exists"):
            convert(tiny, dst)
        assert leftovers(dst) == list(content)


def test_a_second_run_keeps_the_first(tiny, tmp_path):
    dst = convert(tiny, tmp_path / "out")
    before = (dst / "manifest.json").stat().st_mtime_ns
    assert convert(tiny, dst) == dst and (dst / "manifest.json").stat().st_mtime_ns == before


def test_a_second_run_onto_a_damaged_folder_says_so(tiny, tmp_path):
    dst = convert(tiny, tmp_path / "out")
    flip(dst / "model.safetensors")
    with pytest.raises(OutputError, match=r"model\.safetensors has changed.*delete it"):
        convert(tiny, dst)
    shutil.rmtree(dst)
    manifest.verify(convert(tiny, dst))


def test_a_stale_folder_is_replaced_and_is_there_all_the_time(tiny, tmp_path):
    src = shutil.copytree(tiny, tmp_path / "src")
    dst = convert(src, tmp_path / "out")
    (src / "kl16.ckpt").touch()
    with pytest.raises(OutputError, match="not the conversion"):
        convert(src, dst)
    before, seen = manifest.read(dst), []
    convert(src, dst, lambda *event: seen.append(manifest.check(dst) == before), replace=manifest.check)
    assert seen and all(seen) and manifest.verify(dst) != before
    assert leftovers(tmp_path) == ["out", "src"]
    seen.clear()
    convert(src, dst, lambda *event: seen.append(event), replace=manifest.check)
    assert not seen  # it is current now


def test_extra_tensors_are_noted_in_the_manifest(tiny, tmp_path):
    src = shutil.copytree(tiny, tmp_path / "src")
    state = torch.load(src / "pytorch_model.bin", weights_only=True)
    torch.save(state | {f"extra.{i}": torch.zeros(1) for i in range(25)}, src / "pytorch_model.bin")
    dst = convert(src, tmp_path / "out")
    told = manifest.read(dst)["source"]["ignored"]
    assert told[:2] == ["extra.0", "extra.1"] and told[-1] == "and 5 more" and len(told) == 21
    assert convert(src, dst) == dst and "ignored" not in manifest.read(convert(tiny, tmp_path / "plain"))["source"]


def test_nan_and_infinity_are_refused(tiny, tmp_path):
    src = shutil.copytree(tiny, tmp_path / "src")
    with Released(src) as checkpoint:
        ((archive, record),) = checkpoint.tensors["mar_decoder.mask_token"].parts
    good = archive.path.read_bytes()
    for value in (float("nan"), float("inf"), float("-inf")):
        with archive.path.open("r+b") as file:
            file.seek(record.offset + 8)
            file.write(torch.tensor([value]).numpy().tobytes())
        with pytest.raises(CorruptWeightsError, match=r"mar\.mask_token .* NaN or Inf"):
            convert(src, tmp_path / "out")
    assert leftovers(tmp_path) == ["src"]
    archive.path.write_bytes(good)
    convert(src, tmp_path / "out")


def test_no_space_is_said_before_anything_is_written(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 10**6))
    with pytest.raises(OutputError, match=r"0\.0 GB free"):
        convert(tiny, tmp_path / "out")
    assert leftovers(tmp_path) == []


def test_unwritable_places(tiny, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError):
        convert(tiny, tmp_path / "file" / "out")
    with pytest.raises(ModelMissingError):
        convert(tmp_path, tmp_path / "out")


def test_an_interrupt_leaves_nothing(tiny, tmp_path):
    def interrupt(what, done, total):
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(tiny, tmp_path / "out", interrupt)
    assert [*tmp_path.iterdir()] == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_kills_and_races(tiny, tmp_path):
    """One process imports torch, its children are killed at three moments, and two of them race for one folder."""
    code = """
        import os, signal, time
        from unipic_run.engine.checkpoint import manifest
        from unipic_run.engine.checkpoint.convert import convert
        import unipic_run.engine.models.unipic.model

        def child(task):
            pid = os.fork()
            if pid == 0:
                os._exit(task())
            return pid

        def killed(point):
            die = lambda *args: os.kill(os.getpid(), signal.SIGKILL)
            if point == "rename":
                manifest._publish = die
            convert(src, dst / point / "out", lambda what, done, total: point == what and done > total // 2 and die())
            return 99

        def racing():
            wrote = []
            convert(src, dst / "race" / "out", lambda what, *_: (wrote.append(what), time.sleep(0.001)))
            return len(set(wrote))

        codes = lambda pids: [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
        print(*codes([child(lambda: killed(point)) for point in ("convert", "hash", "rename")]))
        print(*sorted(codes([child(racing), child(racing)])))
    """
    out, errors = run(code, tiny, tmp_path, "-").communicate(timeout=120)
    # One racer converted and hashed, the other waited and found it done.
    assert out.split("\n")[:2] == ["-9 -9 -9", "0 2"], errors
    manifest.verify(tmp_path / "race" / "out")
    assert leftovers(tmp_path / "race") == ["out"]
    for point in ("convert", "hash", "rename"):
        assert not (tmp_path / point / "out").exists()
        assert len([*(tmp_path / point).glob("out.partial-*")]) == 1
        manifest.verify(convert(tiny, tmp_path / point / "out"))
        assert leftovers(tmp_path / point) == ["out"]


@pytest.mark.skipif(sys.platform != "linux", reason="reads VmHWM")
def test_memory_stays_near_one_tensor(tiny, tmp_path):
    """A wide MLP and a long vocabulary: 85 MB in all, the largest tensor 15 MB, the bound 32 MiB above it."""
    src = shutil.copytree(tiny, tmp_path / "src")
    state = torch.load(src / "pytorch_model.bin", weights_only=True)
    rows = 60_000
    state["llm.model.embed_tokens.weight"] = torch.zeros(rows, 64)
    for layer in range(3):
        for name, shape in (("gate", (rows // 2, 64)), ("up", (rows // 2, 64)), ("down", (64, rows // 2))):
            state[f"llm.model.layers.{layer}.mlp.{name}_proj.weight"] = torch.ones(shape)
    del state["llm.lm_head.weight"]
    torch.save(state, src / "pytorch_model.bin")
    largest = rows * 64 * 4
    assert (src / "pytorch_model.bin").stat().st_size > 5 * largest
    code = """
        from unipic_run.engine.checkpoint.convert import convert
        peak = lambda: int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1]) * 1024
        convert(Path(where), dst / "warm")
        before = peak()
        convert(src, dst / "out")
        print(peak() - before)
    """
    process = run(code, src, tmp_path, tiny)
    out, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert int(out) <= largest + 32 * 2**20
