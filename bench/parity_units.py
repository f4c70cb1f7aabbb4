"""Recorded vectors of single modules, preprocessing, rotary tables, tokenizer and schedule, through the real ones."""

import copy
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from unipic_run.bench.parity_bf16 import compare_distance, rms
from unipic_run.bench.parity_case import Case
from unipic_run.bench.parity_ledger import EXACT, UNIT, Ledger
from unipic_run.bench.parity_stream import Stream
from unipic_run.engine.engine import Engine
from unipic_run.engine.layers.attention import Attention
from unipic_run.engine.layers.qwen2 import Qwen2, Qwen2Config, inverse_frequencies
from unipic_run.engine.layers.timesteps import timestep_features
from unipic_run.engine.models.unipic import model as unipic
from unipic_run.engine.picture import center_crop, open_image, pad_square, to_pixels
from unipic_run.engine.schedules import cosine_betas, ddpm_table, reveal_counts
from unipic_run.kernels.ddpm_step import ddpm_step

GIVEN = "input of the recorded computation"


class Units:
    """The `units` case: recorded inputs through the modules of a loaded engine."""

    def __init__(self, engine: Engine, case: Case) -> None:
        self.model, self.config, self.device = engine.loaded.model, engine.config, engine.device
        self.case, self.ledger = case, case.ledger()
        self.stream, head = Stream(self.model), self.config.head
        self.table = ddpm_table(head.train_steps, head.steps, head.max_beta)

    def run(self) -> Ledger:
        self.vae()
        self.positions()
        self.mar()
        self.projections()
        self.llm()
        self.diffusion()
        self.head()
        self.single_steps()
        self.loops()
        return self.ledger

    def given(self, name: str) -> Tensor:
        self.ledger.leave(name, GIVEN)
        return self.case.tensors[name].to(self.device)

    def compare(self, name: str, ours: Any) -> None:
        self.ledger.compare(name, ours, UNIT)

    def matching(self, pattern: str) -> Iterator[re.Match[str]]:
        """Recorded names of a pattern, so that any number of sizes and settings is met."""
        return (found for name in self.case.tensors if (found := re.fullmatch(pattern, name)))

    def vae(self) -> None:
        for found in self.matching(r"(vae\.enc\d*)\.pixels"):
            pixels, name = self.given(found[0]), found[1]
            rows, columns = (side // 16 for side in pixels.shape[2:])
            if f"{name}.moments" in self.case.tensors:
                self.compare(f"{name}.moments", self.model.vae_encoder(pixels))
            latents = unipic.encode_latents(self.model, pixels)
            self.compare(f"{name}.latent_tokens", latents.unflatten(1, (rows, columns)))
        for found in self.matching(r"(vae\.dec\d*)\.latent_tokens"):
            latents = self.given(found[0]) / self.config.vae_scale
            self.compare(f"{found[1]}.image", self.model.vae_decoder(latents.permute(0, 3, 1, 2)))

    def positions(self) -> None:
        for found in self.matching(r"pos\.(\w+)\.(\d+)x(\d+)"):
            grid = int(found[2]), int(found[3])
            decoder, diffusion = self.model.mar_decoder.positions(*grid)
            tables = {"encoder": self.model.mar_encoder.positions(*grid), "decoder": decoder, "diffusion": diffusion}
            self.compare(found[0], tables[found[1]][None])

    def mar(self) -> None:
        side = self.config.mar.grid
        for name, grid in (("native", (side, side)), ("interp", (side - 2, side + 1))):
            if f"mar.{name}.x" in self.case.tensors:
                self.mar_stacks(f"mar.{name}", *grid)

    def mar_stacks(self, name: str, rows: int, columns: int) -> None:
        model = self.model
        tokens, masked, x_con = (self.given(f"{name}.{what}") for what in ("x", "mask", "x_con"))
        visible = torch.stack([row.nonzero()[:, 0] for row in masked == 0])
        everything = unipic.all_visible(tokens)
        encoded = model.mar_encoder(tokens, visible, model.mar_encoder.positions(rows, columns))
        self.compare(f"{name}.enc", encoded)
        positions = model.mar_decoder.positions(rows, columns)
        for suffix, source in (("z", None), ("z_x_con", x_con)):
            base = model.mar_decoder.base(source)
            self.compare(f"{name}.{suffix}", model.mar_decoder(encoded, visible, everything, base, *positions))

    def projections(self) -> None:
        self.compare("proj_in.y", self.stream.plain(self.model.proj_in(self.given("proj_in.x"))))
        self.compare("proj_out.y", self.model.proj_out(self.stream.inner_normed(self.given("proj_out.x"))))

    def llm(self) -> None:
        embeds = self.stream.inner(self.given("llm.embeds"))
        caches = [unipic.new_cache(self.model, embeds.shape[1], embeds) for _ in embeds]
        hidden = [self.model.llm.extend(row[None], cache) for row, cache in zip(embeds, caches, strict=True)]
        self.compare("llm.hidden_causal", self.stream.plain_normed(torch.cat(hidden)))

    def diffusion(self) -> None:
        """The respaced noise table against the float64 constants."""
        columns = {
            name: torch.tensor([getattr(step, name) for step in self.table], dtype=torch.float64)
            for name in self.table[0]._fields
        }
        head, a = self.config.head, 1 / columns["sqrt_recip"].square()
        ours = {
            "alphas_cumprod": a,
            "alphas_cumprod_prev": torch.cat([torch.ones(1, dtype=a.dtype), a[:-1]]),
            "betas": columns["log_beta"].exp(),
            "base_betas_1000": cosine_betas(head.train_steps, head.max_beta),
            "posterior_log_variance_clipped": columns["log_beta_tilde"],
            "posterior_mean_coef1": columns["c1"],
            "posterior_mean_coef2": columns["c2"],
            "sqrt_recip_alphas_cumprod": columns["sqrt_recip"],
            "sqrt_recipm1_alphas_cumprod": columns["sqrt_recip_m1"],
        }
        for name, values in ours.items():
            self.ledger.compare_relative(f"diff.{name}", values)
        name = "diff.posterior_variance"
        self.ledger.compare_relative(name, columns["log_beta_tilde"].exp()[1:], self.case.tensors[name][1:])
        self.ledger.leave(name, "index 0: it is 0 there, and the table holds the clipped value in its place")
        self.ledger.compare("diff.timestep_map", columns["timestep"], EXACT)

    def head(self) -> None:
        head, x, t, z = self.model.head, self.given("head.x"), self.given("head.t"), self.given("head.c")
        # On the CPU: one unit in the last place of a frequency is 6e-5 at timestep 999.
        features = timestep_features(t.cpu(), self.config.head.frequencies)
        self.compare("head.t_freq", features)
        embedded = head.time_embed(features.to(self.device))
        self.compare("head.t_emb", embedded)
        self.compare("head.out", head(x, embedded, head.cond_embed(z)))
        guidance = self.given("head.cfg_scale").item()
        half = len(x) // 2
        out = head(x[:half].repeat(2, 1), embedded, head.cond_embed(z))
        cond, uncond = out.chunk(2)
        # With these coefficients the sampler's step returns the guided eps itself.
        show_eps = self.table[0]._replace(sqrt_recip=0.0, sqrt_recip_m1=-1.0, c1=1.0, c2=0.0)
        eps = ddpm_step(x[:half], cond, uncond, None, show_eps, guidance, 1.0)
        self.compare("head.out_cfg", torch.cat([eps.repeat(2, 1), out[:, eps.shape[1] :]], dim=1))

    def single_steps(self) -> None:
        head, x, z = self.model.head, self.given("psample.x"), self.given("psample.c")
        temperature, embedded = self.case.settings["psample_temperature"], head.embed_steps(self.table)
        c = head.cond_embed(z)
        for found in self.matching(r"psample\.(\d+)\.noise"):
            i, noise = int(found[1]), self.given(found[0])
            out = head(x, embedded[i], c)
            sample = ddpm_step(x, out, None, noise if i else None, self.table[i], 1.0, temperature)
            self.compare(f"psample.{i}.sample", sample)
            x0 = ddpm_step(x, out, None, None, self.table[i]._replace(c1=1.0, c2=0.0), 1.0, temperature)
            # At high noise x0 is eps times a coefficient of hundreds, and the recorded float32 value is itself up to
            # 4e-6 of the largest one away from float64: an absolute 5e-5 would ask for more than was recorded.
            name = f"psample.{i}.pred_xstart"
            self.ledger.compare(name, x0, max(UNIT, 1e-5 * self.case.tensors[name].abs().max().item()))

    def loops(self) -> None:
        for found in self.matching(r"loop\.(\w+)\.out"):
            name = f"loop.{found[1]}"
            z, start, noise = (self.given(f"{name}.{what}") for what in ("z", "noise_init", "noise"))
            settings = self.case.settings[f"loop_{found[1]}"]
            scales = settings["cfg"], settings["temperature"]
            self.compare(found[0], self.denoise(self.model.head, z, start, noise, scales))
            rounded = f"{name}.out_bf16_net"
            if rounded in self.case.tensors:
                head = copy.deepcopy(self.model.head).bfloat16()
                ours = self.denoise(head, z.bfloat16(), start, noise, scales).cpu()
                truth, recorded = self.case.tensors[found[0]], self.case.tensors[rounded]
                compare_distance(self.ledger, rounded, ours, truth, recorded, {"rms": rms(recorded, truth)})

    def denoise(self, head: Any, z: Tensor, start: Tensor, noise: Tensor, scales: tuple[float, float]) -> Tensor:
        """A full run of the head's sampler; `scales` are guidance and temperature."""
        return head.sample(z, start, noise, self.table, head.embed_steps(self.table), *scales)


def replay_preprocess(engine: Engine, case: Case) -> Ledger:
    """Pictures `pre_NAME.png` to pixels: padded to a square (questions) and cropped (edits)."""
    ledger, size = Ledger(case.tensors), case.settings["out_size"]
    kinds = {"f32": torch.float32, "bf16": torch.bfloat16}
    pictures: dict[str, dict[str, Any]] = {}
    for full in case.tensors:
        name, how, kind = re.fullmatch(r"(.+)\.(pad|crop)_(\w+)", full).groups()
        if name not in pictures:
            image = open_image(case.folder / f"pre_{name}.png")
            pictures[name] = {"pad": pad_square(image, size), "crop": center_crop(image, size)}
        picture = pictures[name][how]
        if kind == "u8":
            ledger.compare(full, np.array(picture), EXACT)
        else:
            ledger.compare(full, to_pixels(picture, kinds[kind], cast_first=how == "pad"), UNIT)
    return ledger


def replay_rope(engine: Engine, case: Case) -> Ledger:
    """Rotary tables in bfloat16, on the CPU: elsewhere the last bit of a cosine is the device's own."""
    ledger, tensors = Ledger(case.tensors), case.tensors
    width, theta = case.settings["head_dim"], case.settings["rope_theta"]
    ledger.leave("positions", GIVEN)
    config = Qwen2Config(1, width, 0, 1, 1, width, 1, theta, 1e-6, int(tensors["positions"].max()) + 1)
    frequencies = inverse_frequencies(config, torch.device("cpu"))
    ledger.compare("inv_freq_f32", frequencies, EXACT)
    ledger.compare("inv_freq_bf16", frequencies.bfloat16(), EXACT)
    for suffix, rounded in (("upstream", True), ("from_f32_inv_freq", False)):
        tables = Qwen2(config, Attention(), rounded).rotary(tensors["positions"][None].long(), torch.bfloat16)
        for name, table in zip(("cos", "sin"), tables, strict=True):
            ledger.compare(f"{name}_{suffix}", table[0, 0], EXACT)
    return ledger


def replay_tokenizer(engine: Engine, case: Case) -> Ledger:
    """Strings to ids and back."""
    ledger, tokens = Ledger({}), engine.loaded.tokens
    for index, entry in enumerate(case.settings):
        ids = tokens.encode(entry["text"])
        ledger.limit(f"ids of string {index}", float(ids != entry["ids"]), EXACT)
        text = tokens.decode(entry["ids"], keep_special=True)
        ledger.limit(f"text of string {index}", float(text != entry["decoded"]), EXACT)
    return ledger


def replay_mask_schedule(engine: Engine, case: Case) -> Ledger:
    """Tokens predicted per round; rounds that predict none are left out here."""
    ledger = Ledger({})
    for entry in case.settings:
        rows, columns = entry["grid"]
        ours = [before - after for before, after in reveal_counts(rows * columns, entry["num_iter"])]
        recorded = [count for count in entry["predicted_per_iter"] if count]
        ledger.compare(f"{rows}x{columns} in {entry['num_iter']}", ours, EXACT, recorded)
    return ledger


def replay_units(engine: Engine, case: Case) -> Ledger:
    return Units(engine, case).run()
