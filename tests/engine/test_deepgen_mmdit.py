"""The diffusion transformer of DeepGen against recorded computations and diffusers' own, and what a step costs."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from unipic_run.engine.layers.attention import Attention
from unipic_run.engine.layers.timesteps import timestep_features
from unipic_run.engine.meter import Meter
from unipic_run.engine.models.deepgen import keys
from unipic_run.engine.models.deepgen.config import RELEASED, DiTConfig
from unipic_run.engine.models.deepgen.mmdit import MMDiT
from unipic_run.engine.models.deepgen.modulation import Modulation, of_layers
from unipic_run.engine.repeats import once
from unipic_run.engine.schedules import euler_step
from unipic_run.kernels._op import HAS_TRITON, interpreted, recording
from unipic_run.quant.recipe import Recipe
from unipic_run.quant.swap import Change, swap

ROOT = Path(__file__).resolve().parents[2]
GOLDENS = Path(os.environ.get("UNIPIC_RUN_GOLDENS", ROOT.parent / "shared" / "goldens")) / "deepgen"
CASES = [path.stem for path in sorted((GOLDENS / "cases").glob("*.json"))]
CONFIG = DiTConfig(
    depth=4, heads=4, head_dim=16, dual=2, patch=2, channels=16, text=40, pooled=36, table=24, frequencies=256, mlp=256
)


@pytest.fixture(autouse=True)
def inference():
    with torch.inference_mode():
        yield


def filled(config: DiTConfig, theirs: dict[str, Tensor]) -> tuple[MMDiT, Modulation]:
    """With all of diffusers' weights."""
    pair, left = (MMDiT(config, Attention()), Modulation(config)), dict(theirs)
    table = keys.table(replace(RELEASED, dit=config))
    for part, module in zip(("dit", "modulation"), pair, strict=True):
        module.requires_grad_(False)
        for name, ours in module.state_dict().items():
            parts = [left.pop(name.removeprefix("transformer.")) for name in table[f"{part}.{name}"]]
            ours.copy_(torch.cat(parts).view(ours.shape))
    assert not left
    return pair


@pytest.fixture(scope="module")
def tiny() -> tuple[MMDiT, Modulation]:
    """With the recorded runs' weights."""
    if not GOLDENS.exists():
        pytest.skip(f"needs the recorded runs in {GOLDENS}")
    theirs = load_file(GOLDENS / "weights" / "transformer" / "diffusion_pytorch_model.safetensors")
    return filled(CONFIG, theirs)


@pytest.fixture(scope="module")
def unit() -> dict[str, Tensor]:
    return load_file(GOLDENS / "unit" / "unit.safetensors") if GOLDENS.exists() else {}


