"""What the kernels of masked decoding, rotary embedding and the diffusion head promise beyond their references."""

import os

import pytest
import torch
from unipic_run.engine.kv_cache import KVCache
from unipic_run.engine.layers.attention import Attention
from unipic_run.engine.layers.qwen2 import Qwen2, Qwen2Config
from unipic_run.engine.meter import Meter
from unipic_run.engine.models.unipic.config import RELEASED, HeadConfig
from unipic_run.engine.models.unipic.head import CHUNK, DiffusionHead
from unipic_run.engine.noise import PhiloxNoise, Stream
from unipic_run.engine.schedules import ddpm_table, ode_table
from unipic_run.kernels import _device
from unipic_run.kernels._op import HAS_TRITON, interpreted, launch, recording, tl, triton
from unipic_run.kernels.ddpm_step import Drawn, step_table
from unipic_run.kernels.mar_tokens import inverse_index, place_tokens, select_tokens
from unipic_run.kernels.philox import WORD, philox, token_noise
from unipic_run.kernels.rope import rope, rope_split, split_heads

needs_the_interpreter = pytest.mark.skipif(
    not HAS_TRITON or os.environ.get("TRITON_INTERPRET") != "1", reason="needs triton and TRITON_INTERPRET=1"
)
HEAD = HeadConfig(48, 1, condition=20, channels=16, frequencies=8, train_steps=50, steps=3, max_beta=0.2)
SCALES = 2.5, 0.9  # guidance, temperature


