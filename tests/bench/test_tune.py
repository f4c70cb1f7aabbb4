"""The tuning bench without a card: what it would try, what it drops, what it writes; and once on a real one."""

import json
from argparse import Namespace
from types import SimpleNamespace

import pytest
import torch
from unipic_run.bench import against_torch, tune
from unipic_run.engine.gpus import SHARED_PER_BLOCK
from unipic_run.kernels import _tuned
from unipic_run.kernels._op import HAS_TRITON, OPERATORS, recording
from unipic_run.kernels._registry import checks

needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")
DEFAULT = {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 64, "num_warps": 4, "num_stages": 4}
FAST = {"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_K": 32, "num_warps": 4, "num_stages": 2}
WRONG, SPILLING = FAST | {"num_warps": 8}, FAST | {"BLOCK_M": 64}
VERSIONS = {"bench": "ops", "device_name": "a card", "torch": "2", "triton": "3", "cuda": "13"}
KEY = "m512 n1536 k1536"


def staged(options):
    return 2 * options["BLOCK_K"] * (options["BLOCK_M"] + options["BLOCK_N"])


QUESTION = _tuned.Question("int8_linear", KEY, DEFAULT, staged)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_card_it_says_so_and_succeeds(capsys, tmp_path):
    assert tune.main(["--out", str(tmp_path)]) == 0
    said, last = capsys.readouterr().out.splitlines()
    assert "nothing measured" in said and json.loads(last) == {"bench": "tune", "skipped": said}
    assert not list(tmp_path.iterdir())


@needs_triton
def test_classes_are_what_the_real_shapes_ask_for():
    found = {str(one): one for one in tune.classes(None)}
    assert {one.question.kernel for one in found.values()} == set(tune.GRIDS)
    products = found["int8_linear m16384 n1536 k1536"]  # 8320 rows
    assert products.checks and products.question.default["BLOCK_M"] == 64
    assert not any(" m0 " in name for name in found), "only real shapes are worth the time"
    assert {"norm", "norm_int8"} <= {check.operator.name for check in found["norm d1536"].checks}
    assert len({str(check) for check in products.checks}) == len(products.checks)
    assert {one.question.kernel for one in tune.classes(["norm"])} == {"norm"}


@needs_triton
def test_candidates_could_all_be_right_and_come_in_a_fixed_order():
    for one in tune.classes(["attention", "int8_weight", "norm"]):
        some = tune.candidates(one.question, 89)
        assert some == tune.candidates(one.question, 89) and some[0] == one.question.default
        assert len(some) == len({tuple(sorted(x.items())) for x in some}) > 2
        for options in some[1:]:
            _tuned.check(options, one.question, SHARED_PER_BLOCK[89])
    some = tune.candidates(QUESTION, 89, [FAST, {"num_warps": 8}])
    assert some[:2] == [DEFAULT, FAST], "what won elsewhere is tried early, if it is of the same options"
    assert len(tune.candidates(QUESTION, 80)) > len(some), "an A100's block may have more shared memory"
    assert tune.shared_bytes(75) == SHARED_PER_BLOCK[89]


def settings(**named):
    return Namespace(**{"repeat": 1, "jobs": 2, "most": 40} | named)


@pytest.fixture
def bench(monkeypatch):
    """Without compiler and clock: FAST is 3 times as fast as the heuristic, WRONG would be 10 times as fast."""
    seconds = {str(DEFAULT): 30e-6, str(FAST): 10e-6, str(WRONG): None}
    log = []

    def measured(kernel, options, prepared, repeat):
        log.append(options)
        return seconds.get(str(options), 40e-6)

    monkeypatch.setattr(tune, "remembered", lambda check: check)
    monkeypatch.setattr(tune, "measured", measured)
    monkeypatch.setattr(tune, "compiled", lambda one, some, capability, each: [x != SPILLING for x in some])
    return SimpleNamespace(log=log, seconds=seconds)


def test_the_fastest_of_what_is_right_wins(bench):
    some = [DEFAULT, SPILLING, WRONG, FAST, DEFAULT | {"num_warps": 8}]
    row = tune.best_of(tune.Class(QUESTION), some, settings(), 89, float("inf"), map)
    assert row["options"] == FAST and row["seconds"] == 10e-6 and row["heuristic_seconds"] == 30e-6
    assert (row["tried"], row["dropped"], row["late"], row["problem"]) == (5, 2, False, "")
    assert SPILLING not in bench.log, "what spills is never run"
    assert "10.0" in tune.line(row) and "BLOCK_M=128" in tune.line(row)


