"""The meter against counts by hand, torch's own counter and a run on real tensors; and the cards' rates."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from unipic_run.bench.random_model import any_tokens, architecture, fill
from unipic_run.engine import families, gpus
from unipic_run.engine.meter import Call, Meter
from unipic_run.engine.noise import PhiloxNoise
from unipic_run.engine.task import Batch, Task
from unipic_run.kernels._op import OPERATORS, NotCompiled, interpreted
from unipic_run.kernels.attention import attention
from unipic_run.kernels.norms import rms_norm


@pytest.fixture(autouse=True)
def inference():
    with torch.inference_mode():
        yield


def meta(*shape, dtype=torch.bfloat16):
    return torch.empty(*shape, dtype=dtype, device="meta")


def test_counts_by_hand():
    x, weight, bias = meta(6, 4), meta(5, 4), meta(5)
    with Meter() as meter:
        y = F.linear(x, weight, bias)  # (6, 5)
        F.silu(y.view(2, 3, 5).transpose(0, 1)[1:])  # views are free; 2 x 2 x 5 values are read and written
        y.add_(1)
        y.addmm_(x, weight.t())  # reads what it adds to
        torch.empty_like(y)
    read = 2 * (6 * 4 + 5 * 4 + 5)
    assert meter.calls == {
        Call("", "matmul", "bf16", "addmm", (6, 5), 2 * 6 * 5 * 4, read + 60, 1): 1,
        Call("", "matmul", "bf16", "addmm_", (6, 5), 2 * 6 * 5 * 4, read - 2 * 5 + 120, 1): 1,
        Call("", "elementwise", "bf16", "silu", (2, 2, 5), 0, 80, 1): 1,
        Call("", "elementwise", "bf16", "add_", (6, 5), 0, 120, 1): 1,
    }


def test_lookups_do_not_read_the_table():
    table, ids = meta(1000, 8), torch.zeros(3, dtype=torch.int64, device="meta")
    with Meter() as meter:
        F.embedding(ids, table)
        table[ids]
    assert [(call.kind, call.nbytes) for call in meter.calls] == [("movement", 2 * 3 * 8 * 2)] * 2


def test_resizing_is_the_one_operation_that_it_is_on_a_card():
    x = meta(1, 8, 4, 4)
    with Meter() as meter:
        F.interpolate(x, scale_factor=2.0, mode="nearest")
        F.interpolate(x, size=(8, 8), mode="bilinear", align_corners=False)
    expected = [("movement", name, 2 * 8 * (16 + 64), 1) for name in ("upsample_nearest2d", "upsample_bilinear2d")]
    assert [(call.kind, call.name, call.nbytes, call.launches) for call in meter.calls] == expected


class Network(nn.Module):
    """One of everything that has a formula."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, stride=2, padding=1, groups=1)
        self.grouped = nn.Conv2d(8, 16, 3, groups=4)
        self.up = nn.ConvTranspose2d(16, 16, 2, stride=2)
        self.norm, self.qkv, self.out = nn.LayerNorm(16), nn.Linear(16, 48), nn.Linear(16, 5, bias=False)

    def forward(self, x):
        x = self.up(self.grouped(self.conv(x))).flatten(2).transpose(1, 2)
        q, k, v = (part.unflatten(-1, (2, 8)).transpose(1, 2) for part in self.qkv(self.norm(x)).chunk(3, dim=-1))
        mixed = F.scaled_dot_product_attention(q, k[:, :, :7], v[:, :, :7])
        return self.out(mixed.transpose(1, 2).flatten(2)) @ torch.ones(2, 5, 3, device=x.device)


def test_flop_are_those_of_torchs_counter():
    with torch.device("meta"):
        network, x = Network(), torch.empty(2, 3, 16, 16)
    with FlopCounterMode(display=False) as counter:
        network(x)
    with Meter() as meter:
        network(x)
    assert meter.total().flop == counter.get_total_flops() > 0
    assert meter.total(kind="attention").calls == 1 and meter.total(kind="matmul").calls == 6


def test_causal_attention_counts_what_the_mask_lets_through():
    q = meta(2, 3, 5, 8)
    with Meter() as meter:
        F.scaled_dot_product_attention(q, q, q, is_causal=True)
    assert meter.total().flop == 2 * 3 * (1 + 2 + 3 + 4 + 5) * 4 * 8


def test_storages_count_while_they_live_in_blocks_of_512_bytes():
    weight = meta(100)
    with Meter() as meter:
        meter.hold([weight, weight[5:]])
        assert meter.current == 512
        meter.stage = "first"
        x = meta(1000)
        view, other = x[10:].view(5, 198), x + x
        assert meter.current == 512 + 2048 + 2048
        x.mul_(2)
        del x, other
        assert meter.current == 512 + 2048, "the view keeps the storage"
        del view
        assert meter.current == 512
        meter.stage = "second"
        meta(10).sum()
    assert meter.peaks == {"": 512, "first": 9 * 512, "second": 3 * 512} and meter.peak == 9 * 512
    assert meter.reserved == dict.fromkeys(meter.peaks, 2**21) | {"": 2**21}, "all of it fits one small segment"
    assert meter.total(stage="first").calls == 2