def error(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape
    return ((found - expected).abs().max() / expected.abs().max()).item()


def predict(
    pair: tuple[MMDiT, Modulation], latents: Tensor, t: Tensor, seq: Tensor, pooled: Tensor, *references: Tensor
) -> Tensor:
    """One forward pass of rows at the same timestep t (); references (B, C, h, w)."""
    dit, modulation = pair
    (table,) = modulation(t[None], pooled)
    embedded = torch.cat([dit.embed(x) for x in references], dim=1) if references else None
    return dit(latents, dit.context_embed(seq), table, embedded)


def test_embeddings_are_the_recorded_ones(tiny: tuple[MMDiT, Modulation], unit: dict[str, Tensor]) -> None:
    dit, modulation = tiny
    assert error(timestep_features(unit["temb.timestep"], 256), unit["temb.sinusoid"]) < 1e-4  # of angles up to 1000
    embedded = modulation.embed(unit["temb.timestep"], unit["temb.pooled"])  # of every timestep with every prompt
    assert error(embedded.diagonal().T, unit["temb.out"]) < 1e-5
    (embedded,) = modulation.embed(unit["dit.timestep"][:1], unit["dit.pooled"])
    assert error(embedded, unit["dit.trace.temb"]) < 1e-5
    for rows, columns in ((4, 6), (8, 8), (12, 10)):
        assert torch.equal(dit.positions(rows, columns), unit[f"pos.crop_{rows}x{columns}"])
    assert error(dit.embed(unit["dit.latents"]), unit["dit.trace.patch_tokens"]) < 1e-5
    assert error(dit.context_embed(unit["dit.seq"]), unit["dit.trace.context"]) < 1e-5


def test_the_centre_of_a_table_is_enough(tiny: tuple[MMDiT, Modulation]) -> None:
    with torch.device("meta"):
        cut = MMDiT(CONFIG, Attention())
    cut.pos_table = torch.nn.Parameter(tiny[0].pos_table[5:-5, 5:-5])
    for size in ((1, 14), (8, 7)):
        assert torch.equal(cut.positions(*size), tiny[0].positions(*size))


def test_every_block_does_what_was_recorded(tiny: tuple[MMDiT, Modulation], unit: dict[str, Tensor]) -> None:
    dit, modulation = tiny
    (table,) = modulation(unit["dit.timestep"][:1], unit["dit.pooled"])
    *chunks, _ = of_layers(table, CONFIG)
    image, text = dit.embed(unit["dit.latents"]), dit.context_embed(unit["dit.seq"])
    for index, block in enumerate(dit.blocks):
        image, text = block(image, text, *chunks[2 * index : 2 * index + 2], image.shape[1])
        assert error(image, unit[f"dit.trace.block{index}.img"]) < 1e-5, index
        assert block.last or error(text, unit[f"dit.trace.block{index}.txt"]) < 1e-5, index


def test_forward_passes_are_the_recorded_ones(tiny: tuple[MMDiT, Modulation], unit: dict[str, Tensor]) -> None:
    latents, seq, pooled, t = unit["dit.latents"], unit["dit.seq"], unit["dit.pooled"], unit["dit.timestep"][0]
    assert error(predict(tiny, latents, t, seq, pooled), unit["dit.out_plain"]) < 1e-5
    same = predict(tiny, latents, t, seq, pooled, unit["dit.ref_same"])
    assert error(same, unit["dit.out_ref_same"]) < 1e-5 and error(same, unit["dit.out_unipic_ref_same"]) < 1e-5
    small = [unit["dit.ref_small_a"][None], unit["dit.ref_small_b"][None]]
    ragged = (latents[:1], small), (latents[1:], [])
    mixed = (unit["dit.mixed_latents_0"][None], small[1:]), (unit["dit.mixed_latents_1"][None], small[:1])
    for row in (0, 1):
        given = t, seq[row : row + 1], pooled[row : row + 1]
        x, references = ragged[row]
        assert error(predict(tiny, x, *given, *references)[0], unit["dit.out_ref_ragged"][row]) < 1e-5
        x, references = mixed[row]
        assert error(predict(tiny, x, *given, *references)[0], unit[f"dit.out_mixed_{row}"]) < 1e-5


def test_without_some_layers_it_predicts_what_was_recorded(
    tiny: tuple[MMDiT, Modulation], unit: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    (skipped,) = json.loads((GOLDENS / "unit" / "unit.json").read_text())["dit.skip_layers"]
    monkeypatch.setattr(tiny[0].blocks[skipped], "forward", lambda image, text, *_: (image, text))
    out = predict(tiny, unit["dit.latents"], unit["dit.timestep"][0], unit["dit.seq"], unit["dit.pooled"])
    assert error(out, unit["dit.out_skip_layers"]) < 1e-5


@pytest.mark.parametrize("name", CASES)
def test_recorded_pictures_are_denoised_again(name: str, tiny: tuple[MMDiT, Modulation]) -> None:
    """From recorded prompts, references and noise to all steps' predictions and latents, our own errors carried on."""
    dit, modulation = tiny
    case, settings = (load(GOLDENS / "cases" / f"{name}.{end}") for load, end in LOADS)
    guidance = settings.get("cfg_scale", settings.get("guidance_scale"))
    x, rows = case["noise"], case["noise_pred"].shape[1]
    pictures, guided = len(x), rows > len(x)
    seq, pooled = case.get("dit_seq_uncond_cond"), case.get("dit_pooled_uncond_cond")
    if name.startswith("deepgen"):  # conditional rows first, of which only those go on without guidance
        seq, pooled = (case[key].roll(pictures, 0)[-rows:] for key in ("seq", "pooled"))
    tables, context = modulation(case["timesteps"], pooled), dit.context_embed(seq)
    references = references_of(case, settings, pictures)
    ragged = len({len(one) for one in references}) > 1
    alone = [[picture] for picture in range(pictures)] if ragged else [[*range(pictures)]]
    for step, table in enumerate(tables):
        out = torch.empty_like(case["noise_pred"][step])
        for group in alone:  # with guidance both of its rows
            of = [row for row in range(rows) if row % pictures in group]
            embedded = [torch.cat([dit.embed(one) for one in references[i]], 1) for i in group if references[i]]
            out[of] = dit(x[group], context[of], table[of], torch.cat(embedded) if embedded else None)
        assert error(out, case["noise_pred"][step]) < 1e-4
        if guided:
            uncond, cond = out.chunk(2)
            out = uncond + guidance * (cond - uncond)
        x = euler_step(x, out, case["sigmas"][step + 1] - case["sigmas"][step])
        assert error(x, case["latents"][step]) < 1e-4


LOADS = ((load_file, "safetensors"), (lambda path: json.loads(path.read_text()), "json"))


def references_of(case: dict[str, Tensor], settings: dict, pictures: int) -> list[list[Tensor]]:
    """Of each picture, its references' latents (1, C, h, w)."""
    every = iter([case[key] for key in sorted(case) if key.startswith("ref") and key.endswith(".latents")])
    counts = settings.get("refs_per_sample") or [int("ref0.latents" in case)] * pictures
    return [[next(every) for _ in range(count)] for count in counts]


def random_pair(config: DiTConfig, attend: Attention) -> tuple[MMDiT, Modulation]:
    noise = torch.Generator().manual_seed(0)
    pair = MMDiT(config, attend), Modulation(config)
    for module in pair:
        for parameter in module.requires_grad_(False).parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=noise) / parameter.shape[-1] ** 0.5)
    return pair


