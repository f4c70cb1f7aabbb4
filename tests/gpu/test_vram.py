"""What a bound on a card's memory is worth: kept, at the price of time alone; and what is assumed about the card."""

import json
import os
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from unipic_run import Engine
from unipic_run.engine.budget import CONTEXTS, LATER, context_on
from unipic_run.engine.errors import BudgetError
from unipic_run.engine.gpus import GIB

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore::unipic_run.engine.errors.UnipicWarning")]
HOW = {"prompt": "a red fox", "res": 96, "steps": 4, "seed": 3}
OFF = "each picture is made alone"


def test_pictures_within_a_bound_are_the_same_bit_for_bit(tiny_release, tmp_path, monkeypatch):
    monkeypatch.setenv("UNIPIC_RUN_CACHE", str(tmp_path))
    with Engine.from_pretrained(tiny_release, device="cuda", dtype="bf16") as engine:
        engine.loaded.model.graphs.clear(OFF)
        expected, device = np.asarray(engine.generate(**HOW).images[0]), engine.device
    others, total = torch.cuda.memory_reserved(device), torch.cuda.get_device_properties(device).total_memory
    peaks, lines = [], []
    with Engine.from_pretrained(tiny_release, device="cuda", dtype="bf16", vram=2) as engine:
        engine.loaded.model.graphs.clear(OFF)
        limit = torch.cuda.get_per_process_memory_fraction(device) * total
        assert limit <= others + 2 * GIB - context_on(device) + 1
        for _ in range(20):
            try:
                made = np.asarray(engine.generate(**HOW).images[0])
            except BudgetError:
                break
            lines.append(engine.placing.line)
            assert torch.cuda.max_memory_reserved(device) <= limit
            peaks.append(torch.cuda.max_memory_allocated(device))
            if not engine.placing.placement.banded:  # which rounds elsewhere
                assert np.array_equal(made, expected), lines[-1]
            engine.placing.budget = engine.placing.placement.peak - 1
        with pytest.raises(torch.OutOfMemoryError):
            torch.empty(2 * GIB, dtype=torch.uint8, device=device)
    assert lines[0].startswith("all resident") and any("streamed" in line for line in lines)
    assert peaks[-1] < peaks[0]
    assert torch.cuda.get_per_process_memory_fraction(device) == 1.0


def test_memory_that_runs_out_anywhere_costs_time_alone(tiny_release, tmp_path, monkeypatch, fails_at):
    """At 20 operations of a request, every second one where parts have to come and go."""
    monkeypatch.setenv("UNIPIC_RUN_CACHE", str(tmp_path))
    with (
        Engine.from_pretrained(tiny_release, device="cuda", dtype="bf16", vram=2) as engine,
        ThreadPoolExecutor(1) as pool,  # a fault may hit what ends torch's inference mode, which is a thread's own
    ):
        pool.submit(fail_at_operations, engine, fails_at).result()


def fail_at_operations(engine, fails_at):
    def run():
        return np.asarray(engine.generate(**HOW).images[0], int)

    expected, refused = run(), []
    tight = int(0.6 * engine.placing.placement.peak)
    for turn, budget in enumerate((2**40, tight)):
        engine.placing.budget = budget
        run()
        with fails_at() as whole:
            run()
        for point in range(10):
            engine.placing.budget, at = budget, 1 + (2 * point + turn) * whole.count // 20
            try:
                with fails_at(at):
                    found = run()
            except BudgetError:
                refused.append(at / whole.count)
                continue
            assert np.abs(found - expected).max() <= 1, at  # decoding in bands rounds elsewhere
    assert np.abs(run() - expected).max() <= 1
    assert all(share > 0.97 for share in refused), "only a picture that is on its way down cannot be made again"


def test_a_new_process_measures_cudas_context():
    context, told = in_a_new_process(
        """
        from unipic_run.engine.budget import context_on, measure_context
        from unipic_run.engine.nvml import free_bytes
        device = torch.device("cuda", 0)
        measure_context(device)
        print(json.dumps([context_on(device), free_bytes(str(torch.cuda.get_device_properties(device).uuid))]))
        """
    )
    assert told is None or CONTEXTS[0] + LATER <= context <= CONTEXTS[1] + LATER


@pytest.mark.skipif(sys.platform != "linux", reason="segments grow on Linux only")
def test_torch_reserves_what_is_foreseen_of_segments_that_grow():
    said, reserved, foreseen = in_a_new_process(
        """
        from unipic_run.engine.allocator import grow_segments
        from unipic_run.engine.segments import GrowingSegments
        device, said, kept, segments = torch.device("cuda", 0), [], [], GrowingSegments()
        grow_segments(device, said.append)
        for size in range(12, 120, 7):
            kept.append(torch.empty(size << 17, dtype=torch.uint8, device=device))
            segments.take(size << 17)
            block, tensor = segments.take(size << 20), torch.empty(size << 20, dtype=torch.uint8, device=device)
            segments.give(block)
            del tensor
        print(json.dumps([said, torch.cuda.memory_reserved(device), segments.reserved]))
        """
    )
    assert said or abs(reserved - foreseen) <= 0.05 * foreseen


def in_a_new_process(code):
    """The JSON that it prints last."""
    code = f"import json, torch\n{textwrap.dedent(code)}"
    plain = {name: value for name, value in os.environ.items() if "ALLOC_CONF" not in name}
    done = subprocess.run([sys.executable, "-P", "-c", code], env=plain, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])
