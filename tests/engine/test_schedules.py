"""The reveal plan covers every token once; counts, noise tables and noise levels agree with the recorded ones."""

import json
import math
import os
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from unipic_run.engine.schedules import (
    annealed_steps,
    cosine_betas,
    ddpm_table,
    euler_step,
    flow_match_sigmas,
    gtr_counts,
    gtr_orders,
    guidance_at,
    ode_table,
    reveal_counts,
    reveal_rounds,
)
from unipic_run.kernels.ddpm_step import ddpm_step

ROOT = Path(__file__).resolve().parents[2]
DEEPGEN = Path(os.environ.get("UNIPIC_RUN_GOLDENS", ROOT.parent / "shared" / "goldens")) / "deepgen"


def test_counts_equal_the_recorded_schedules(goldens: Path) -> None:
    for case in json.loads((goldens / "cases" / "mask_schedule.json").read_text()):
        rows, columns = case["grid"]
        counts = [before - after for before, after in reveal_counts(rows * columns, case["num_iter"])]
        assert counts == [count for count in case["predicted_per_iter"] if count], case


@pytest.mark.parametrize(("masked", "steps"), [(1, 1), (1, 9), (2, 5), (37, 8), (48, 100)])
def test_every_token_is_revealed_once_and_known_ones_never(masked: int, steps: int) -> None:
    torch.manual_seed(0)
    places = torch.stack([torch.randperm(48)[:masked] for _ in range(2)])  # M of 48 tokens, another set each image
    plan = reveal_rounds(places, 6, 8, steps)
    for image in range(2):
        known = set(range(48)) - set(places[image].tolist())
        for step in plan.rounds:
            visible, predicted = step.visible[image].tolist(), step.predicted[image].tolist()
            assert visible == sorted(known) and predicted == sorted(predicted) and predicted
            assert not known & set(predicted)
            known |= set(predicted)
        assert known == set(range(48))


def test_what_is_masked_is_all_that_is_not_known() -> None:
    plan = reveal_rounds(torch.tensor([[3, 1, 2, 0], [0, 4, 1, 3]]), 1, 5, 3)
    for step in plan.rounds:
        for visible, masked in zip(step.visible.tolist(), step.masked.tolist(), strict=True):
            assert masked == [place for place in range(5) if place not in visible]


def test_tokens_are_revealed_from_the_end_of_the_order() -> None:
    plan = reveal_rounds(torch.tensor([[3, 1, 2, 0]]), 2, 2, 2)
    assert [step.predicted.tolist() for step in plan.rounds] == [[[0, 2]], [[1, 3]]]


