"""The ahead-of-time bench on planted kernels, each wrong in its own way, and one that is right."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from unipic_run.bench import aot, aot_coverage
from unipic_run.engine.gpus import SHARED_PER_BLOCK
from unipic_run.kernels import _tuned
from unipic_run.kernels._op import HAS_TRITON, recording
from unipic_run.kernels._registry import checks, kernel_modules
from unipic_run.kernels._tuned import Question

ROOT = Path(__file__).resolve().parents[2]
PLANTED = """
import torch
from unipic_run.kernels._op import Case, Cost, Operator, launch, tl, triton

@triton.jit
def copy(x_ptr, y_ptr, n, stride, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + at * stride, tl.load(x_ptr + at * stride, mask=at < n), mask=at < n)

@triton.jit
def spilling(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at).to(tl.float32)
    for i in range(n):
        x = x * tl.sum(x, axis=0) + x
    tl.store(y_ptr + at, x)

@triton.jit
def product(x_ptr, w_ptr, y_ptr, K, M: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr, WIDEN: tl.constexpr):
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, BLOCK)
    y = tl.zeros((M, N), tl.float32 if WIDEN or x_ptr.dtype.element_ty != tl.int8 else tl.int32)
    for start in range(0, K, BLOCK):
        x = tl.load(x_ptr + m[:, None] * K + start + k[None, :])
        w = tl.load(w_ptr + n[None, :] * K + start + k[:, None])
        if WIDEN:
            x, w = x.to(tl.bfloat16), w.to(tl.bfloat16)
        y = tl.dot(x, w, y, out_dtype=y.dtype)
    tl.store(y_ptr + m[:, None] * N + n[None, :], y)

def launcher(kernel, **options):
    def run(x, w):
        y = torch.empty(len(x), len(w), device=x.device)
        if kernel is copy:
            launch(copy, (1,), x, y, 48, x.stride(0), **options)
        elif kernel is spilling:
            launch(spilling, (1,), x, y, 7, **options)
        else:
            launch(product, (1,), x, w, y, x.shape[1], M=len(x), N=len(w), **options)
        return y
    return run

def plant(name, make, kernel, **options):
    schema = f"planted_{name}(Tensor x, Tensor w) -> Tensor"
    Operator(schema, torch=torch.matmul, triton=launcher(kernel, **options), cost=Cost).triton.__module__ = __name__
    return Case(name, make, "aot", operators=f"planted_{name}")

def two(m, n, k, dtype):
    return lambda device: (torch.ones(m, k, device=device, dtype=dtype), torch.ones(n, k, device=device, dtype=dtype))

def planted_cases():
    half = torch.bfloat16
    return [
        plant("fine", lambda device: (torch.randn(49).to(device)[1:], torch.randn(1).to(device)), copy, BLOCK=64),
        plant("spilling", two(1, 1, 4096, half), spilling, BLOCK=1024, num_warps=1, maxnreg=32),
        plant("greedy", two(64, 64, 1024, half), product, BLOCK=256, WIDEN=False, num_stages=3),
        plant("int8", two(64, 64, 256, torch.int8), product, BLOCK=64, WIDEN=False),
        plant("fake_int8", two(64, 64, 256, torch.int8), product, BLOCK=64, WIDEN=True),
    ]