def test_a_span_is_counted_again_without_being_done():
    x = meta(4096)
    with Meter() as meter:
        kept = x + x
        result, span = meter.span(lambda: (x * 2 + x).sum())
        assert span.above == 2 * 8192 and sum(span.calls.values()) == 3
        meter.stage = "again"
        y = x + x
        meter.repeat(span)
    assert meter.peaks["again"] == 8192 + 512 + 8192 + span.above, "above what lived then"
    assert meter.total(stage="").launches == 2 * 3 + 1 and kept.shape == y.shape and result.shape == ()
    assert sum(len(calls) for calls, _ in meter.history) == 3 + 1 + 1 + 3


def test_our_operators_say_what_they_cost_and_count_what_they_launch():
    x, weight = meta(4, 96, 64), meta(64)
    with Meter() as meter:
        rms_norm(x, weight, 1e-6)
        assert meter.current == 0, "the result has died"
        rms_norm(x[:, ::2].transpose(0, 1), weight, 1e-6)  # rows that are not evenly spaced are copied first
        assert meter.peak == 2 * (4 * 48 * 64 * 2)
    cost = 8 * 4 * 96 * 64, 2 * 4 * 96 * 64 * 2 + 128
    whole, half = meter.calls
    assert whole == Call("", "norm", "bf16", "norm", (4, 96, 64), *cost, 1, programs=4 * 96)
    assert (half.flop, half.launches) == (cost[0] // 2, 2)


def test_a_kernel_that_cannot_be_had_leaves_the_meter_counting(monkeypatch):
    def fails(*arguments):
        raise NotCompiled("no such thing")

    monkeypatch.setattr(OPERATORS["unipic::norm"], "triton", fails)
    with Meter() as meter:
        with pytest.raises(NotCompiled):
            rms_norm(meta(4, 64), meta(64), 1e-6)
        meta(4) + 1
    assert [call.name for call in meter.calls] == ["add"]


def test_launches_of_a_library_inside_our_operators_count_once_on_every_device():
    for device in ("meta", "cpu"):
        q = torch.zeros(1, 2, 300, 32, device=device)
        with interpreted(), Meter() as meter:
            attention(q, q, q)
        (call,) = meter.calls
        assert (call.kind, call.launches, call.flop) == ("attention", 1, 2 * 300 * 300 * 4 * 32)


def test_outside_inference_mode_it_says_so():
    with torch.inference_mode(False), pytest.raises(RuntimeError, match="inference_mode"), Meter():
        pass


def run(model, tokens, device, meter):
    """A tiny picture through the three verbs."""
    family = families.model("unipic")
    task = Task("generate", 4, 4, steps=2, guidance=3.0, cfg_schedule="constant", temperature=1.0)
    batch = Batch(["a red fox"], [PhiloxNoise(1)])
    with meter:
        meter.stage = "condition"
        conditions = family.condition(model, tokens, task, batch)
        meter.stage = "sample"
        schedule = family.schedule(model.config, task, batch).to(device)
        for latents in family.sample(model, conditions, task, batch, schedule):  # noqa: B007
            pass
        meter.stage = "decode"
        return family.decode(model, latents, 4, 4)


def test_a_whole_picture_on_meta_counts_as_on_real_tensors(tiny_release):
    family, config = families.model("unipic"), architecture(str(tiny_release))
    config = replace(config, head=replace(config.head, steps=5))
    tokens = any_tokens(tiny_release / "Qwen2.5-1.5B-Instruct" / "tokenizer.json", family.IMAGE)
    with torch.device("meta"):
        shapes = family.build(config)
    real = family.build(config)
    fill(real)
    measured, planned = Meter(), Meter()
    pixels, picture = run(real, tokens, "cpu", measured), run(shapes, tokens, "meta", planned)
    assert picture.is_meta and picture.shape == pixels.shape == (1, 64, 64, 3)
    for stage in ("condition", "sample", "decode"):
        found, expected = (meter.total(stage=stage, kind="matmul").flop for meter in (planned, measured))
        assert found == pytest.approx(expected, rel=0.01) and found > 0  # fused kernels hold a few small products
        assert planned.total(stage=stage, kind="attention").flop > 0
    norms = 2 * 5 * (config.head.depth + 1)  # of the head: rounds, denoising steps, blocks and the final layer
    assert planned.total(stage="sample", kind="norm").launches >= norms
    assert planned.peaks["decode"] > planned.peaks["condition"] > 0


def test_the_rates_of_the_4090_are_the_fixed_ones():
    card = gpus.card("NVIDIA GeForce RTX 4090")
    assert card is gpus.card("RTX 4090") is gpus.card("rtx4090")
    rates = [card.flop_per_second(kind, how) for kind in ("matmul", "attention") for how in ("bf16", "int8")]
    assert rates == pytest.approx([158e12, 480e12, 150e12, 280e12]) and card.bytes_per_second == pytest.approx(0.92e12)
    assert card.seconds("matmul", "bf16", 158 * 10**12, 10**6, 1000) == pytest.approx(1.002)
    assert card.seconds("elementwise", "bf16", 0, 92 * 10**10, 0) == pytest.approx(1.0)
    assert (card.shared_bytes, card.sms, card.vram_bytes) == (101376, 128, 24 * 2**30)


def test_every_card_is_found_by_both_names_and_reaches_the_same_shares():
    for card in gpus.CARDS.values():
        assert all(gpus.card(name) is card for name in (card.name, *card.device_names))
        assert card.flop_per_second("matmul", "bf16") / card.bf16_tflops == pytest.approx(158e12 / 165.2)
        assert card.shared_bytes in (99 * 1024, 163 * 1024, 227 * 1024)
    with pytest.raises(ValueError, match=r"known are .*rtx4090"):
        gpus.card("rtx 9999")