def inputs(config: DiTConfig, rows: int, size: tuple[int, int] = (4, 6), words: int = 5) -> tuple[Tensor, ...]:
    """What `predict` takes, with one reference."""
    noise = torch.Generator().manual_seed(1)
    shapes = (rows, config.channels, *size), (rows, words, config.text), (rows, config.pooled)
    latents, seq, pooled = (torch.randn(shape, generator=noise) for shape in shapes)
    return latents, torch.tensor(700.0), seq, pooled, torch.randn(latents.shape, generator=noise)


def test_diffusers_predicts_the_same_without_references() -> None:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    theirs = diffusers.SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=16,
        num_layers=3,
        attention_head_dim=8,
        num_attention_heads=3,
        joint_attention_dim=20,
        caption_projection_dim=24,
        pooled_projection_dim=12,
        out_channels=16,
        pos_embed_max_size=14,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    ).eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    config = DiTConfig(3, 3, 8, dual=1, patch=2, channels=16, text=20, pooled=12, table=14, frequencies=256, mlp=96)
    pair = filled(config, theirs.state_dict())
    latents, t, seq, pooled, _ = inputs(config, 2, (10, 14), 7)
    expected = theirs(latents, seq, pooled, t.expand(2), return_dict=False)[0]
    assert error(predict(pair, latents, t, seq, pooled), expected) < 1e-5


def test_one_row_of_a_table_and_one_picture_serve_several_rows() -> None:
    """Both guidance halves are one picture; rows of the same prompt have the same modulation."""
    dit, modulation = random_pair(CONFIG, Attention())
    latents, t, seq, pooled, reference = inputs(CONFIG, 2)
    context = dit.context_embed(torch.cat([seq, 1 - seq]))
    (table,) = modulation(t[None], pooled)
    found = dit(latents, context, table, dit.embed(reference))
    twice = latents.repeat(2, 1, 1, 1), context, table.repeat_interleave(2, 0), dit.embed(reference).repeat(2, 1, 1)
    assert error(found, dit(*twice)) < 1e-6


INT8 = Recipe(
    "int8",
    tuple(
        f"blocks.*.{stream}.{name}"
        for stream, names in (("image", "qkv proj fc1 fc2"), ("text", "qkv"), ("alone", "qkv proj"))
        for name in names.split()
    ),
)
WIDE = DiTConfig(2, 2, 64, dual=1, patch=2, channels=4, text=16, pooled=8, table=8, frequencies=16, mlp=256)


def in_int8(dit: MMDiT, backend: str) -> MMDiT:
    quantised = MMDiT(dit.config, Attention(backend))
    swap(quantised, INT8)
    change, values = Change(quantised, INT8), {}
    for name, tensor in dit.state_dict().items():
        values |= change(name, tensor)
    quantised.load_state_dict(values, assign=True)
    return quantised


@pytest.mark.parametrize(("backend", "words"), [("sdpa", 20), ("int8-qk", 20), ("int8-qk", 5)])
def test_in_int8_it_comes_close(backend: str, words: int) -> None:
    """Layers, and with int8-qk the scores of both attentions."""
    dit, modulation = random_pair(WIDE, Attention())
    given = inputs(WIDE, 2, (8, 8), words)
    expected = predict((dit, modulation), *given)
    quantised = in_int8(dit, backend)
    found = predict((quantised, modulation), *given)
    assert 0 < (found - expected).norm() / expected.norm() < 0.03
    with Meter() as meter:
        predict((quantised.to("meta"), modulation.to("meta")), *(x.to("meta") for x in given))
    names = {call.name for call in meter.calls}
    assert {"int8_linear_to_groups", "int8_linear_of_groups"} <= names, "an MLP hands over whole numbers"
    whole = {"joint_keys_off", "int8_linear_to_joint", "attention_int8"}
    assert names & whole == (whole if backend == "int8-qk" else set()), "and so do the products before attention"
    few = backend == "int8-qk" and words == 5  # of which the products keep their values
    assert ("joint_qkv" in names) == (few or backend == "sdpa") and ("quantise_qkv" in names) == few


