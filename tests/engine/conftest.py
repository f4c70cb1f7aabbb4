"""A card that is made up, and DeepGen with small random weights."""

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from unipic_run import Engine
from unipic_run.engine import budget, limits
from unipic_run.engine.gpus import GIB


class Card:
    """24 GiB, of which the process has reserved 2: what `torch.cuda` and NVML say of it, and the limits it is given."""

    device, total, free, reserved = torch.device("cuda", 0), 24 * GIB, 10 * GIB, 2 * GIB
    context = 0  # bytes that CUDA takes when it is started
    nvml = True  # whether the driver tells

    def __init__(self, monkeypatch):
        self.limits, self.shares = [], defaultdict(lambda: 1.0)
        said = {
            "get_device_properties": lambda device: SimpleNamespace(total_memory=self.total, uuid="1-2"),
            "mem_get_info": lambda device: (self.free, self.total),
            "memory_reserved": lambda device: self.reserved,
            "get_per_process_memory_fraction": self.shares.__getitem__,
            "set_per_process_memory_fraction": self.limit,
            "synchronize": self.start,
        }
        for name, answer in said.items():
            monkeypatch.setattr(torch.cuda, name, answer)
        monkeypatch.setattr(budget, "free_bytes", lambda uuid: self.free if self.nvml else None)
        monkeypatch.setattr(budget, "_measured", {})
        monkeypatch.setattr(limits, "_shared", {})

    def limit(self, share, device):
        assert 0 <= share <= 1
        self.shares[device] = share
        self.limits.append(share * self.total / GIB)

    def start(self, device):
        self.free, self.context = self.free - self.context, 0


@pytest.fixture
def card(monkeypatch):
    return Card(monkeypatch)


@pytest.fixture(scope="module")
def deepgen_engine(tiny_deepgen: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("UNIPIC_RUN_CACHE", str(tmp_path_factory.mktemp("cache")))
        with Engine.from_pretrained(tiny_deepgen, device="cpu") as made:
            yield made
