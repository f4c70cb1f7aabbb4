"""The autoencoder of Stable Diffusion 3 against recorded computations and diffusers' own."""

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from unipic_run.engine.layers.vae import SD3VAEConfig, VAEDecoder, VAEEncoder
from unipic_run.engine.layers.vae_bands import decode_in_bands
from unipic_run.engine.meter import Meter
from unipic_run.engine.models.deepgen import keys
from unipic_run.engine.models.deepgen.config import RELEASED

ROOT = Path(__file__).resolve().parents[2]
GOLDENS = Path(os.environ.get("UNIPIC_RUN_GOLDENS", ROOT.parent / "shared" / "goldens")) / "deepgen"
CASES = [path.stem for path in sorted((GOLDENS / "cases").glob("*.json"))]
RECORDED = SD3VAEConfig(8, (1, 1, 2, 2), latent=16, groups=4, blocks=1)
SCALE, SHIFT = RELEASED.vae_scale, RELEASED.vae_shift


@pytest.fixture(autouse=True)
def inference():
    with torch.inference_mode():
        yield


def pair_of(config: SD3VAEConfig, theirs: dict[str, Tensor]) -> tuple[VAEEncoder, VAEDecoder]:
    """With all of diffusers' weights."""
    pair, left = (VAEEncoder(config), VAEDecoder(config)), dict(theirs)
    table = keys.vae_encoder(config) | keys.vae_decoder(config)
    for part, module in zip(("vae_encoder", "vae_decoder"), pair, strict=True):
        module.requires_grad_(False)
        for name, ours in module.state_dict().items():
            (one,) = (left.pop(name.removeprefix("vae.")) for name in table[f"{part}.{name}"])
            ours.copy_(one.view(ours.shape))
    assert not left
    return pair


@pytest.fixture(scope="module")
def recorded() -> tuple[VAEEncoder, VAEDecoder]:
    if not GOLDENS.exists():
        pytest.skip(f"needs the recorded runs in {GOLDENS}")
    return pair_of(RECORDED, load_file(GOLDENS / "weights" / "vae" / "diffusion_pytorch_model.safetensors"))


def error(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape
    return ((found - expected).abs().max() / expected.abs().max()).item()


def encoded(encoder: VAEEncoder, pixels: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, log variance, and scaled latents with this noise."""
    mean, log_variance = encoder(pixels).chunk(2, dim=1)
    return mean, log_variance, (mean + (log_variance / 2).exp() * noise - SHIFT) * SCALE


def test_encoder_and_decoder_do_what_was_recorded(recorded: tuple[VAEEncoder, VAEDecoder]) -> None:
    unit = load_file(GOLDENS / "unit" / "unit.safetensors")
    encoder, decoder = recorded
    found = encoded(encoder, unit["vae.pixels"], unit["vae.noise"])
    for name, one in zip(("mean", "logvar", "latents_scaled"), found, strict=True):
        assert error(one, unit[f"vae.{name}"]) < 1e-5, name
    latents = unit["vae.dec_latents_scaled"] / SCALE + SHIFT
    assert error(decoder(latents), unit["vae.dec_pixels"]) < 1e-5
    assert error(decode_in_bands(decoder, latents, 1000), unit["vae.dec_pixels"]) < 1e-5


@pytest.mark.parametrize("name", CASES)
def test_recorded_references_and_pictures(name: str, recorded: tuple[VAEEncoder, VAEDecoder]) -> None:
    case, (encoder, decoder) = load_file(GOLDENS / "cases" / f"{name}.safetensors"), recorded
    for key in (key for key in case if key.endswith(".resized_uint8")):
        reference = key.partition(".")[0]
        pixels = case[key].permute(2, 0, 1)[None] / 255 * 2 - 1
        _, _, latents = encoded(encoder, pixels, case[f"{reference}.vae_noise"])
        assert error(latents, case[f"{reference}.latents"]) < 1e-5, key
    pixels = decoder(case["latents"][-1] / SCALE + SHIFT)
    if "image" in case:
        assert error(pixels, case["image"]) < 1e-5
        levels, expected = (127.5 * pixels + 128).clamp(0, 255).byte(), case["image_uint8"]
    else:
        levels = (255 * (pixels / 2 + 0.5).clamp(0, 1)).round().byte()[0].permute(1, 2, 0)
        expected = case["image_uint8_hwc"]
    apart = (levels.int() - expected.int()).abs()
    assert apart.max() <= 1 and apart.count_nonzero() <= 0.002 * apart.numel()


def test_diffusers_encodes_and_decodes_the_same() -> None:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    widths = (8, 16, 16)
    theirs = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=widths,
        layers_per_block=2,
        latent_channels=4,
        norm_num_groups=4,
        use_quant_conv=False,
        use_post_quant_conv=False,
    ).eval()
    for parameter in theirs.parameters():  # norms that do something
        torch.nn.init.normal_(parameter, mean=0.05, std=0.3)
    encoder, decoder = pair_of(SD3VAEConfig(8, (1, 2, 2), latent=4, groups=4, blocks=2), theirs.state_dict())
    pixels, latents = torch.randn(2, 3, 24, 20), torch.randn(1, 4, 5, 3)
    assert error(encoder(pixels), theirs.encode(pixels).latent_dist.parameters) < 1e-5
    expected = theirs.decode(latents).sample
    assert error(decoder(latents), expected) < 1e-5
    for band_bytes in (1, 700, 2500):
        assert error(decode_in_bands(decoder, latents, band_bytes), expected) < 1e-5


def test_released_sizes() -> None:
    with torch.device("meta"):
        encoder, decoder = VAEEncoder(RELEASED.vae).bfloat16(), VAEDecoder(RELEASED.vae).bfloat16()
        latents = torch.empty(1, 16, 64, 64, dtype=torch.bfloat16)
    counts = [sum(x.numel() for x in module.parameters()) for module in (encoder, decoder)]
    assert counts == [34_274_208, 49_545_475]
    with Meter() as meter:
        assert decoder(latents).shape == (1, 3, 512, 512)
    assert meter.total(kind="matmul").flop + meter.total(kind="attention").flop == pytest.approx(2.51e12, rel=0.01)
    with Meter() as meter:
        assert encoder(latents.new_empty(1, 3, 512, 512)).shape == (1, 32, 64, 64)
    assert meter.total(kind="matmul").flop + meter.total(kind="attention").flop == pytest.approx(1.12e12, rel=0.01)