def test_a_heuristic_that_is_wrong_is_a_failure(bench):
    bench.seconds[str(DEFAULT)] = None
    row = tune.best_of(tune.Class(QUESTION), [DEFAULT, FAST], settings(), 89, float("inf"), map)
    assert "disagrees" in row["problem"] and bench.log == [DEFAULT] and "disagrees" in tune.line(row)


def test_when_the_time_is_up_the_heuristic_has_still_been_measured(bench):
    row = tune.best_of(tune.Class(QUESTION), [DEFAULT, SPILLING, FAST], settings(), 89, 0.0, map)
    assert row["late"] and row["tried"] == 2 and row["options"] == DEFAULT and "out of time" in tune.line(row)


def test_little_gain_lists_nothing(bench):
    bench.seconds[str(FAST)] = 29.7e-6
    row = tune.best_of(tune.Class(QUESTION), [DEFAULT, FAST], settings(), 89, float("inf"), map)
    assert row["options"] == DEFAULT


@needs_triton
def test_what_is_written_is_what_kernels_then_use(bench, tmp_path, monkeypatch):
    path = tmp_path / "sm_89.json"
    other = {"options": {"num_warps": 2}, "microseconds": 3.0}
    stale = {"options": {"num_warps": 2}, "microseconds": 3.0}
    path.write_text(
        json.dumps(
            {"source": "heuristic", "shared_bytes": 1, "kernels": {"norm": {"d8": other}, "int8_linear": {"m1": stale}}}
        )
    )
    rows = [
        tune.best_of(tune.Class(QUESTION), [DEFAULT, FAST], settings(), 89, float("inf"), map),
        tune.best_of(
            tune.Class(_tuned.Question("int8_linear", "m1", DEFAULT, None)), [DEFAULT], settings(), 89, 0, map
        ),
    ]
    tune.write(path, 89, rows, VERSIONS)
    table = _tuned.read(path)
    assert table["source"] == "measured" and table["device_name"] == "a card" and table["shared_bytes"] == 101376
    entry = table["kernels"]["int8_linear"].pop(KEY)
    assert entry == {"options": FAST, "microseconds": 10.0, "heuristic_microseconds": 30.0}
    assert table["kernels"] == {"norm": {"d8": other}, "int8_linear": {}}, "the rest stays, what lost is taken out"
    assert list(tmp_path.iterdir()) == [path]
    monkeypatch.setattr(_tuned, "FOLDER", tmp_path)
    check = next(c for c in checks("gpu") if str(c) == "int8_linear: head fc1, 400 rows")
    try:
        _tuned.forget()
        with recording() as launches:
            check.operator.op(*tune.on_meta(check))
        assert {name: launches[0].options[name] for name in FAST} == FAST
    finally:
        monkeypatch.undo()
        _tuned.forget()


@needs_triton
def test_candidates_are_compiled_in_every_case_and_dropped_for_any_fault(monkeypatch):
    faults = {1: {"error": "no"}, 2: {"spilled": 8, "shared": 1}, 4: {"spilled": 0, "shared": 200_000}}
    asked = []

    def build(configuration, capability):
        asked.append(configuration.key)
        return faults.get(configuration.key[0], {"spilled": 0, "shared": 1})

    monkeypatch.setattr(tune, "build", build)
    monkeypatch.setattr(
        tune,
        "specialised",
        lambda launch, module: SimpleNamespace(key=(launch.options["num_warps"], launch.options["INT8"])),
    )
    (one,) = (one for one in tune.classes(["norm"]) if one.question.key == "d1536")
    some = [{"num_warps": n} for n in (1, 2, 4, 8)]
    assert list(tune.compiled(one, some, 89, map)) == [False, False, False, True]
    assert set(asked) == {(n, int8) for n in (1, 2, 4, 8) for int8 in (False, True)} and len(asked) == 8