@triton.jit
def _words_kernel(in_ptr, out_ptr, n, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    k0 = tl.load(in_ptr + at, mask=at < n, other=0).to(tl.uint32)
    k1 = tl.load(in_ptr + n + at, mask=at < n, other=0).to(tl.uint32)
    c0 = tl.load(in_ptr + 2 * n + at, mask=at < n, other=0).to(tl.uint32)
    c1 = tl.load(in_ptr + 3 * n + at, mask=at < n, other=0).to(tl.uint32)
    c2 = tl.load(in_ptr + 4 * n + at, mask=at < n, other=0).to(tl.uint32)
    c3 = tl.load(in_ptr + 5 * n + at, mask=at < n, other=0).to(tl.uint32)
    w0, w1, w2, w3 = _device.philox(k0, k1, c0, c1, c2, c3)
    tl.store(out_ptr + at, w0.to(tl.int64), mask=at < n)
    tl.store(out_ptr + n + at, w1.to(tl.int64), mask=at < n)
    tl.store(out_ptr + 2 * n + at, w2.to(tl.int64), mask=at < n)
    tl.store(out_ptr + 3 * n + at, w3.to(tl.int64), mask=at < n)


@needs_the_interpreter
def test_the_kernels_generator_gives_the_same_words() -> None:
    given = torch.randint(2**32, (6, 100), generator=torch.Generator().manual_seed(0))
    given[:, :2] = torch.tensor([0, WORD])
    got = torch.full((4, 100), -1)
    launch(_words_kernel, (1,), given, got, 100, BLOCK=128)
    k0, k1, *counter = given
    assert torch.equal(got, torch.stack(philox((k0, k1), tuple(counter))))


@triton.jit
def _angles_kernel(angle_ptr, cos_ptr, sin_ptr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    cos, sin = _device.cos_sin(tl.load(angle_ptr + at))
    tl.store(cos_ptr + at, cos)
    tl.store(sin_ptr + at, sin)


@needs_the_interpreter
def test_cosine_and_sine_of_far_positions() -> None:
    angle = torch.cat([torch.arange(64) * torch.pi / 4, torch.linspace(0, 32768, 4032)])
    cos, sin = torch.empty(2, 4096)
    launch(_angles_kernel, (1,), angle, cos, sin, BLOCK=4096)
    for got, exact in ((cos, angle.double().cos()), (sin, angle.double().sin())):
        torch.testing.assert_close(got.double(), exact, atol=2e-7, rtol=0)


def seeds(*values: int) -> torch.Tensor:
    return torch.tensor([[seed & WORD, seed >> 32] for seed in values])


def test_noise_of_several_images_is_that_of_each() -> None:
    positions = torch.tensor([3, 40, 7])
    got = token_noise(seeds(5, 5, 2**40 + 9), positions, Stream.HEAD_STEP, 4, 6)
    assert torch.equal(got[:, :2], PhiloxNoise(5).head_steps(0, positions[:2], 6, 4))
    assert torch.equal(got[:, 2:], PhiloxNoise(2**40 + 9).head_steps(0, positions[2:], 6, 4))


class Denoised:
    """A small head with random weights, and the same run in every way there is; of an order, by an ODE's solver."""

    def __init__(self, guided: bool = True, order: int | None = None) -> None:
        noise = torch.Generator().manual_seed(1)
        self.head = DiffusionHead(HEAD).requires_grad_(False)
        for parameter in self.head.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=noise))
        self.table = ddpm_table(HEAD.train_steps, HEAD.steps, HEAD.max_beta)
        if order:
            self.table = ode_table(HEAD.train_steps, 2 * HEAD.steps, HEAD.max_beta, order=order)
        self.embedded = self.head.embed_steps(self.table)
        self.positions, seed = torch.tensor([9, 2, 5]), 7
        self.z = torch.randn(6 if guided else 3, HEAD.condition, generator=noise)
        self.start = PhiloxNoise(seed).head_start(0, self.positions, HEAD.channels)
        self.noise = None if order else PhiloxNoise(seed).head_steps(0, self.positions, HEAD.channels, HEAD.steps)
        self.drawn = None if order else Drawn(seeds(seed).expand(3, 2), self.positions, Stream.HEAD_STEP)

    def recorded(self, chunk: int = 1) -> torch.Tensor:
        return self.head.sample(self.z, self.start, self.noise, self.table, self.embedded, *SCALES, chunk)

    def replayed(self, chunks: list[int]) -> torch.Tensor:
        once = step_table(self.table, *SCALES), self.embedded, self.head.final.folded()
        run = self.head.begin(self.z, self.start, self.drawn, len(self.table), *once)
        changed = [x for x in (run.x, run.before, run.h, run.clock) if x is not None]
        at = [x.data_ptr() for x in changed]
        for steps in chunks:
            self.head.advance(run, steps)
        assert run.clock[0] == -1 and at == [x.data_ptr() for x in changed]
        again = self.head.input_proj(run.x).repeat(len(self.z) // len(run.x), 1)
        torch.testing.assert_close(run.h, again, atol=1e-5, rtol=1e-5)
        return run.x


@pytest.mark.parametrize("guided", [True, False])
def test_drawing_noise_step_by_step_changes_nothing(guided: bool) -> None:
    case = Denoised(guided)
    assert torch.equal(case.replayed([1] * HEAD.steps), case.recorded())


@pytest.mark.parametrize("guided", [True, False])
def test_solvers_without_noise_step_by_step_are_the_same(guided: bool) -> None:
    first, second = Denoised(guided, order=1), Denoised(guided, order=2)
    for case in (first, second):
        assert torch.equal(case.replayed([1] * 6), case.recorded())
        torch.testing.assert_close(case.recorded(chunk=4), case.recorded(), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(case.replayed([3, 3]), case.recorded(), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(first.recorded(), second.recorded(), atol=1e-3)


def test_modulations_of_several_steps_at_once_are_the_same() -> None:
    case = Denoised()
    one_by_one = case.recorded()
    torch.testing.assert_close(case.recorded(chunk=2), one_by_one, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(case.recorded(chunk=99), one_by_one, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(case.replayed([1, 2]), one_by_one, atol=1e-5, rtol=1e-5)
    assert case.start.ne(one_by_one).all(), "the start is not overwritten"


@needs_the_interpreter
def test_a_run_by_kernels_is_the_run() -> None:
    case = Denoised()
    with interpreted(), recording() as launches, torch.inference_mode():
        got = case.replayed([2, 1])
    torch.testing.assert_close(got, case.recorded(), atol=1e-5, rtol=1e-5)
    names = [x.kernel.__name__ for x in launches]
    assert names.count("_head_step_kernel") == HEAD.steps and names.count("_condition_kernel") == 2
    assert names.count("_modulated_linear_kernel") == names.count("_gated_linear_kernel") == HEAD.steps


@needs_the_interpreter
def test_a_run_of_second_order_by_kernels_takes_no_more_launches() -> None:
    case = Denoised(order=2)
    with interpreted(), recording() as launches, torch.inference_mode():
        got = case.replayed([3, 3])
    torch.testing.assert_close(got, case.recorded(), atol=1e-5, rtol=1e-5)
    assert len(launches) == 2 + 6 * (2 * HEAD.depth + 1)  # conditions of both chunks; blocks and ends of six steps


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("tokens", [3, 10, 201, 402, 1005])  # the most of a picture at 1024x1024, of two and of five
def test_at_most_thirty_launches_a_denoising_step(tokens: int, dtype: torch.dtype) -> None:
    config, steps = RELEASED.head, CHUNK
    how = {"device": "meta", "dtype": torch.int64}
    with torch.device("meta"):
        head = DiffusionHead(config).to(dtype).requires_grad_(False)
    assert head.most_steps(2 * tokens) >= steps
    table = ddpm_table(config.train_steps, config.steps, config.max_beta)
    drawn = Drawn(torch.empty(tokens, 2, **how), torch.empty(tokens, **how), Stream.HEAD_STEP)
    with torch.inference_mode():
        z = torch.empty(2 * tokens, config.condition, device="meta", dtype=dtype)
        start, coefficients = torch.empty(tokens, 16, device="meta"), step_table(table, *SCALES).to("meta")
        run = head.begin(z, start, drawn, len(table), coefficients, head.embed_steps(table), head.final.folded())
        with Meter() as meter:
            head.advance(run, steps)
    assert meter.total().launches <= 30 * steps


def test_places_by_the_inverse_index() -> None:
    torch.manual_seed(0)
    visible = torch.tensor([[0, 3, 4], [1, 2, 6]])
    source = inverse_index(visible, 7)
    assert source.tolist() == [[0, -1, -1, 1, 2, -1, -1], [-1, 0, 1, -1, -1, -1, 2]]
    x, base, position = torch.randn(4, 2 + 3, 8), torch.randn(1, 9, 8), torch.randn(9, 8)
    full = place_tokens(x, visible, base, position, source)
    assert torch.equal(full, place_tokens(x, visible.repeat(2, 1), base, position)), "both halves share the plan"
    assert torch.equal(full[:, :2], x[:, :2] + position[:2])
    assert torch.equal(full[3, 2 + 5], base[0, 2 + 5] + position[2 + 5])
    assert torch.equal(select_tokens(full, visible + 2)[2], x[2, 2:] + position[2 + visible[0]])


def test_rope_writes_straight_into_a_cache() -> None:
    torch.manual_seed(0)
    cache = KVCache.empty(2, 1, 9, 8, torch.float32, torch.device("cpu"))
    cache.keys.fill_(7.0), cache.values.fill_(7.0)
    qkv, positions, inv_freq = torch.randn(1, 3, 5 * 8), torch.tensor([[4, 5, 6]]), torch.rand(4)
    into = tuple(x[1, None, :, 4:7] for x in (cache.keys, cache.values))
    q, k, v = rope_split(qkv, positions, inv_freq, 3, 1, into)
    assert torch.equal(cache.keys[1, :, 4:7], k[0]) and torch.equal(cache.values[1, 0, 4:7], qkv[0, :, 32:])
    assert (cache.keys[0] == 7).all() and (cache.keys[1, :, :4] == 7).all() and (cache.keys[1, :, 7:] == 7).all()
    angle = positions[0, 1] * inv_freq.repeat(2)
    assert torch.equal(q[:, :, 1:2], rope(split_heads(qkv, 3, 1)[0], angle.cos(), angle.sin())[:, :, 1:2])
    with pytest.raises(ValueError, match="last stride of 1, not 2"):
        rope_split(qkv, positions, inv_freq, 3, 1, (torch.empty(1, 1, 3, 16)[..., ::2], v))


def test_a_layer_by_positions_is_the_layer_by_tables() -> None:
    config = Qwen2Config(
        vocab=9, width=24, layers=1, heads=3, kv_heads=1, head_dim=8, mlp=40, rope_theta=1e6, norm_eps=1e-6,
        max_positions=4096,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Qwen2(config, Attention(), round_inv_freq=True).requires_grad_(False)
    positions = torch.tensor([[3000, 3001, 3002]])
    for dtype in (torch.float32, torch.bfloat16):
        layer, x = model.layers[0].to(dtype), torch.randn(1, 3, 24).to(dtype)

        def mix(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return q + k * v

        by_tables = layer(x, *model.rotary(positions, dtype), mix)
        assert torch.equal(layer.follow(x, positions, model.frequencies(x.device, dtype), mix), by_tables)
