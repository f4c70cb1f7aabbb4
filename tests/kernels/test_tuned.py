"""Tables of measured options: that an entry changes what is launched, and that a wrong one changes nothing."""

import fnmatch
import json
import tomllib
import warnings
from pathlib import Path

import pytest
import torch
from unipic_run.bench.tune import GRIDS
from unipic_run.engine.gpus import SHARED_PER_BLOCK
from unipic_run.kernels import _tuned
from unipic_run.kernels._op import HAS_TRITON, OPERATORS, Cost, KernelWarning, Operator, recording
from unipic_run.kernels._registry import checks
from unipic_run.kernels.int8_linear import int8_linear
from unipic_run.kernels.int8_to_groups import int8_linear_to_groups
from unipic_run.kernels.norms import rms_norm

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = sorted((ROOT / "kernels" / "tuned").glob("*.json"))
KEY = "m512 n1536 k1536"
GIVEN = {"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_K": 64, "num_warps": 8, "num_stages": 2}
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")


@pytest.fixture
def table(tmp_path, monkeypatch):
    """Writes a table of sm_89, which the meta device goes by, and has it read."""
    monkeypatch.setattr(_tuned, "FOLDER", tmp_path)
    _tuned.forget()

    def write(kernels, **named):
        whole = {"source": "measured", "shared_bytes": 101376, "kernels": kernels} | named
        (tmp_path / "sm_89.json").write_text(whole if isinstance(whole, str) else json.dumps(whole))
        _tuned.forget()

    yield write
    monkeypatch.undo()
    _tuned.forget()


def product(rows: int = 400) -> dict[str, int]:
    """The options of an int8 product of a head's rows on the meta device."""
    with recording() as launches:
        like = {"device": "meta"}
        x, weight = (torch.empty(n, 1536, dtype=torch.int8, **like) for n in (rows, 1536))
        int8_linear(x, torch.empty(rows, **like), weight, torch.empty(1536, **like))
    (launch,) = launches
    return {name: launch.options[name] for name in GIVEN} | {"grid": launch.grid[0]}


@needs_triton
def test_an_entry_changes_what_is_launched_and_nothing_else(table):
    heuristic, other = product(), product(33)
    table({"int8_linear": {KEY: {"options": GIVEN, "microseconds": 12.5}}})
    assert product() == GIVEN | {"grid": 4 * 24} != heuristic
    assert product(33) == other, "another class of rows"
    table({"int8_linear": {KEY: {"options": {"num_warps": 8}}}})
    assert product() == heuristic | {"num_warps": 8}, "an entry need not name everything"


@needs_triton
@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"BLOCK_Q": 64}, "not some of"),
        ({"GROUP_M": 8}, "not some of"),
        ({}, "not some of"),
        ([128, 64], "not some of"),
        ({"BLOCK_M": 96}, "not a power of two"),
        ({"num_warps": 3}, "not a power of two"),
        ({"BLOCK_M": 8}, "from 16 to 1024"),
        ({"BLOCK_M": 4096}, "from 16 to 1024"),
        ({"BLOCK_M": "128"}, "not a whole number"),
        ({"BLOCK_M": 64.0}, "not a whole number"),
        ({"num_warps": True}, "not a whole number"),
        ({"num_stages": 0}, "from 1 to 8"),
        ({"BLOCK_M": 128, "BLOCK_N": 256, "BLOCK_K": 128, "num_stages": 3}, "196608 bytes of shared memory"),
    ],
)
def test_an_entry_that_cannot_be_right_is_ignored_with_one_warning(table, options, said):
    heuristic = product()
    table({"int8_linear": {KEY: {"options": options}}})
    with pytest.warns(KernelWarning, match=said) as raised:
        assert product() == product() == heuristic
    assert len(raised) == 1 and KEY in str(raised[0].message)


@needs_triton
@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        "{}",
        '{"source": "guessed"}',
        '{"source": "measured", "kernels": {}}',
        '{"source": "measured", "shared_bytes": 101376, "kernels": {}, "torch": ["norm"]}',
    ],
)
def test_a_table_that_cannot_be_read_is_ignored_with_one_warning(table, tmp_path, text):
    heuristic = product()
    (tmp_path / "sm_89.json").write_text(text)
    _tuned.forget()
    with pytest.warns(KernelWarning, match="not used") as raised:
        assert product() == product() == heuristic
    assert len(raised) == 1


@needs_triton
def test_no_card_is_asked_for_where_there_is_none(table, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: pytest.fail("asked"))
    table({"norm": {"d1536": {"options": {"num_warps": 2}}}})
    with recording() as launches:
        rms_norm(torch.empty(5, 1536, device="meta"), torch.empty(1536, device="meta"), 1e-6)
    assert launches[0].options["num_warps"] == 2


def test_every_card_has_its_own_table(table, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: ((8, 9), (12, 0))[index])
    _tuned._capability.cache_clear()
    table({"norm": {"d8": {"options": {"num_warps": 1}}}})
    found = [_tuned.tuned("norm", "d8", {"num_warps": 4}, torch.device("cuda", index)) for index in (0, 1)]
    _tuned._capability.cache_clear()
    assert found == [{"num_warps": 1}, {"num_warps": 4}]


