"""How torch's allocator is told to take memory, on a card that is made up."""

import sys

import pytest
import torch
from unipic_run.engine import allocator
from unipic_run.engine.allocator import VARIABLES, grow_segments

DEVICE = torch.device("cuda", 0)


@pytest.fixture
def card(monkeypatch):
    """settings: what torch's allocator was told. `reserved`, `backend`, `fails`: what torch and its driver say."""

    class Card:
        settings, reserved, backend, fails = [], 0, "native", None

        def empty(self, *size, device):
            assert device is DEVICE
            if self.fails:
                raise self.fails

    card = Card()
    card.settings = []
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch, "empty", card.empty)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: card.reserved)
    monkeypatch.setattr(torch.cuda, "get_allocator_backend", lambda: card.backend)
    monkeypatch.setattr(torch._C, "_accelerator_setAllocatorSettings", card.settings.append)
    return card


def test_segments_grow_from_the_first_block_on(card):
    said = []
    grow_segments(DEVICE, said.append)
    assert card.settings == ["expandable_segments:True"] and not said


def test_what_users_have_set_and_what_is_in_use_stays(card, monkeypatch):
    grow_segments(torch.device("cpu"), pytest.fail)
    for name in VARIABLES:
        with monkeypatch.context() as patch:
            patch.setenv(name, "max_split_size_mb:64")
            grow_segments(DEVICE, pytest.fail)
    for name, value in (("reserved", 2**21), ("backend", "cudaMallocAsync")):
        with monkeypatch.context() as patch:
            patch.setattr(card, name, value)
            grow_segments(DEVICE, pytest.fail)
    with monkeypatch.context() as patch:
        patch.setattr(allocator.sys, "platform", "win32")
        grow_segments(DEVICE, pytest.fail)
    monkeypatch.setattr(torch.version, "cuda", None)  # as of ROCm
    grow_segments(DEVICE, pytest.fail)
    assert card.settings == []


def test_a_driver_that_cannot_gets_torchs_default_and_a_word(card):
    said, card.fails = [], RuntimeError("CUDA driver error: operation not supported\nmore")
    grow_segments(DEVICE, said.append)
    assert card.settings == ["expandable_segments:True", "expandable_segments:False"]
    assert len(said) == 1 and "(CUDA driver error: operation not supported)" in said[0]
    card.fails = torch.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(torch.OutOfMemoryError):
        grow_segments(DEVICE, said.append)


def test_torch_knows_the_setting():
    before = torch._C._accelerator_getAllocatorSettings()
    try:
        torch._C._accelerator_setAllocatorSettings("expandable_segments:False")
        assert "expandable_segments:False" in torch._C._accelerator_getAllocatorSettings()
    finally:
        torch._C._accelerator_setAllocatorSettings(before)
