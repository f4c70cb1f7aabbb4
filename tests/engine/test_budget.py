"""What of a card may be used, on a card that is made up."""

import pytest
import torch
from unipic_run.engine import gpus
from unipic_run.engine.budget import (
    CONTEXT,
    LATER,
    MARGIN,
    SLACK,
    as_vram,
    bound_on,
    context_on,
    measure_context,
    overhead,
)
from unipic_run.engine.errors import BudgetError, UsageError
from unipic_run.engine.gpus import GIB
from unipic_run.engine.nvml import free_bytes

CPU = torch.device("cpu")
MIB = 2**20


def test_amounts_of_memory():
    assert as_vram("8") == as_vram("8GiB") == as_vram(8) == 8 * 2**30 and as_vram("7.5 gb") == int(7.5 * 2**30)
    assert as_vram(0.9 * 23.6) == int(21.24 * 2**30), "a number that was computed"
    for wrong in ("", "0", "-1", "8 MiB", "1e3", "all"):
        with pytest.raises(UsageError, match="no amount of memory"):
            as_vram(wrong)
    with pytest.raises(UsageError, match="bounds what a GPU"):
        bound_on(CPU, 8)
    assert bound_on(CPU, "auto") is None and bound_on(CPU, None) is None


def test_auto_takes_what_is_free_less_a_margin_and_a_number_is_a_cap(card):
    found = bound_on(card.device, "auto")
    assert found - CONTEXT == card.free - MARGIN
    assert bound_on(card.device, "6") == 6 * GIB and bound_on(card.device, 100) == card.total
    with pytest.raises(UsageError, match="little more than CUDA itself"):
        bound_on(card.device, 1)
    card.free = GIB
    with pytest.raises(BudgetError, match=r"1.0 GiB of the GPU are free.*nvidia-smi"):
        bound_on(card.device, "auto")


@pytest.mark.parametrize(("name", "workspace"), [("rtx3060", 2 * 8320 * 2**10), ("h100", 64 * MIB)])
def test_what_is_usable_leaves_room_for_the_context_and_for_libraries(name, workspace):
    beside = overhead(gpus.card(name))
    assert beside.workspace == workspace and beside.context == CONTEXT
    assert beside.usable(6 * GIB) == int(5.5 * GIB * SLACK) - workspace
    assert beside.usable(int(beside.needed(3 * GIB) * GIB)) == pytest.approx(3 * GIB, abs=0.01 * GIB)


def test_the_context_is_measured_once_a_process(card):
    card.context, card.reserved = 300 * MIB, 0
    assert context_on(card.device) == CONTEXT
    for _ in range(2):
        measure_context(card.device)
        card.context = 100 * MIB
        assert context_on(card.device) == 300 * MIB + LATER
        assert overhead(gpus.card("rtx3060"), card.device).context == 300 * MIB + LATER
    assert bound_on(card.device, "auto") - context_on(card.device) == card.free - MARGIN
    assert context_on(torch.device("cuda", 1)) == CONTEXT and measure_context(CPU) is None


@pytest.mark.parametrize(("took", "nvml"), [(0, True), (3 * GIB, True), (-GIB, True), (300 * MIB, False)])
def test_what_is_no_context_is_not_taken_for_one(card, took, nvml):
    card.context, card.nvml, card.reserved = took, nvml, 0
    measure_context(card.device)
    assert context_on(card.device) == CONTEXT


def test_what_torch_has_reserved_meanwhile_is_not_the_contexts(card):
    card.context, card.reserved = 500 * MIB, 200 * MIB
    measure_context(card.device)
    assert context_on(card.device) == 300 * MIB + LATER


def told(free, failing=""):
    """A library that says so much of the card called GPU-1-2, or fails in a call."""

    class Library:
        closed = 0

        def __getattr__(self, name):
            return lambda *_: int(name == failing)

        def nvmlDeviceGetHandleByUUID(self, name, card):
            return int(name != b"GPU-1-2")

        def nvmlDeviceGetMemoryInfo(self, card, memory):
            memory._obj.free = free
            return int(failing == "nvmlDeviceGetMemoryInfo")

        def nvmlShutdown(self):
            self.closed += 1

    return Library()


def test_the_driver_is_asked_by_the_cards_name():
    library = told(5 * GIB)
    assert free_bytes("1-2", lambda name: library) == free_bytes("GPU-1-2", lambda name: library) == 5 * GIB
    assert free_bytes("3-4", lambda name: library) is None and library.closed == 3
    for call in ("nvmlInit_v2", "nvmlDeviceGetMemoryInfo"):
        assert free_bytes("1-2", lambda name, call=call: told(5 * GIB, call)) is None

    def missing(name):
        raise OSError(name)

    assert free_bytes("1-2", missing) is None
