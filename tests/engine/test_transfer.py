"""Streamed layers under a real stack, with int8 weights, on the meta device, and on a card where there is one."""

import pytest
import torch
from torch import Tensor, nn
from unipic_run.engine.errors import UnipicWarning
from unipic_run.engine.kv_cache import KVCache, Prompts
from unipic_run.engine.layers.attention import Attention
from unipic_run.engine.layers.qwen2 import Qwen2, Qwen2Config
from unipic_run.engine.meter import Meter
from unipic_run.engine.mover import Mover, parts_of
from unipic_run.engine.residency import Placement, Where
from unipic_run.engine.transfer import CudaLanes, Lanes, Pack, lanes, tensors_of
from unipic_run.quant.int8 import Int8Linear, quantise_weight

CPU, META = torch.device("cpu"), torch.device("meta")


def placement(part: str, where: Where) -> Placement:
    """Of a model's one part, which the stage "all" needs and "none" does not."""
    stages = {"all": (part,) if where != "resident" else (), "none": ()}
    return Placement({part: where}, stages, frozenset(), (), 1, False, {}, 0.0, False, 0)


def llm(int8: bool = False) -> nn.Module:
    """A model whose one part is a small Qwen2."""
    torch.manual_seed(1)
    config = Qwen2Config(
        vocab=50, width=64, layers=3, heads=4, kv_heads=2, head_dim=16, mlp=64, rope_theta=1e6, norm_eps=1e-6,
        max_positions=64,
    )  # fmt: skip
    model = nn.ModuleDict({"llm": Qwen2(config, Attention(), round_inv_freq=True)}).requires_grad_(False)
    for layer in model["llm"].layers if int8 else ():
        layer.down = Int8Linear(64, 64, bias=False, group=32)
        layer.down.weight, layer.down.scale = quantise_weight(torch.randn(64, 64), group=32)
    return model


@pytest.mark.parametrize("int8", [False, True])
def test_a_language_model_goes_through_streamed_layers_as_it_is(int8: bool) -> None:
    model = llm(int8)
    x = torch.randn(1, 6, 64)

    @torch.inference_mode()
    def run() -> Tensor:
        cache = KVCache.empty(3, 2, 8, 16, x.dtype, x.device)
        read = model["llm"].extend(x, cache)
        return torch.cat([read, model["llm"](x, Prompts.of(((cache, 1),)))])

    expected, mover = run(), Mover(model, Lanes(CPU))
    mover.place(placement("llm", "streamed"))
    with mover.running():
        mover.enter("all")
        assert run().equal(expected)


def test_on_the_meta_device_the_memory_is_what_residency_says() -> None:
    model = llm().to(META)
    (part,) = parts_of(model, {"llm"})
    assert part == parts_of(llm(), {"llm"})[0] and part.streamed_bytes < part.nbytes and part.stack == 3 * part.layer
    for where, expected in (("streamed", part.streamed_bytes), ("staged", part.nbytes)):
        mover = Mover(model, lanes(META))
        mover.place(placement("llm", where))
        with torch.inference_mode(), Meter() as meter:
            mover.enter("all")
            for layer in model["llm"].layers:
                assert all(tensor.is_meta for *_, tensor in tensors_of(layer.modules()))
            assert meter.current == expected and not meter.calls
            mover.leave()
            assert meter.current == 0
        mover.place(placement("llm", "resident"))


def test_pinned_memory_is_asked_for_in_powers_of_two(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(torch, "empty", lambda size, **how: asked.append((size, how["pin_memory"])))
    for nbytes in (0, 512, 2**20, 93_642_752):
        asked.clear()
        without_a_card().pieces(nbytes)
        assert sum(size for size, _ in asked) == nbytes and all(pinned for _, pinned in asked)
        assert all(size.bit_count() == 1 for size, _ in asked if size > 2**20)
    assert len(asked) < 10


def test_where_no_more_can_be_pinned_weights_wait_in_ordinary_memory_and_it_is_said_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    empty, left = torch.empty, [2**21]

    def pinned(size: int, pin_memory: bool = False, **how: object) -> Tensor:
        left[0] -= size if pin_memory else 0
        if pin_memory and left[0] < 0:
            raise RuntimeError("CUDA error: out of memory\nCompile with ...")
        return empty(size, **how)

    model, lanes = llm(), without_a_card()
    monkeypatch.setattr(torch, "empty", pinned)
    with pytest.warns(UnipicWarning, match=r"no more memory can be pinned \(CUDA error: out of memory\)") as said:
        sizes = [len(piece) for _ in range(2) for piece in lanes.pieces(3 * 2**20 + 512)]
    assert sizes == 2 * [2**21, 2**20, 512] and len(said) == 1
    expected = model.state_dict()["llm.norm.weight"].clone()
    pack = Pack(model.modules(), lanes)
    assert model["llm"].norm.weight.is_meta
    pack.settle(CPU)
    assert model["llm"].norm.weight.equal(expected)


def without_a_card() -> CudaLanes:
    lanes = CudaLanes.__new__(CudaLanes)
    lanes.device, lanes.host, lanes.pins = torch.device("cuda", 0), CPU, True
    return lanes


@pytest.mark.gpu
def test_on_a_card_nothing_is_used_too_early_and_the_host_never_waits() -> None:
    torch.manual_seed(0)
    model, x = nn.ModuleDict({"part": Deep(9, 1024)}).cuda(), torch.randn(4096, 1024, device="cuda")
    run = torch.inference_mode()(lambda: [model["part"](x) for _ in range(20)][-1])
    expected, mover = run(), Mover(model, lanes(x.device))
    for where in ("streamed", "staged", "resident"):
        mover.place(placement("part", where))
        for _ in range(3):
            torch.cuda.set_sync_debug_mode("error")
            try:
                with mover.running():
                    mover.enter("all")
                    found = run()
                    mover.enter("none")
                    torch.full((64, 1024, 1024), float("nan"), device="cuda")  # also where the weights were
            finally:
                torch.cuda.set_sync_debug_mode("default")
            assert found.equal(expected), where


class Deep(nn.Module):
    def __init__(self, depth: int, width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(depth)).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x
