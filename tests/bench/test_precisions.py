"""What 8 bits cost is told of the same pictures in every precision, and a loss that is certain fails."""

import json

import pytest
from unipic_run.bench import paired, precisions


def asked(out, *more):
    return ["--each", "1", "--device", "cpu", "--only", "int8", "--out", str(out), *more]


def test_every_precision_makes_the_same_prompts(capsys, tmp_path):
    out = tmp_path / "prices.json"
    assert precisions.main(asked(out)) == 0
    told = json.loads(capsys.readouterr().out)
    assert told == json.loads(out.read_text()) and told["pictures"] == 6 and told["quant"] == ["bf16", "int8"]
    assert told["ways"]["bf16"]["lost"] == 0.0 and told["passed"]


@pytest.mark.parametrize(("wrong", "status"), [(600, 1), (6, 0)])
def test_a_certain_loss_of_more_than_a_point_fails(capsys, monkeypatch, tmp_path, wrong, status):
    def turn(self, ways, samples):
        self.right = {"bf16": "1" * 600, "int8": "0" * wrong + "1" * (600 - wrong)}
        self.seconds = {"bf16": 1.0, "int8": 1.0}

    monkeypatch.setattr(paired.Series, "turn", turn)
    monkeypatch.setattr(paired, "generations", lambda *given: [])
    assert precisions.main(asked(tmp_path / "prices.json")) == status
    assert json.loads(capsys.readouterr().out)["lost more"] == ["int8"] * status
