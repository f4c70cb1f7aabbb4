"""The GPU check runs every part, keeps going after a failure, and writes one summary."""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import pytest
from unipic_run.bench import gpu_summary

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "bench" / "gpu_check.sh"

pytestmark = pytest.mark.skipif(shutil.which("bash") is None or sys.platform == "win32", reason="needs bash")


def test_the_script_parses():
    subprocess.run(["bash", "-n", SCRIPT], check=True)


def test_its_parts_take_less_than_nine_minutes():
    (whole,) = re.findall(r"SECONDS_IN_ALL:-(\d+)", SCRIPT.read_text())
    assert int(whole) + 10 + 20 <= 540  # the last one may be killed 10 s later, and the summary takes some time


def test_parts_get_what_is_left_of_the_whole_time(tmp_path):
    python = tmp_path / "python"
    python.write_text(
        '#!/bin/sh\ncase "$1" in\n*gpu_summary.py) cp "$2" "$3" ;;\n*compile*) trap "echo told; exit 0" TERM; '
        "while :; do sleep 0.1; done ;;\n*) echo done ;;\nesac\n"
    )
    python.chmod(0o755)
    environment = {**os.environ, "PYTHON": str(python), "OUT": str(tmp_path / "out"), "SECONDS_IN_ALL": "3"}
    start = time.monotonic()
    done = subprocess.run(["bash", SCRIPT], env=environment, capture_output=True, text=True, timeout=60)
    rows = [line.split("\t") for line in (tmp_path / "out" / "parts.tsv").read_text().splitlines()]
    statuses = {name: int(status) for name, status, _ in rows}
    assert done.returncode == 1 and time.monotonic() - start < 10
    assert statuses["environment"] == 0 and statuses["compile"] == statuses["parity"] == 124
    assert (tmp_path / "out" / "compile.log").read_text().endswith("told\n")
    assert "no time" in (tmp_path / "out" / "parity.log").read_text()
    assert [*statuses][-1] == "deepgen"


@pytest.fixture
def uninstalled(tmp_path):
    """An environment whose Python knows our dependencies and not our package."""
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S "$@"\n')  # without site, .pth files are not read
    python.chmod(0o755)
    assert subprocess.run([python, "-c", "import unipic_run"], cwd=tmp_path, capture_output=True).returncode
    return {**os.environ, "PYTHON": str(python), "PYTHONPATH": sysconfig.get_path("purelib")}


def test_a_dry_run_reaches_every_part(tmp_path, uninstalled):
    environment = {**uninstalled, "DRY_RUN": "1", "OUT": str(tmp_path / "out")}
    done = subprocess.run(["bash", SCRIPT], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=540)
    (summary,) = (json.loads(path.read_text()) for path in (tmp_path / "out").glob("*.json"))
    parts = summary["parts"]
    assert {"environment", "compile", "gpu-tests", "ops", "parity", "latency", "int8", "vram"} <= set(parts)
    assert parts["parity"]["result"]["passed"] and parts["latency"]["result"]["tasks"].keys() == {"gen", "edit", "ask"}
    assert parts["vram"]["result"]["passed"] and parts["torch-only"]["result"]["passed"]
    assert parts["batch-of-4"]["result"]["batch"] == 4 and parts["int8"]["result"]["quant"] == "int8"
    assert all(parts[f"int8-{speed}"]["result"]["speed"] == speed for speed in ("balanced", "fast"))
    assert parts["deepgen-fast"]["result"]["speed"] == "fast"
    deepgen = {name: parts[name]["result"] for name in ("deepgen", "deepgen-bf16", "deepgen-int8", "deepgen-classes")}
    assert all("deepgen" in found["model"] and found["passed"] for found in deepgen.values())
    assert deepgen["deepgen"]["tasks"].keys() == {"edit", "ask"} and deepgen["deepgen-int8"]["quant"] == "int8"
    assert {*deepgen["deepgen-bf16"]["tasks"]["gen"]["plan"]["stages"]} >= {"look", "read", "sample"}
    assert "skipped" in (tmp_path / "out" / "gpu-tests.log").read_text()
    failed = {name for name, part in parts.items() if part["status"]}
    assert (done.returncode != 0) == bool(failed) and failed <= {"environment"}, done.stdout


def test_a_failed_part_keeps_its_log(tmp_path):
    (tmp_path / "good.log").write_text('noise\n{"passed": true}\n')
    (tmp_path / "bad.log").write_text("Traceback\nboom\n")
    (tmp_path / "parts.tsv").write_text("good\t0\t3\nbad\t124\t90\n")
    gpu_summary.main([str(tmp_path / "parts.tsv"), str(tmp_path)])
    (summary,) = (json.loads(path.read_text()) for path in tmp_path.glob("*.json"))
    assert not summary["passed"]
    assert summary["parts"]["good"] == {"status": 0, "seconds": 3, "result": {"passed": True}}
    assert "boom" in summary["parts"]["bad"]["tail"]