@pytest.mark.parametrize(
    ("rows", "columns", "steps"), [(16, 16, 32), (64, 64, 32), (8, 8, 16), (5, 7, 3), (8, 8, 2), (8, 8, 1), (1, 1, 9)]
)
def test_checkerboards_are_revealed_one_after_the_other(rows: int, columns: int, steps: int) -> None:
    torch.manual_seed(0)
    random = torch.stack([torch.randperm(rows * columns) for _ in range(2)])
    orders = gtr_orders(random, columns)
    counts = gtr_counts(orders[0], columns, steps)
    plan = reveal_rounds(orders, rows, columns, steps, counts)
    assert [before for before, _ in counts] == [rows * columns, *(after for _, after in counts[:-1])]
    assert counts[-1][1] == 0 and len(counts) <= steps and all(before > after for before, after in counts)
    for image in range(2):
        seen = [
            {0: 0, 2: 1}.get((place // columns + place % columns) % 4, 2)
            for step in plan.rounds
            for place in sorted(step.predicted[image].tolist(), key=lambda p: (p // columns + p % columns) % 2)
        ]
        assert len(seen) == rows * columns
        assert steps < 3 or seen == sorted(seen)
    if steps == 2:
        assert counts == [(64, 32), (32, 0)]
    if rows == 16:
        assert [before - after for before, after in counts[-8:]] == [10, 11, 11, 10, 11, 11, 64, 64]


def test_a_checkerboard_of_some_cells_keeps_to_them() -> None:
    """The first set is missing here altogether."""
    places = torch.tensor([[1, 3, 2, 6, 7]])  # of 8 columns
    orders = gtr_orders(places, 8)
    plan = reveal_rounds(orders, 2, 8, 4, gtr_counts(orders[0], 8, 4))
    assert [step.predicted.tolist() for step in plan.rounds] == [[[2, 6]], [[1, 3, 7]]]


def test_head_steps_fall_evenly_from_the_first_round_to_the_last() -> None:
    assert [annealed_steps(50, 5, i, 4) for i in range(4)] == [50, 35, 20, 5]
    assert [annealed_steps(20, 20, i, 3) for i in range(3)] == [20] * 3
    assert annealed_steps(50, 5, 0, 1) == 5


def test_a_table_that_begins_later_is_the_same_process() -> None:
    """Its coefficients follow from the shares of signal at its own timesteps."""
    whole, cut = ddpm_table(1000, 50, 0.2), ddpm_table(1000, 50, 0.2, latest=950)
    timesteps = [step.timestep for step in cut]
    assert timesteps == [*(step.timestep for step in whole if step.timestep < 950), 950]
    assert cut[:-1] == whole[: len(cut) - 1]
    kept = torch.cumprod(1 - cosine_betas(1000, 0.2), dim=0)
    assert cut[-1].sqrt_recip == pytest.approx(1 / kept[950].sqrt().item())
    assert ddpm_table(1000, 50, 0.2, latest=999) == whole
    assert [step.timestep for step in ddpm_table(1000, 2, 0.2, latest=950)] == [0, 950]


def test_linear_guidance_equals_the_recorded_scales(goldens: Path) -> None:
    recorded = load_file(goldens / "cases" / "t2i_linear_b2.safetensors")
    case = json.loads((goldens / "cases" / "t2i_linear_b2.json").read_text())
    plan = reveal_rounds(recorded["orders"].long(), *case["image_shape"], case["num_iter"])
    for step in plan.rounds:
        scale = guidance_at("linear", case["cfg"], step.left)
        assert scale == pytest.approx(recorded[f"step{step.index}.cfg"].item(), abs=1e-6), step.index


def test_linear_guidance_grows_with_what_is_revealed() -> None:
    assert guidance_at("constant", 3.0, 0.7) == 3.0
    assert guidance_at("linear", 3.0, 1.0) == 1.0 and guidance_at("linear", 3.0, 0.0) == 3.0
    assert guidance_at("linear", 3.0, 0.25) == pytest.approx(2.5)


def test_noise_table_equals_the_recorded_constants(goldens: Path) -> None:
    recorded = load_file(goldens / "cases" / "units.safetensors")
    torch.testing.assert_close(cosine_betas(1000, 0.2), recorded["diff.base_betas_1000"], rtol=1e-12, atol=0)
    table = ddpm_table(1000, 100, 0.2)
    assert [step.timestep for step in table] == recorded["diff.timestep_map"].tolist()
    for field, name in (
        ("sqrt_recip", "sqrt_recip_alphas_cumprod"),
        ("sqrt_recip_m1", "sqrt_recipm1_alphas_cumprod"),
        ("c1", "posterior_mean_coef1"),
        ("c2", "posterior_mean_coef2"),
        ("log_beta_tilde", "posterior_log_variance_clipped"),
    ):
        ours = torch.tensor([getattr(step, field) for step in table], dtype=torch.float64)
        torch.testing.assert_close(ours, recorded[f"diff.{name}"], rtol=1e-12, atol=0, msg=field)
    betas = torch.tensor([step.log_beta for step in table], dtype=torch.float64).exp()
    torch.testing.assert_close(betas, recorded["diff.betas"], rtol=1e-12, atol=0)


def test_one_step_table_is_finite() -> None:
    (step,) = ddpm_table(1000, 1, 0.2)
    assert step.timestep == 0 and step.sqrt_recip > 0


def solved(table, eps, x: torch.Tensor) -> list[torch.Tensor]:
    """x (N, 1) float64 after every step of an ODE's solver, from eps(x, timestep)."""
    states, before = [], torch.zeros_like(x)
    for step in reversed(table):
        out = torch.cat([eps(x, step.timestep), torch.full_like(x, float("nan"))], dim=1)  # no variance is looked at
        x = ddpm_step(x, out, None, None, step, 1.0, 1.0, before)
        states.append(x)
    return states


def waves(x: torch.Tensor, timestep: int) -> torch.Tensor:
    return torch.sin(3 * x + timestep / 300)


@pytest.mark.parametrize("latest", [None, 950])
@pytest.mark.parametrize("steps", [2, 4, 11])
def test_both_solvers_step_as_their_papers_say(steps: int, latest: int | None) -> None:
    """DDIM on eps, equation 12 of arXiv 2010.02502; 2M on x0, algorithm 2 of arXiv 2211.01095, but for its end."""
    bars = torch.cumprod(1 - cosine_betas(1000, 0.2), dim=0)
    kept = [step.timestep for step in ddpm_table(1000, steps, 0.2, latest)][::-1]
    ends = torch.cat([bars[kept], torch.ones(1, dtype=torch.float64)])
    alpha, sigma = ends.sqrt(), (1 - ends).sqrt()
    start = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
    one, two, former = start, start, None
    ddim, multi = (solved(ode_table(1000, steps, 0.2, latest, order), waves, start) for order in (1, 2))
    for i, timestep in enumerate(kept):
        eps = waves(one, timestep)
        one = alpha[i + 1] * (one - sigma[i] * eps) / alpha[i] + sigma[i + 1] * eps
        torch.testing.assert_close(ddim[i], one, rtol=1e-9, atol=1e-12)
        x0 = (two - sigma[i] * waves(two, timestep)) / alpha[i]
        guess, h = x0, (alpha[i + 1] / sigma[i + 1] * sigma[i] / alpha[i]).log()
        if 0 < i < len(kept) - 2:
            r = (alpha[i] / sigma[i] * sigma[i - 1] / alpha[i - 1]).log() / h
            guess = (1 + 1 / (2 * r)) * x0 - 1 / (2 * r) * former
        two, former = sigma[i + 1] / sigma[i] * two - alpha[i + 1] * torch.expm1(-h) * guess, x0
        torch.testing.assert_close(multi[i], two, rtol=1e-9, atol=1e-12)


def test_solvers_step_as_those_of_diffusers() -> None:
    """Whose last steps differ: they are compared as far as they are alike."""
    diffusers = pytest.importorskip("diffusers")
    start = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
    for order in (1, 2):
        theirs = diffusers.DPMSolverMultistepScheduler(
            trained_betas=cosine_betas(1000, 0.2).numpy(), solver_order=order, final_sigmas_type="zero"
        )
        table, x, states = ode_table(1000, 10, 0.2, 950, order), start, []
        theirs.set_timesteps(timesteps=[step.timestep for step in reversed(table)])
        for timestep in theirs.timesteps:
            x = theirs.step(waves(x, timestep.item()), timestep, x).prev_sample
            states.append(x)
        alike = len(table) if order == 1 else len(table) - 2
        ours = solved(table, waves, start)[:alike]
        torch.testing.assert_close(torch.stack(ours), torch.stack(states[:alike]), rtol=2e-4, atol=2e-4)


def test_solvers_come_to_what_the_equation_says() -> None:
    """Of normal data, whose path is known: twice the steps halve DDIM's error and quarter the second order's."""
    mean, spread = 0.7, 0.2
    bars = torch.cumprod(1 - cosine_betas(1000, 0.2), dim=0)

    def eps(x: torch.Tensor, timestep: int) -> torch.Tensor:
        a = bars[timestep]
        return (1 - a).sqrt() * (x - a.sqrt() * mean) / (a * spread**2 + 1 - a)

    x, a = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None], bars[950]
    exact = mean + spread * (x - a.sqrt() * mean) / (a * spread**2 + 1 - a).sqrt()

    def error(steps: int, order: int) -> float:
        return (solved(ode_table(1000, steps, 0.2, 950, order), eps, x)[-1] - exact).abs().max().item()

    first, second = ([error(steps, order) for steps in (20, 40, 80)] for order in (1, 2))
    assert second[0] < 0.6 * first[0]
    assert all(1.6 < a / b < 2.4 for a, b in pairwise(first)) and all(a / b > 3 for a, b in pairwise(second))


def mixture_x0(x: torch.Tensor, a: float) -> torch.Tensor:
    """The mean of the data (N, 1) that x may have come from, of a mixture of three normal distributions."""
    share, mean, spread = torch.tensor([[0.3, 0.5, 0.2], [-1.5, 0.3, 1.1], [0.15, 0.3, 0.1]], dtype=torch.float64)
    variance, off = a * spread**2 + 1 - a, x - a**0.5 * mean  # (3), (N, 3)
    likely = torch.softmax(share.log() - variance.log() / 2 - off**2 / variance / 2, dim=1)
    return (likely * (mean + a**0.5 * spread**2 / variance * off)).sum(dim=1, keepdim=True)


def test_first_order_at_the_end_is_better_than_second() -> None:
    """Root mean square errors at the end, in 5, 10 and 50 steps, as docs/speed.md has them."""
    bars = torch.cumprod(1 - cosine_betas(1000, 0.2), dim=0).tolist()

    def eps(x: torch.Tensor, timestep: int) -> torch.Tensor:
        a = bars[timestep]
        return (x - a**0.5 * mixture_x0(x, a)) / (1 - a) ** 0.5

    def to_the_end(steps: int) -> list:
        """The table with a second-order step to timestep 0."""
        table = ode_table(1000, steps, 0.2, 950, order=2)
        here, there, back = (
            math.log(bars[t] / (1 - bars[t])) for t in (step.timestep for step in (*table[1::-1], table[2]))
        )
        ahead = (there - here) / (here - back) / 2
        taken = table[1].c1
        return [table[0], table[1]._replace(c1=taken * (1 + ahead), c3=-taken * ahead), *table[2:]]

    start = torch.special.ndtri((torch.arange(400, dtype=torch.float64) + 0.5) / 400)[:, None]
    x, ends = (
        start,
        [1 / (1 + math.exp(-2 * L)) for L in torch.linspace(math.log(bars[950] / (1 - bars[950])) / 2, 9, 1500)],
    )
    for a, nearer in pairwise(ends):  # DDIM in a great many steps
        kept = ((1 - nearer) / (1 - a)) ** 0.5
        x = kept * x + (nearer**0.5 - kept * a**0.5) * mixture_x0(x, a)
    exact = mixture_x0(x, ends[-1])

    def errors(make) -> list[float]:
        return [(solved(make(steps), eps, start)[-1] - exact).square().mean().sqrt().item() for steps in (5, 10, 50)]

    ddim, dpm2 = (errors(lambda steps, order=order: ode_table(1000, steps, 0.2, 950, order)) for order in (1, 2))
    assert ddim == pytest.approx([0.25, 0.14, 0.05], abs=0.02), ddim
    assert dpm2 == pytest.approx([0.17, 0.06, 0.006], abs=0.006), dpm2
    assert errors(to_the_end) == pytest.approx([0.55, 0.18, 0.012], abs=0.01)


@pytest.fixture(scope="module")
def levels() -> dict[str, torch.Tensor]:
    if not DEEPGEN.exists():
        pytest.skip(f"needs the recorded runs in {DEEPGEN}")
    return load_file(DEEPGEN / "unit" / "unit.safetensors")


@pytest.mark.parametrize("steps", [50, 28, 20, 8, 4])
def test_noise_levels_equal_the_recorded_ones(steps: int, levels: dict[str, torch.Tensor]) -> None:
    sigmas = flow_match_sigmas(steps, 3.0)
    torch.testing.assert_close(sigmas, levels[f"sched.sigmas_{steps}"], rtol=1e-6, atol=0)
    torch.testing.assert_close(1000 * sigmas[:-1], levels[f"sched.timesteps_{steps}"], rtol=1e-6, atol=0)


def test_noise_levels_fall_from_one_to_zero() -> None:
    assert flow_match_sigmas(1, 3.0).tolist() == [1.0, 0.0]
    assert flow_match_sigmas(2, 1.0).tolist() == [1.0, pytest.approx(0.001), 0.0]
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.FlowMatchEulerDiscreteScheduler(shift=5.0)
    theirs.set_timesteps(13)
    torch.testing.assert_close(flow_match_sigmas(13, 5.0), theirs.sigmas, rtol=1e-6, atol=0)


def test_an_euler_step_is_the_recorded_one(levels: dict[str, torch.Tensor]) -> None:
    """Which goes from the first of four levels to the second."""
    sigmas, (x, velocity) = (
        levels["sched.sigmas_4"],
        (levels[f"sched.step_{name}"] for name in ("sample", "model_output")),
    )
    torch.testing.assert_close(
        euler_step(x, velocity, sigmas[1] - sigmas[0]), levels["sched.step_out"], rtol=1e-6, atol=1e-6
    )


def test_an_euler_step_is_rounded_once() -> None:
    x, velocity, step = torch.tensor([1.0]).bfloat16(), torch.tensor([1.0]).bfloat16(), -(2**-9) - 2**-12
    assert euler_step(x, velocity, step).item() == torch.tensor(1 + step).bfloat16().item() < 1.0