def test_arguments_and_reference_are_made_once(monkeypatch):
    monkeypatch.setattr(tune.ops, "DEVICE", "cpu")
    check = next(c for c in checks("interp") if c.operator.name == "norm")
    made = tune.remembered(check)
    assert made.case.make("cpu") is made.case.make("cpu")
    wide = [tune.agreement.__globals__["wide"](x) for x in made.case.make("cpu")]
    assert made.reference(*wide) is made.reference(*wide)
    assert torch.equal(made.reference(*wide), check.reference(*wide))


@pytest.fixture
def stopwatch(monkeypatch):
    """On the CPU: our paths take the seconds given for an operator, those of torch 20 us."""
    ours = {"norm": 30e-6, "gated_add": 20.2e-6, "swiglu": 10e-6}
    monkeypatch.setattr(tune.ops, "DEVICE", "cpu")
    for operator in [OPERATORS[f"unipic::{name}"] for name in ours]:
        monkeypatch.setattr(operator, "triton", operator.torch)

    def seconds(function, repeat, before=None):
        function()
        name = next(x.cell_contents.name for x in function.__closure__ if hasattr(x.cell_contents, "cost"))
        return 20e-6 if "torch" in function.__code__.co_names else ours[name]

    monkeypatch.setattr(tune.ops, "seconds", seconds)
    monkeypatch.setattr(against_torch, "agreement", lambda check, device, kernel: SimpleNamespace(holds=True))
    monkeypatch.setattr(against_torch, "waits", lambda function: function() is NotImplemented)
    return ours


@needs_triton
def test_what_torch_is_faster_at_is_listed_as_torchs(stopwatch, monkeypatch, tmp_path, capsys):
    some = [c for c in checks("interp") if c.operator.name in stopwatch]
    rows = list(against_torch.calls_beside_torch(some, set(stopwatch) - {"swiglu"}, 1))
    assert {row["operator"] for row in rows} == {"norm", "gated_add"} and not any(row["problem"] for row in rows)
    assert len(rows) == len({(row["operator"], row["key"]) for row in rows}) > 2
    stale, kept = {"norm": {rows[-1]["key"]: {}, "other": {"microseconds": 1.0}}, "gated_add": {"x": {}}}, "other"
    table = against_torch.listed(stale | {"swiglu": {}}, rows)
    assert table.keys() == {"norm", "gated_add"} and table["gated_add"] == {"x": {}}, "1 % is noise"
    assert table["norm"].keys() == {row["key"] for row in rows if row["operator"] == "norm"} | {kept}
    path = tmp_path / "sm_89.json"
    tune.write(path, 89, [], VERSIONS, rows)
    assert _tuned.read(path)["torch"].keys() == {"norm"}
    said = capsys.readouterr().out.splitlines()
    assert all(line.endswith("  torch") == line.startswith("norm ") for line in said), "what is listed is marked"
    stopwatch["norm"] = 20e-6  # after better options were found
    tune.write(path, 89, [], VERSIONS, against_torch.calls_beside_torch(some, {"norm"}, 1))
    assert _tuned.read(path)["torch"] == {}


@needs_triton
@pytest.mark.parametrize("fault", ["waits", "wrong", "fails"])
def test_a_torch_path_that_waits_or_a_kernel_that_is_wrong_lists_nothing(stopwatch, monkeypatch, fault):
    if fault == "waits":
        monkeypatch.setattr(against_torch, "waits", lambda function: True)
    elif fault == "wrong":
        monkeypatch.setattr(against_torch, "agreement", lambda check, device, kernel: SimpleNamespace(holds=False))
    else:
        monkeypatch.setattr(tune.ops, "seconds", lambda *how: exec("raise RuntimeError('out of resource: shared')"))
    rows = list(against_torch.calls_beside_torch([c for c in checks("interp") if c.operator.name == "norm"], None, 1))
    assert rows and all(row["problem"] for row in rows) and against_torch.listed({}, rows) == {}


@pytest.mark.gpu
@needs_triton
def test_on_a_card_a_table_is_measured(capsys, tmp_path):
    few = ["--most", "3", "--repeat", "3", "--jobs", "1", "--minutes", "1"]
    assert tune.main(["--only", "norm", *few, "--out", str(tmp_path)]) == 0
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert summary["passed"] and all(row["heuristic_seconds"] > 0 for row in summary["rows"])
    (path,) = tmp_path.iterdir()
    assert _tuned.read(path)["source"] == "measured"
