"""The VAE decoder in bands against the whole decoder: the same values, less memory, and what that costs."""

import pytest
import torch
from unipic_run.engine.layers import vae_bands
from unipic_run.engine.layers.vae import VAEConfig, VAEDecoder
from unipic_run.engine.layers.vae_bands import BAND_BYTES, BandedConv, decode_in_bands, moments, split
from unipic_run.engine.meter import Meter
from unipic_run.engine.precision import true_float32

RELEASED = VAEConfig(base=128, multipliers=(1, 1, 2, 2, 4), latent=16, groups=32)
SMALL = VAEConfig(base=8, multipliers=(1, 2, 2), latent=4, groups=4)
MIB = 2**20


@pytest.fixture(autouse=True)
def inference():
    with torch.inference_mode():
        yield


def decoder_of(config):
    torch.manual_seed(0)
    decoder = VAEDecoder(config).requires_grad_(False)
    for parameter in decoder.parameters():  # norms that do something, maps with means that do not vanish
        torch.nn.init.normal_(parameter, mean=0.05, std=0.3)
    return decoder


def error(found, expected):
    return ((found - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize(
    "multipliers, groups, shape",
    [
        ((1, 2, 2), 4, (1, 4, 5, 3)),  # a level that narrows, and one that does not
        ((1, 1), 1, (1, 4, 7, 9)),  # one group
        ((2, 1, 3), 8, (2, 4, 3, 4)),  # one channel a group where it is narrowest, widening and narrowing, two images
        ((1, 2), 2, (1, 4, 1, 6)),  # a single row of latents
    ],
)
def test_bands_of_any_height_make_the_same_picture(multipliers, groups, shape):
    decoder = decoder_of(VAEConfig(8, multipliers, 4, groups))
    latents = torch.randn(shape)
    given = latents.clone()
    whole = decoder(latents)
    for band_bytes in (1, 700, 1111, 2500, 5000, BAND_BYTES):
        assert error(decode_in_bands(decoder, latents, band_bytes), whole) <= 1e-5, band_bytes
    assert torch.equal(latents, given)


def test_a_map_that_fits_is_decoded_by_the_modules_themselves(monkeypatch):
    decoder, latents = decoder_of(SMALL), torch.randn(1, 4, 5, 3)
    monkeypatch.setattr(vae_bands, "finish", lambda decoder, x, band_bytes: x)
    x = decoder.mid(decoder.conv_in(decoder.post_quant_conv(latents)))
    for level in reversed(decoder.up):
        x = level(x)
    assert torch.equal(decode_in_bands(decoder, latents), x)
    assert not torch.equal(decode_in_bands(decoder, latents, 1), x), "rounding, as something else has run"


def test_moments_do_not_cancel():
    """Sums of squares in float32 would leave nothing of this variance."""
    x = 1000 + torch.randn(2, 6, 50, 9, generator=torch.Generator().manual_seed(1))
    mean, var = moments(torch.nn.GroupNorm(3, 6), split(x, 7))
    groups = x.double().view(2, 3, -1)
    assert error(mean, groups.mean(-1)) < 1e-6 and error(var, groups.var(-1, correction=0)) < 1e-4


def test_a_convolution_lags_one_row_and_keeps_two():
    conv = torch.nn.Conv2d(3, 5, 3, padding=1)
    x = torch.randn(2, 3, 11, 6)
    banded = BandedConv(conv, 11)
    bands = [banded(band) for band in split(x, 5)]
    assert [band.shape[2] for band in bands] == [4, 5, 2]
    assert error(torch.cat(bands, dim=2), conv(x)) < 1e-6
    assert banded.kept.untyped_storage().nbytes() == 2 * 3 * 2 * 6 * 4


def test_bfloat16_is_as_close_to_float32_as_the_whole_decoder_is():
    decoder, latents = VAEDecoder(SMALL).requires_grad_(False), torch.randn(1, 4, 6, 5)
    exact = decoder(latents)
    decoder, latents = decoder.bfloat16(), latents.bfloat16()
    banded, whole = ((x.float() - exact).norm() for x in (decode_in_bands(decoder, latents, 500), decoder(latents)))
    assert banded <= 1.25 * whole


def count(decode, config, rows, columns, dtype=torch.bfloat16, device="meta"):
    """The meter after decoding a picture; weights and latents do not count as memory."""
    with torch.device(device):
        decoder = VAEDecoder(config).to(dtype)
        latents = torch.zeros(1, config.latent, rows, columns, dtype=dtype)
    scale = 2 ** (len(config.multipliers) - 1)
    with Meter() as meter:
        pixels = decode(decoder, latents)
    assert pixels.shape == (1, 3, scale * rows, scale * columns) and pixels.device.type == device
    return meter


def test_a_picture_of_1024_takes_a_third_of_the_memory_and_a_quarter_more_work():
    whole = count(lambda decoder, latents: decoder(latents), RELEASED, 64, 64)
    banded = count(decode_in_bands, RELEASED, 64, 64)
    assert whole.peak == 1280 * MIB and banded.peak <= 350 * MIB  # 0.4 GiB are 410
    assert 1.2 < banded.total().flop / whole.total().flop < 1.3
    assert banded.total().launches < 5000


def test_twice_the_picture_takes_at_most_twice_the_memory():
    assert count(decode_in_bands, RELEASED, 64, 128).peak <= 2 * 350 * MIB


def test_meta_counts_what_the_cpu_does():
    def decode(decoder, latents):
        return decode_in_bands(decoder, latents, 3000)

    real, shapes = (count(decode, SMALL, 9, 7, torch.float32, device) for device in ("cpu", "meta"))
    assert shapes.total().flop == real.total().flop > 0
    assert shapes.peak == pytest.approx(real.peak, rel=0.02)


@pytest.mark.gpu
def test_on_cuda_as_on_the_cpu_and_in_the_memory_that_was_counted():
    decoder, latents = decoder_of(SMALL), torch.randn(1, 4, 9, 7)
    whole = decoder(latents)
    with true_float32():
        assert error(decode_in_bands(decoder.cuda(), latents.cuda(), 3000).cpu(), whole) <= 1e-5
    decoder = VAEDecoder(RELEASED).to("cuda", torch.bfloat16)
    latents = torch.randn(1, 16, 64, 64, device="cuda", dtype=torch.bfloat16)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    decode_in_bands(decoder, latents)
    assert torch.cuda.max_memory_allocated() - before <= 0.4 * 2**30
