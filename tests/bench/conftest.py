"""Stand-ins that several benches' tests share."""

import sys
from types import SimpleNamespace

import pytest
from unipic_run.bench.vram_watch import Driver


class Nvml:
    """A driver that lists `processes`, (pid, bytes), and as many bytes more in use as `hidden`."""

    NVMLError = type("NVMLError", (Exception,), {})

    def __init__(self, processes=(), hidden=0):
        self.listed, self.hidden = processes, hidden

    def nvmlInit(self): ...

    def nvmlDeviceGetHandleByUUID(self, uuid):
        assert uuid == "GPU-1-2"
        return "handle"

    def nvmlDeviceGetComputeRunningProcesses(self, handle):
        listed = self.listed() if callable(self.listed) else self.listed
        return [SimpleNamespace(pid=pid, usedGpuMemory=used) for pid, used in listed]

    def nvmlDeviceGetGraphicsRunningProcesses(self, handle):
        raise self.NVMLError("not on this card")

    def nvmlDeviceGetMemoryInfo(self, handle):
        return SimpleNamespace(used=self.hidden)

    def nvmlSystemGetProcessName(self, pid):
        return "/usr/bin/game"


@pytest.fixture
def driver(monkeypatch):
    def make(**how) -> Driver:
        monkeypatch.setitem(sys.modules, "pynvml", Nvml(**how))
        return Driver("1-2")

    return make
