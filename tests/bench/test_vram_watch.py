"""What is seen of a process and its card from outside and inside, through stand-ins for the driver."""

import subprocess
import sys
import time
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from unipic_run.bench import ballast, vram_measured, vram_watch
from unipic_run.bench.stage_memory import StageMemory
from unipic_run.engine.errors import BudgetError, UsageError

MIB, GIB = 2**20, 2**30


def test_looks_at_a_process_while_it_runs(driver):
    sizes = iter([3, 7, 5])
    me, started = [], subprocess.Popen

    def listed():
        return [(me[0], next(sizes, 1) * MIB), (99, MIB)]

    def popen(*arguments, **how):
        process = started(*arguments, **how)
        me.append(process.pid)
        return process

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subprocess, "Popen", popen)
        code = "import time; x = bytearray(64 << 20); time.sleep(0.5); print(len(x))"
        done = vram_watch.run_watched([sys.executable, "-c", code], driver(processes=listed), 60)
    assert done.status == 0 and int(done.stdout) == 64 * MIB
    assert done.seen.nvml_bytes == 7 * MIB and done.seen.strangers == {99} and not done.seen.nvml_missing
    if sys.platform == "linux":
        assert 64 * MIB < done.seen.host_bytes < 128 * MIB


def test_a_process_that_the_driver_does_not_list_is_not_measured(driver):
    seen = vram_watch.run_watched([sys.executable, "-c", ""], driver(processes=[(1, MIB)]), 60).seen
    assert seen.nvml_bytes is None and "containers" in seen.nvml_missing and not seen.strangers


def test_a_process_that_takes_too_long_is_ended():
    start = time.monotonic()
    done = vram_watch.run_watched([sys.executable, "-c", "import time; time.sleep(60)"], None, 0.2)
    assert done.status is None and time.monotonic() - start < 30
    assert vram_measured.told(done, "gen") == {"error": "took too long"}


def test_without_nvml_the_reason_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    found = vram_watch.Driver("1-2")
    assert "nvidia-ml-py" in found.missing
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=0, stdout="5, x, 9 MiB\n"))
    with pytest.raises(UsageError, match="pid 5, x, 9 MiB"):
        vram_watch.require_alone(found)
    vram_watch.require_alone(found, shared=True)


def test_ballast_leaves_what_the_smaller_card_would(monkeypatch):
    assert ballast.ballast_bytes(free=23 * GIB, vram=6 * GIB, context=GIB // 2) == int(17.5 * GIB)
    monkeypatch.setattr(ballast, "measure_context", lambda device: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (8 * GIB, 24 * GIB))
    taken, card = [], torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    assert ballast.drop_ballast(card, 4 * GIB, lambda n: taken.append(n) or 0) == taken[0] == int(4.5 * GIB)
    with pytest.raises(BudgetError, match="error 2"):
        ballast.drop_ballast(card, 4 * GIB, lambda n: 2)
    with pytest.raises(BudgetError, match=r"8\.00 GiB of the card are free"):
        ballast.drop_ballast(card, 12 * GIB)
    with pytest.raises(UsageError, match="cpu"):
        ballast.drop_ballast(torch.device("cpu"), GIB)


class Allocator:
    """Its peak is what `now` was most since the last reset, and it reserves twice that."""

    def __init__(self):
        self.now = self.most = 0

    def use(self, nbytes: int) -> None:
        self.now, self.most = nbytes, max(self.most, nbytes)

    def max_memory_allocated(self, device) -> int:
        return self.most

    def max_memory_reserved(self, device) -> int:
        return 2 * self.most

    def reset_peak_memory_stats(self, device) -> None:
        self.most = self.now


def test_peaks_belong_to_the_stage_that_ends(tiny_engine):
    allocator = Allocator()
    memory = StageMemory(torch.device("cuda"), allocator)
    allocator.use(9)
    allocator.use(3)
    memory.note("load")
    assert memory.stages.pop("load") == {"allocated_bytes": 9, "reserved_bytes": 18}
    with memory.listening():
        tiny_engine.generate("a", res=128, steps=1, seed=1, on_event=lambda event: allocator.use(len(event.stage)))
    found = {stage: peak["allocated_bytes"] for stage, peak in memory.stages.items()}
    # condition ends at what loading has left; its event comes before sampling, as sampling's does within it
    assert found == {"condition": 3, "sample": len("condition"), "decode": len("sample")}
    assert memory.peak() == {"allocated_bytes": 9, "reserved_bytes": 18}
    tiny_engine.generate("a", res=128, steps=1, seed=1)
    assert list(memory.stages) == list(found)  # nobody listens any more
