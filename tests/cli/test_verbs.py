"""The commands beside gen, edit and ask, and what help and notes say."""

import json
import subprocess
import sys
from pathlib import Path

from unipic_run.engine.checkpoint.cache import PACKAGED


def test_plan_promises_what_it_can_plan(run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    code, told, _ = run("plan", "--help")
    assert code == 0 and "--quant" in told and "int8-qk" in told and "--quiet" in told
    assert not any(word in told for word in ("nf4", "bnb8", "flash-attn", "xformers", "as stored"))


def test_arguments_are_in_capitals_and_repeat_once(run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    told = {command: run(command, "--help")[1] for command in ("ask", "convert", "info", "gen")}
    assert "QUESTION" in told["ask"] and "......" not in told["ask"] and "QUESTION...}" not in told["ask"]
    assert "SRC" in told["convert"] and "DST" in told["convert"] and "PATH" in told["info"]
    assert "DeepGen:" not in told["gen"], "UniPic-2 reuses blocks, too"


def test_convert_says_that_a_folder_is_converted(run):
    code, _, err = run("convert", str(PACKAGED["pocket"]), "out")
    assert code == 2 and "is converted already: give it to --model as it is" in err


def test_pull_list_info_verify_on_what_is_here(run, model, tiny_release):
    assert run("verify", model)[1].startswith(f"ok {model}")
    assert run("convert", str(tiny_release), "int8", "--quant", "int8")[0] == 0
    counts = [json.loads(run("info", folder, "--json")[1])["parameters"] for folder in (model, "int8")]
    assert counts[0] == counts[1], "scales are no parameters"
    for folder, layout in ((model, "converted"), (str(tiny_release), "released")):
        found = json.loads(run("info", folder, "--json")[1])
        assert (found["layout"], found["family"]) == (layout, "unipic") and found["parameters"] > 10**6
        assert found["licence"] and "never run by us" in found["note"]
    assert json.loads(run("list", "--json")[1])["models"][1]["path"] is None
    code, out, err = run("pull", str(tiny_release))
    assert code == 0 and "licence" in err
    assert json.loads(run("list", "--json")[1])["models"][1]["path"] == out.strip()
    weights = next(Path(out.strip()).glob("*.safetensors"))
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    code, _, err = run("verify", Path(out.strip()).name)
    assert code == 5 and "has changed" in err
    assert "not on this machine" in run("info", "unipic")[1]
    code, _, err = run("info", "")
    assert code == 2 and "the name '' is empty" in err


def test_doctor_runs_here_and_speaks_json(run):
    code, out, _ = run("doctor", "--json")
    states = {check["name"]: check["state"] for check in json.loads(out)["checks"]}
    assert code == (1 if "fail" in states.values() else 0) and states["python"] == "ok" and states["models"] == "warn"


def test_a_size_far_from_the_trained_one_is_noted_once_and_q_is_silent(run, model):
    code, out, err = run("gen", "x", "-m", model, "--steps", "1", "--res", "32", "-n", "2", "-o", "a.png")
    assert code == 0 and len(out.split()) == 2 and err.startswith("note: 32x32") and err.count("\n") == 1
    assert run("gen", "x", "-m", model, "--steps", "1", "--res", "32", "-o", "b.png", "-q")[2] == ""


def test_help_needs_no_torch():
    code = "import sys; from unipic_run.cli import main; sys.exit(main(['gen', '--help']) or 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "--cfg-schedule" in done.stdout, done.stderr