"""
NAMES = ("fine", "spilling", "greedy", "int8", "fake_int8")


def compiled(*arguments, **environment):
    """(exit status, the JSON of the last line, everything said) of a run in a process where kernels are compiled."""
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(ROOT / "bench" / "aot.py"), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=kept | environment)
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout.splitlines()[-1]), done.stdout + done.stderr


@pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")
def test_each_planted_fault_is_found_and_nothing_else(tmp_path):
    (tmp_path / "planted.py").write_text(PLANTED)
    arguments = "--file", tmp_path / "planted.py", "--jobs", 2, "--json", tmp_path / "found.json"
    status, found, said = compiled(*arguments, TRITON_CACHE_DIR=str(tmp_path / "cache"))
    assert status == 1 and not found["passed"] and found == json.loads((tmp_path / "found.json").read_text())
    rows = {name: {r["sm"]: r for r in found["rows"] if f"planted_{name}: {name}" in r["cases"]} for name in NAMES}
    assert all(89 in by_card for by_card in rows.values())
    # one configuration of each kernel, that with the most shared memory, for all cards
    assert [name for name in NAMES if set(rows[name]) == set(SHARED_PER_BLOCK)] == ["fine", "spilling", "greedy"]
    problems = {name: " ".join(rows[name][89]["problems"]) for name in NAMES}
    assert rows["spilling"][89]["spilled"] > 0 and f"spills {rows['spilling'][89]['spilled']}" in problems["spilling"]
    assert "bytes of shared memory, a block may have 101376" in problems["greedy"]
    assert not rows["greedy"][80]["problems"], "an A100's block may have that much"
    assert problems["fake_int8"] == "multiplies bf16 although 2 of its arguments are int8"
    assert problems["fine"] == problems["int8"] == ""
    assert rows["int8"][89]["mma"] == ["s8"] and rows["greedy"][89]["mma"] == ["bf16"]
    assert "spills" in said and "registers" in said
    # as on a card: x begins 4 bytes behind an aligned address, n is 48, and a stride of 1 is no argument any more
    assert rows["fine"][89]["aligned"] == ["y_ptr", "n"]


@pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")
def test_says_so_where_kernels_are_interpreted(monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert aot.main([]) == 2 and "unset it" in json.loads(capsys.readouterr().out.splitlines()[-1])["skipped"]


ENTRY = {"options": {"BLOCK_N": 32, "num_warps": 4}}
ASKED = Question("norm_like", "bfloat16 d64", {"BLOCK_N": 64, "num_warps": 8}, lambda tile: 2048 * tile["BLOCK_N"])


@pytest.fixture
def tables(tmp_path, monkeypatch):
    """Tuned tables in place of the shipped ones: capability -> kernel -> shape class -> entry."""

    def write(**of):
        for capability, kernels in of.items():
            table = {"source": "measured", "shared_bytes": 101376, "kernels": kernels}
            (tmp_path / f"{capability}.json").write_text(json.dumps(table))

    monkeypatch.setattr(_tuned, "FOLDER", tmp_path)
    return write


def test_an_entry_of_a_table_that_nothing_asks_for_is_a_problem(tables):
    large = {"options": {"BLOCK_N": 128}}
    tables(
        sm_86={"norm_like": {"bfloat16 d64": ENTRY}}, sm_89={"norm_like": {"float32 d9": ENTRY}, "gone": {"": ENTRY}}
    )
    unasked = list(aot_coverage.table_problems([ASKED]))
    assert [text.partition(":")[0] for text in unasked] == ["sm_89.json, norm_like, float32 d9", "sm_89.json, gone, "]
    tables(sm_86={"norm_like": {"bfloat16 d64": large}}, sm_89={})
    (found,) = aot_coverage.table_problems([ASKED])
    assert "needs 262144 bytes of shared memory" in found


def test_a_card_with_a_table_has_all_compiled_as_it_says_also_where_it_says_the_same(tables):
    tables(sm_80={}, sm_86={"norm_like": {"bfloat16 d64": ENTRY}}, sm_89={"norm_like": {"bfloat16 d64": ENTRY}})

    def collect():  # as launchers do: what is not listed for the architecture is the heuristic
        return ["heuristic", f"tuned for {_tuned.HOME}"]

    assert collect() == ["heuristic", "tuned for 89"]
    assert list(aot_coverage.elsewhere(collect)) == [("heuristic", 86), ("tuned for 86", 86)]
    assert _tuned.HOME == 89


@pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")
def test_a_kernel_that_no_case_leads_to_is_a_problem():
    modules = kernel_modules()
    found = [
        text.partition(":")[0].removeprefix("unipic_run.kernels.") for text in aot_coverage.left_out(modules, set())
    ]
    assert {"norms._norm_kernel", "attention._attention_kernel"} <= set(found) and len(found) > 15
    (norm,) = [text for text in found if text == "norms._norm_kernel"]
    compiled = {("unipic_run.kernels.norms", "_norm_kernel")}
    assert norm not in " ".join(aot_coverage.left_out(modules, compiled))


@pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")
def test_cases_and_pictures_lead_to_every_kernel():
    """Counted as launched on the meta device, which needs no compiler."""
    made = set()
    for check in checks("aot"):
        with recording() as launches:
            check.operator.op(*aot.on_meta(check))
        made |= {(launch.kernel.fn.__module__, launch.kernel.fn.__name__) for launch in launches}
    assert not list(aot_coverage.left_out(kernel_modules(), made))
