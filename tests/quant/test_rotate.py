"""The rotation: real Hadamard matrices, weights that do not depend on how they are cut, a model that stays the same."""

import pytest
import torch
from unipic_run.engine.layers.linear import logits
from unipic_run.quant.recipe import Rotation
from unipic_run.quant.rotate import Folding, RotatedEmbedding, factors, hadamard, rotate


@pytest.mark.parametrize("order", [4, 12, 20, 24, 28])
def test_paley_matrices_are_hadamard_matrices(order):
    matrix = hadamard(order)
    assert set(matrix.unique().tolist()) == {-1.0, 1.0}
    assert torch.equal(matrix @ matrix.T, order * torch.eye(order))


def test_orders_without_a_construction_are_refused():
    for order in (2, 6, 14, 16, 52):
        with pytest.raises(ValueError, match=f"order {order}"):
            hadamard(order)
    assert [factors(width) for width in (64, 1536, 2048, 192, 3584)] == [
        (1, 64),
        (12, 128),
        (1, 2048),
        (12, 16),
        (28, 128),
    ]
    with pytest.raises(ValueError, match="width 7 has no"):
        factors(7)


@pytest.mark.parametrize("width", [8, 48, 112, 192, 1536])
def test_the_rotation_is_orthogonal_and_spreads_every_channel(width):
    rotation = rotate(torch.eye(width, dtype=torch.float64))  # Q itself
    some = rotation[:: width // 8]
    assert torch.allclose(some @ rotation.T, torch.eye(width, dtype=torch.float64)[:: width // 8], atol=1e-12)
    assert torch.allclose(rotation.abs(), torch.full_like(rotation, width**-0.5), atol=1e-12)
    # A constant offset of all channels must not end up in one.
    assert rotate(torch.ones(1, width)).abs().max() < 0.3 * width**0.5 + 2


def test_parts_of_a_weight_are_rotated_as_the_whole():
    weight = torch.randn(77, 1536, generator=torch.Generator().manual_seed(0)).bfloat16()
    whole = rotate(weight.float())
    assert torch.equal(torch.cat([rotate(part.float()) for part in weight.split([1, 30, 46])]), whole)
    assert rotate(weight).dtype == torch.bfloat16 and torch.equal(rotate(weight), whole.bfloat16())


def test_what_a_stream_says_is_the_same_after_folding():
    """table -> stream; + writer(stream); reader(norm(stream)); logits: every equation at the top of the file."""
    noise, width = torch.Generator().manual_seed(0), 48

    def random(*shape):
        return torch.randn(*shape, generator=noise, dtype=torch.float64)

    def normed(x, gain):
        return x / x.square().mean(-1, keepdim=True).sqrt() * gain

    def run(tensors, mix):
        x = tensors["e.weight"][[3, 1, 4]]
        x = x + torch.tanh(normed(x, tensors["n.weight"]) @ tensors["r.weight"].T) @ tensors["w.weight"].T
        x = normed(x + tensors["w.bias"], tensors["l.weight"])
        return x @ tensors["o.weight"].T, (x if mix is None else x @ mix.T) @ tensors["e.weight"].T

    stored = {"e.weight": random(9, width), "n.weight": 1 + random(width), "r.weight": random(20, width)}
    stored |= {"w.weight": random(width, 20), "w.bias": random(width), "l.weight": 1 + random(width)}
    stored |= {"o.weight": random(5, width)}
    rotation = Rotation(table="e", writers=("w",), readers=(("n", "r"), ("l", "o")), last="l")
    fold = Folding(rotation, ["e", "n", "r", "w", "l", "o"])
    gains = {name: stored[name] for name in fold.norms}
    made = {}
    for name, tensor in stored.items():
        assert fold.changes(name)
        made |= fold(name, tensor, gains)
    assert all((made[name] == 1).all() for name in ("n.weight", "l.weight"))
    for before, after in zip(run(stored, None), run(made, made["e.mix"]), strict=True):
        assert (after - before).abs().max() < 1e-12 * before.abs().max()

    table = RotatedEmbedding(9, width).double()
    table.load_state_dict({"weight": made["e.weight"], "mix": made["e.mix"]})
    hidden = normed(random(2, width), made["l.weight"])
    assert torch.allclose(logits(hidden, table), hidden @ made["e.mix"].T @ made["e.weight"].T)


def test_a_name_that_no_module_has_is_refused():
    with pytest.raises(ValueError, match="no module is called x"):
        Folding(Rotation("e", writers=("x",), readers=(), last="l"), ["e", "l"])