@pytest.mark.skipif(
    not HAS_TRITON or os.environ.get("TRITON_INTERPRET") != "1",
    reason="needs triton and TRITON_INTERPRET=1, which conftest.py sets where there is no CUDA device",
)
def test_in_int8_by_its_kernels() -> None:
    """Measured: 1e-3 from torch's path, which rounds now and then the other way."""
    dit, modulation = random_pair(WIDE, Attention())
    quantised, given = in_int8(dit, "int8-qk"), inputs(WIDE, 2, (8, 8), 20)
    expected = predict((quantised, modulation), *given)
    with interpreted(), recording() as launches:
        found = predict((quantised, modulation), *given)
    assert {"_joint_keys_kernel", "_to_joint_kernel"} <= {one.kernel.__name__ for one in launches}
    assert (found - expected).norm() / expected.norm() < 0.005


@pytest.mark.skipif(
    not HAS_TRITON or os.environ.get("TRITON_INTERPRET") != "1",
    reason="needs triton and TRITON_INTERPRET=1, which conftest.py sets where there is no CUDA device",
)
def test_by_its_kernels() -> None:
    config = DiTConfig(2, 2, 16, dual=1, patch=2, channels=4, text=16, pooled=8, table=8, frequencies=16, mlp=48)
    pair, given = random_pair(config, Attention()), inputs(config, 2, (4, 4), 3)
    expected = predict(pair, *given)
    with interpreted(), recording() as launches:
        found = predict(pair, *given)
    assert {"_norm_kernel", "_joint_qkv_kernel", "_gated_add_kernel"} <= {one.kernel.__name__ for one in launches}
    assert error(found, expected) < 1e-5


def step_at(side: int, words: int, dtype: torch.dtype = torch.bfloat16, references: int = 0) -> Meter:
    """The meter after a guided step of the released size on the meta device; weights do not count as memory."""
    with torch.device("meta"):
        dit = MMDiT(RELEASED.dit, Attention()).to(dtype)
        latents = torch.empty(1, 16, side // 8, side // 8, dtype=dtype)
        context = torch.empty(2, words, 1536, dtype=dtype)
        table = torch.empty(2, 499200, dtype=dtype)
    embedded = torch.cat([dit.embed(latents)] * references, 1) if references else None
    with Meter() as meter:
        assert dit(latents, context, table, embedded).shape == (2, *latents.shape[1:])
    return meter


@pytest.mark.parametrize(
    ("side", "words", "references", "teraflop", "mebibytes"),
    [(512, 200, 0, 4.43, 97), (1024, 200, 0, 21.8, 368), (512, 456, 1, 10.3, 196), (1024, 1222, 1, 66.4, 763)],
)
def test_a_step_takes_what_the_original_does_less_what_is_left_out(
    side: int, words: int, references: int, teraflop: float, mebibytes: float
) -> None:
    meter = step_at(side, words, references=references)
    matrices = sum(meter.total(kind=kind).flop for kind in ("matmul", "attention"))
    saved = left_out(side, words, references)
    assert (matrices + saved) / 1e12 == pytest.approx(teraflop, rel=0.003)
    assert meter.peak <= 0.85 * mebibytes * 2**20


def left_out(side: int, words: int, references: int) -> int:
    """FLOP of what nobody asks for in the last block, and of the modulations: they are made before."""
    tokens, width, rows = (side // 16) ** 2, 1536, 2
    away = words + references * tokens
    last = 2 * rows * references * tokens * 9 * width**2 + 4 * rows * away * (away + tokens) * width
    return last + 2 * rows * 325 * width * width


def test_equal_blocks_are_run_once_in_a_dry_run() -> None:
    model = torch.nn.ModuleDict({"dit": MMDiT(CONFIG, Attention()), "modulation": Modulation(CONFIG)}).to("meta")
    given = [x.to("meta") for x in inputs(CONFIG, 2)]
    meters = Meter(), Meter()
    with meters[0]:
        expected = predict((model["dit"], model["modulation"]), *given)
    with once(meters[1], model, [("dit.blocks.*", "forward")]), meters[1]:
        assert predict((model["dit"], model["modulation"]), *given).shape == expected.shape
    assert meters[0].calls == meters[1].calls and meters[0].peak == meters[1].peak


def test_released_sizes_have_the_published_numbers_of_parameters() -> None:
    with torch.device("meta"):
        dit, modulation = MMDiT(RELEASED.dit, Attention()), Modulation(RELEASED.dit)
    count = sum(x.numel() for module in (dit, modulation) for x in module.parameters()) - dit.pos_table.numel()
    adaln = sum(x.numel() for layer in modulation.layers() for x in layer.parameters())
    assert (count, adaln) == (2_243_171_520, 767_270_400)
    assert modulation(torch.empty(50, device="meta"), torch.empty(2, 2048, device="meta")).shape == (50, 2, 499200)
