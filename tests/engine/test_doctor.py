"""Every check against made-up machines."""

from dataclasses import replace
from pathlib import Path

import pytest
from unipic_run.engine.doctor import GIB, examine, runs_on
from unipic_run.engine.facts import Facts, Gpu, gather

CARD = Gpu("NVIDIA GeForce RTX 4090", (8, 9), 20 * GIB, 24 * GIB)
HEALTHY = Facts(
    python=(3, 12, 1),
    system="Linux",
    machine="x86_64",
    torch="2.13.0+cu130",
    torch_error="",
    torch_cuda="13.0",
    torch_archs=("sm_80", "sm_86", "sm_90", "sm_120"),
    nvidia_smi=True,
    driver="580.95",
    gpus=(CARD,),
    triton="3.7.1",
    triton_error="",
    triton_wanted="3.7.1",
    compiler="/usr/bin/cc",
    python_headers=True,
    attention="sdpa",
    extras={"flash-attn": None, "bitsandbytes": "0.50.2"},
    cache=Path("/home/user/.cache/unipic-run"),
    cache_writable=True,
    cache_free=100 * GIB,
    offline=False,
    models=("Skywork--Skywork-UniPic-1.5B@0123456789ab",),
)
CPU_ONLY = {"torch": "2.13.0+cpu", "torch_cuda": None, "torch_archs": (), "gpus": ()}


def test_a_healthy_machine_is_ok():
    checks = examine(HEALTHY)
    assert {check.state for check in checks} == {"ok"}
    text = "\n".join(check.text() for check in checks)
    assert "RTX 4090" in text and "8.9" in text and "20.0 of 24.0 GiB" in text and "bitsandbytes 0.50.2" in text


@pytest.mark.parametrize(
    ("name", "state", "fix", "facts"),
    [
        ("python", "fail", "3.11 or later", {"python": (3, 10, 9)}),
        ("torch", "fail", "install", {"torch": None, "torch_error": "OSError: c10.dll", "gpus": ()}),
        ("torch", "warn", "CUDA build", CPU_ONLY),
        ("torch", "warn", "Windows", CPU_ONLY | {"system": "Windows"}),
        ("torch", "warn", "driver", {"gpus": ()}),
        ("torch", "ok", "", CPU_ONLY | {"nvidia_smi": False, "driver": None}),
        ("torch", "ok", "", CPU_ONLY | {"system": "Darwin"}),
        ("gpu", "fail", "CUDA build", {"gpus": (replace(CARD, capability=(7, 0)),)}),
        ("gpu", "fail", "--device cpu", {"gpus": (replace(CARD, capability=(10, 3)),)}),
        ("gpu", "warn", "fp16", {"gpus": (replace(CARD, capability=(7, 5)),), "torch_archs": ("sm_75",)}),
        ("triton", "warn", "pip install triton", {"triton": None, "triton_error": "not installed"}),
        ("triton", "warn", "triton-windows", {"triton": None, "system": "Windows"}),
        ("triton", "warn", "3.7.1", {"triton": "3.9.0"}),
        ("triton", "ok", "", CPU_ONLY | {"triton": None}),
        ("compiler", "warn", "gcc", {"compiler": None}),
        ("compiler", "warn", "python3-dev", {"python_headers": False}),
        ("compiler", "ok", "", CPU_ONLY | {"compiler": None}),
        ("cache", "warn", "UNIPIC_RUN_CACHE", {"cache_free": 10**6}),
        ("cache", "fail", "make room", {"cache_free": 10**6, "models": ()}),
        ("cache", "warn", "make room", {"cache_free": 10 * GIB, "models": ()}),
        ("cache", "warn", "UNIPIC_RUN_CACHE", {"cache_writable": False}),
        ("cache", "fail", "UNIPIC_RUN_CACHE", {"cache_writable": False, "models": ()}),
        ("network", "ok", "", {"offline": True}),
        ("models", "warn", "pull", {"models": ()}),
        ("models", "warn", "HF_HUB_OFFLINE", {"models": (), "offline": True}),
    ],
)
def test_what_is_wrong_is_named_with_its_fix(name, state, fix, facts):
    (check,) = [check for check in examine(replace(HEALTHY, **facts)) if check.name == name]
    assert check.state == state and fix in check.fix and check.what
    assert bool(check.fix) == (state != "ok")


@pytest.mark.parametrize(
    ("archs", "capability", "good"),
    [
        (("sm_80",), (8, 9), True),
        (("sm_90",), (8, 9), False),
        (("sm_80", "sm_90"), (12, 0), False),
        (("sm_80", "compute_90"), (12, 0), True),
        (("sm_90a",), (9, 0), True),
        (("sm_100f", "sm_120"), (12, 1), True),
        (("sm_100a",), (10, 3), False),
        ((), (8, 0), False),
    ],
)
def test_code_runs_on_later_minors_and_intermediate_code_on_later_majors(archs, capability, good):
    assert runs_on(archs, capability) is good


def test_looking_around_here_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("UNIPIC_RUN_CACHE", str(tmp_path / "not" / "there"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    facts = gather()
    assert facts.offline and facts.torch and facts.models == () and facts.cache_writable
    assert facts.cache_free > 0 and not list(tmp_path.iterdir())


def test_a_broken_torch_is_a_finding(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    facts = gather()
    assert facts.torch is None and "torch" in facts.torch_error
    assert any(check.state == "fail" for check in examine(facts))