@needs_triton
def test_options_can_be_tried_and_questions_heard(table):
    with _tuned.asking() as questions:
        heuristic = product()
    assert [(q.kernel, q.key) for q in questions] == [("int8_linear", KEY)]
    assert {name: heuristic[name] for name in GIVEN} == questions[0].default
    table({"int8_linear": {KEY: {"options": {"num_warps": 8}}}})
    with _tuned.trying("int8_linear", GIVEN), _tuned.trying("norm", {"num_warps": 1}):
        assert product() == GIVEN | {"grid": 4 * 24}
    assert product()["num_warps"] == 8


@needs_triton
def test_kernels_with_candidates_ask():
    asked = set()
    for check in checks("interp"):
        with _tuned.asking() as questions:
            check.operator.op(*[x.to("meta") if isinstance(x, torch.Tensor) else x for x in check.case.make("cpu")])
        asked |= {question.kernel for question in questions}
    assert asked >= GRIDS.keys() >= {"attention", "int8_linear", "int8_to_groups", "int8_of_groups", "int8_to_heads"}


@needs_triton
def test_a_layout_that_a_kernel_depends_on_is_not_to_be_tuned(table):
    like = {"device": "meta"}
    x, weight = (torch.empty(n, 1536, dtype=torch.int8, **like) for n in (400, 2560))
    given = x, torch.empty(400, **like), weight, torch.empty(2560, **like)
    for options, said in (({"BLOCK_N": 128}, "not some of"), ({"BLOCK_M": 64, "num_stages": 2}, None)):
        table({"int8_to_groups": {"none m512 n2560 k1536": {"options": options}}})
        with recording() as launches, warnings.catch_warnings(record=True) as raised:
            warnings.simplefilter("always")
            int8_linear_to_groups(*given)
        assert launches[0].options["BLOCK_N"] == 256 and launches[0].options["num_stages"] == (3 if said else 2)
        assert [said in str(one.message) for one in raised] == [True] * bool(said)


class OnCard(torch.Tensor):
    """Says that it is on the second of two cards."""

    device = property(lambda self: torch.device("cuda", 1))
    is_cuda = True


@pytest.fixture
def two_cards(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: ((9, 0), (8, 9))[index])
    _tuned._capability.cache_clear()
    yield
    _tuned._capability.cache_clear()


@needs_triton
def test_calls_that_torch_was_faster_at_are_torchs_on_that_card_and_no_others(table, two_cards):
    taken = []
    paths = {name: lambda x, flag, name=name: taken.append(name) or x.clone() for name in ("torch", "triton")}
    operator = Operator("planted_slow(Tensor x, bool flag) -> Tensor", **paths, cost=Cost)
    x = torch.ones(400, 8)
    measured = {"float32 512x8 True": {"microseconds": 9.0, "torch_microseconds": 7.0}}
    try:
        for listed in ({}, {"planted_slow": measured}):
            table({}, torch=listed)
            for rows, flag in ((400, True), (500, True), (600, True), (400, False)):
                operator(torch.ones(rows, 8).as_subclass(OnCard), flag)
        operator(x, True)
        operator(x.to("meta"), True)
    finally:
        del OPERATORS["unipic::planted_slow"]
    ours = "triton"
    assert taken == [ours] * 4 + ["torch", "torch", ours, ours] + ["torch", ours], "the CPU is torch's anyway"


def test_classes_of_calls():
    x, weight = torch.empty(2, 3, 50, 80, dtype=torch.float16), torch.empty(4, 80, dtype=torch.int8)
    words = _tuned.call_class((x, x, weight, None, 1e-6, 7, True, torch.bfloat16, torch.empty(0, 5), torch.tensor(1)))
    assert words == "float16 512x80 512x80 int8 4x80 True bfloat16 float32 0x5 int64 1x1"


def test_row_classes():
    assert [_tuned.row_class(n) for n in (0, 1, 2, 33, 400, 4160, 8320)] == [0, 1, 2, 64, 512, 8192, 16384]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_tables_are_whole_and_honest(path):
    table = _tuned.read(path)
    assert table["shared_bytes"] == SHARED_PER_BLOCK[int(path.stem.removeprefix("sm_"))]
    if table["source"] == "heuristic":
        assert not table["kernels"], "what was not measured is in the kernel's own file"
        assert not table.get("torch"), "nobody knows yet where torch is faster"
    else:
        assert {"device_name", "torch", "triton", "date"} <= table.keys()
        assert all(entry["microseconds"] > 0 for entries in table["kernels"].values() for entry in entries.values())


@needs_triton
def test_shipped_entries_are_all_accepted():
    if not any(_tuned.read(path)["kernels"] for path in SHIPPED):
        pytest.skip("no table has an entry: nothing was tuned on a card so far")
    with warnings.catch_warnings():
        warnings.simplefilter("error", KernelWarning)
        _tuned.forget()
        product()
        for check in checks("interp"):
            check.operator.op(*[x.to("meta") if isinstance(x, torch.Tensor) else x for x in check.case.make("cpu")])


def test_tables_are_in_the_wheel():
    data = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["setuptools"]["package-data"]
    packed = {
        path for path in SHIPPED for glob in data["unipic_run.kernels"] if fnmatch.fnmatch(f"tuned/{path.name}", glob)
    }
    assert SHIPPED and packed == set(SHIPPED)
