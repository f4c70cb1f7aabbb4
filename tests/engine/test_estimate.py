"""`unipic-run plan`: predictions for the released model, which is not on this machine."""

import json

import pytest
from unipic_run.cli import main
from unipic_run.engine.budget import CONTEXT, MARGIN
from unipic_run.engine.errors import BudgetError, UsageError
from unipic_run.engine.estimate import estimate
from unipic_run.kernels import _tuned

GIB = 2**30
SMALL = {"res": 256, "steps": 2}


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("UNIPIC_RUN_CACHE", str(tmp_path_factory.getbasetemp() / "estimate"))


def test_the_command_tells_what_the_function_says(capsys):
    expected = estimate("unipic", "gen", **SMALL)
    assert main(["plan", "gen", "--res", "256", "--steps", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(expected))
    assert main(["plan", "gen", "--res", "256", "--steps", "2"]) == 0
    said = capsys.readouterr()
    assert [line.split()[0] for line in said.out.splitlines()[:4]] == ["stage", "condition", "sample", "decode"]
    assert "all resident" in said.out and "not measured" in said.err
    assert set(expected["stages"]) == {"condition", "sample", "decode"} and expected["gpu"] == "rtx4090"


def test_shortcuts_are_planned_and_those_of_other_models_refused():
    exact, short = (estimate("unipic", "gen", **SMALL, shortcuts=s) for s in (None, {"head_steps": (10, 5)}))
    assert short["head_steps"] == (10, 5) and exact["head_steps"] is None
    fast = estimate("unipic", "gen", res=256, shortcuts={"speed": "fast", "order": "random"})
    assert (fast["steps"], fast["head_steps"], fast["order"]) == (24, (20, 10), "random"), "of 32 rounds, 100 steps"
    assert estimate("deepgen", "gen", res=256, shortcuts={"speed": "fast"})["steps"] == 18, "of 50"
    assert short["stages"]["sample"]["launches"] < 0.5 * exact["stages"]["sample"]["launches"]
    with pytest.raises(UsageError, match="order gtr has no meaning for this model"):
        estimate("deepgen", "gen", shortcuts={"order": "gtr"})
    with pytest.raises(UsageError, match=r"block_cache 0.1 has no meaning for this model: leave it out; it knows"):
        estimate("unipic", "gen", shortcuts={"block_cache": 0.1})
    with pytest.raises(UsageError, match="a question is not sampled"):
        estimate("unipic", "ask", shortcuts={"order": "gtr"})


def test_what_a_card_leaves_to_torch_is_said(capsys, monkeypatch, tmp_path):
    listed = {"norm": {"bfloat16 512x1536 1536 True": {}, "bfloat16 64x1536 1536 True": {}}, "gated_add": {"x": {}}}
    table = {"source": "measured", "shared_bytes": 1, "kernels": {}, "torch": listed}
    (tmp_path / "sm_89.json").write_text(json.dumps(table))
    monkeypatch.setattr(_tuned, "FOLDER", tmp_path)
    try:
        for gpu, said in (("rtx4090", True), ("rtx3060", False)):
            _tuned.forget()
            assert main(["plan", "gen", "--res", "256", "--steps", "2", "--gpu", gpu]) == 0
            assert ("by torch on this card: 3 kinds of norm, gated_add" in capsys.readouterr().out) == said
        assert estimate("unipic", "gen", **SMALL)["left_to_torch"] == {
            name: sorted(kinds) for name, kinds in listed.items()
        }
    finally:
        monkeypatch.undo()
        _tuned.forget()


def test_reserved_memory_and_graphs_are_told_beside_the_peak():
    whole, tight = (estimate("unipic", "gen", **SMALL, quant="int8", vram=vram) for vram in (None, 1.6))
    for found in (whole, tight):
        room = found["vram_bytes"] - CONTEXT
        assert all(stage["peak_bytes"] <= stage["reserved_bytes"] <= room for stage in found["stages"].values())
        assert found["placement"]["peak_bytes"] <= found["placement"]["reserved_bytes"] <= room
    graphs = whole["graphs"]["pool"] + whole["graphs"]["kept"]
    most = max(stage["reserved_bytes"] for stage in whole["stages"].values())
    assert whole["graphs"]["fit"] and whole["placement"]["reserved_bytes"] == most + graphs > most
    assert 0 < tight["graphs"]["kept"] < whole["graphs"]["kept"], "streamed rounds are not captured"
    asked, slow = (estimate("unipic", "ask", res=256, vram=vram) for vram in (None, 1.6))
    assert asked["graphs"]["fit"] and 0 < asked["graphs"]["kept"] < 2**21 and asked["graphs"]["pool"] >= 2**21
    assert slow["graphs"] == {"pool": 0, "kept": 0, "fit": False}, "nor is a token whose layers are streamed"
    seen = estimate("unipic", "ask", vram=5)
    assert seen["placement"]["where"]["mar_encoder"] == "streamed" != seen["placement"]["where"]["llm"]
    assert seen["graphs"]["kept"] > 0, "what only looks at the picture does not matter"
    assert asked["steps"] is None and asked["max_new_tokens"] == 64 and "max_new_tokens" not in whole


def test_less_memory_moves_more_and_takes_longer():
    whole, tight = (estimate("unipic", "gen", **SMALL, quant="int8", vram=vram) for vram in (None, 1.6))
    assert tight["placement"]["peak_bytes"] < 1.1 * GIB < whole["placement"]["peak_bytes"]
    assert tight["placement"]["seconds"] > whole["placement"]["seconds"]
    waits = [found["placement"]["waiting_seconds"] for found in (whole, tight)]
    assert waits[0] == pytest.approx(0.0, abs=1e-9) and waits[1] > 0.1
    assert "streamed" in tight["placement"]["line"]


def test_quant_auto_plans_what_the_engine_would_take(capsys, monkeypatch):
    monkeypatch.setattr("unipic_run.engine.choosing.has_bitsandbytes", lambda: False)
    for vram, quant in ((None, "none"), ("auto", "none"), (4, "int8")):
        said = []
        found = estimate("unipic", "gen", **SMALL, quant="auto", vram=vram, say=said.append)
        assert found == estimate("unipic", "gen", **SMALL, quant=quant, vram=vram)
        assert found["quant"] == quant and said[0].startswith(f"quant auto: {quant}, 256x256 takes")
        assert found["vram_bytes"] == {None: 24 * GIB, "auto": 24 * GIB - MARGIN, 4: 4 * GIB}[vram]
    assert main(["plan", "edit", "--res", "256", "--steps", "2", "-n", "4", "--quant", "auto", "--vram", "4"]) == 0
    assert "quant auto: int8, 4 edits of 256x256 take" in capsys.readouterr().err
    monkeypatch.setattr("unipic_run.engine.estimate.choose", lambda *_, **__: ("nf4", "so"))
    with pytest.raises(UsageError, match="nf4 is what the engine would take there"):
        estimate("unipic", "gen", **SMALL, quant="auto")


@pytest.mark.parametrize("options", [("--steps", "3"), ("-n", "2")])
def test_the_command_refuses_what_no_question_has(options, capsys):
    assert main(["plan", "ask", *options]) == 2 and "a question is not sampled" in capsys.readouterr().err


@pytest.mark.parametrize("task", ["edit", "ask"])
def test_other_tasks(task):
    found = estimate("unipic", task, res=256, steps=2, gpu="RTX 3060")
    assert found["placement"]["peak_bytes"] > 4 * GIB and all(stage["flop"] > 0 for stage in found["stages"].values())


def test_what_cannot_be_planned_is_refused():
    with pytest.raises(BudgetError, match="are the least"):
        estimate("unipic", "gen", **SMALL, vram=1.1)
    with pytest.raises(UsageError, match=r"known are .*rtx4090"):
        estimate("unipic", "gen", **SMALL, gpu="rtx 9999")
    with pytest.raises(UsageError, match=r"no plan for .paint"):
        estimate("unipic", "paint", **SMALL)
    for task in ("gen", "edit", "ask"):  # before a dry run of minutes
        with pytest.raises(UsageError, match="the model has 32768"):
            estimate("unipic", task, res=4096)
    with pytest.raises(UsageError, match="nothing is known of a model"):
        estimate("flux", "gen", **SMALL)
