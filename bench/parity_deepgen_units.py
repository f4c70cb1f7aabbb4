"""Recorded single computations of DeepGen 1.0 and its relatives: modules on random input, schedules, resizing."""

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from unipic_run.bench.parity_case import Case
from unipic_run.bench.parity_deepgen import TABLES
from unipic_run.bench.parity_ledger import EXACT, INJECTED, Ledger
from unipic_run.bench.parity_stream import Stream
from unipic_run.engine.checkpoint.parts import Sinusoids
from unipic_run.engine.engine import Engine
from unipic_run.engine.layers.attention import Attention
from unipic_run.engine.layers.linear import norm_linear
from unipic_run.engine.layers.timesteps import timestep_features
from unipic_run.engine.models.deepgen import keys
from unipic_run.engine.models.deepgen import model as deepgen
from unipic_run.engine.models.deepgen.config import ConnectorConfig
from unipic_run.engine.models.deepgen.connector import Connector
from unipic_run.engine.models.deepgen.limits import fitted_size
from unipic_run.engine.models.deepgen.modulation import of_layers
from unipic_run.engine.models.deepgen.released_config import aligned
from unipic_run.engine.models.deepgen.sampler import Levels
from unipic_run.engine.models.unipic2 import limits as unipic2
from unipic_run.engine.noise import FlowTape
from unipic_run.engine.picture import resize
from unipic_run.engine.schedules import FLOW_STEPS, euler_step

RELEASED_TABLE = Sinusoids("positions", side=384, base=64, width=1536)


def replay_deepgen_units(engine: Engine, case: Case) -> Ledger:
    """The `deepgen_units` case."""
    units = Units(engine, case)
    for replay in (units.connectors, units.embeddings, units.transformer, units.autoencoder, units.schedules):
        replay()
    units.sizes()
    return units.ledger


class Units:
    def __init__(self, engine: Engine, case: Case) -> None:
        self.engine, self.model, self.case, self.ledger = engine, engine.loaded.model, case, case.ledger()
        self.recorded = {name: x.to(engine.device) if x.is_floating_point() else x for name, x in case.tensors.items()}

    def given(self, *names: str) -> list[Tensor]:
        for name in names:
            self.ledger.leave(name, INJECTED)
        return [self.recorded[name] for name in names]

    def connectors(self) -> None:
        connector, stream = self.model.connector, Stream(self.model)
        states = stream.inner_taps(*self.given("scb.in"))
        self.ledger.compare_scaled("scb.proj1_out", connector.projector_1(states))
        self.ledger.compare_scaled("scb.connector_out", connector.encode(states))
        text, pooled = connector(states)
        self.ledger.compare_scaled("scb.seq", text)
        self.ledger.compare_scaled("scb.pooled", pooled)
        (pad,) = deepgen.states_of(self.model, [deepgen.pad(self.model)])
        self.ledger.compare_scaled("pad.scb_row", stream.plain_taps(pad[0, 0]))
        conditions = released_conditioner(self.case.folder.parent)
        (states,) = self.given("mq_conditioner.in")
        text, pooled = conditions.to(states.device)(states)
        self.ledger.compare_scaled("mq_conditioner.seq", text)
        self.ledger.compare_scaled("mq_conditioner.pooled", pooled)

    def embeddings(self) -> None:
        modulation, (timesteps, pooled) = self.model.modulation, self.given("temb.timestep", "temb.pooled")
        features = timestep_features(timesteps, self.engine.config.dit.frequencies)
        self.ledger.compare_scaled("temb.sinusoid", features)
        embedded = modulation.embed(timesteps, pooled)  # of every timestep with every prompt
        self.ledger.compare_scaled("temb.out", embedded.diagonal().T)
        for name in self.recorded:
            if name.startswith("pos.crop_"):
                rows, columns = map(int, name.removeprefix("pos.crop_").split("x"))
                self.ledger.compare(name, self.model.dit.positions(rows, columns), EXACT)
        rows, columns = torch.tensor(self.case.settings["pos.real_rows_rc"]).T
        made = RELEASED_TABLE.read()[0, rows * RELEASED_TABLE.side + columns]
        self.ledger.compare_scaled("pos.real_rows", made)

    def predict(self, latents: Tensor, row: int, *references: Tensor) -> Tensor:
        """One forward pass (1, C, h, w) of latents (1, C, h, w) with a recorded row's prompt and timestep."""
        timesteps, text, pooled = (self.recorded[f"dit.{name}"] for name in ("timestep", "seq", "pooled"))
        dit, rows = self.model.dit, slice(row, row + 1)
        (table,) = self.model.modulation(timesteps[rows], pooled[rows])
        embedded = torch.cat([dit.embed(one) for one in references], dim=1) if references else None
        return dit(latents, dit.context_embed(text[rows]), table, embedded)

    def transformer(self) -> None:
        latents, same = self.given("dit.latents", "dit.ref_same")
        self.given("dit.timestep", "dit.seq", "dit.pooled")
        small = [x[None] for x in self.given("dit.ref_small_a", "dit.ref_small_b")]
        mixed = [x[None] for x in self.given("dit.mixed_latents_0", "dit.mixed_latents_1")]
        pairs = list(latents.split(1))
        self.ledger.compare_scaled("dit.out_plain", torch.cat([self.predict(x, i) for i, x in enumerate(pairs)]))
        made = torch.cat([self.predict(x, i, same[i : i + 1]) for i, x in enumerate(pairs)])
        self.ledger.compare_scaled("dit.out_ref_same", made)
        self.ledger.compare_scaled("dit.out_unipic_ref_same", made)
        ragged = [self.predict(pairs[0], 0, *small), self.predict(pairs[1], 1)]
        self.ledger.compare_scaled("dit.out_ref_ragged", torch.cat(ragged))
        self.ledger.compare_scaled("dit.out_mixed_0", self.predict(mixed[0], 0, small[1])[0])
        self.ledger.compare_scaled("dit.out_mixed_1", self.predict(mixed[1], 1, small[0])[0])
        self.blocks(latents)

    def blocks(self, latents: Tensor) -> None:
        """Every block of the plain forward pass, and the pass without some of them."""
        dit, ledger, skipped = self.model.dit, self.ledger, self.case.settings["dit.skip_layers"]
        timesteps, text, pooled = (self.recorded[f"dit.{name}"] for name in ("timestep", "seq", "pooled"))
        (embedded,) = self.model.modulation.embed(timesteps[:1], pooled)
        ledger.compare_scaled("dit.trace.temb", embedded)
        (table,) = self.model.modulation(timesteps[:1], pooled)
        *chunks, final = of_layers(table, dit.config)
        image, context = dit.embed(latents), dit.context_embed(text)
        ledger.compare_scaled("dit.trace.patch_tokens", image)
        ledger.compare_scaled("dit.trace.context", context)
        without = image, context
        for index, block in enumerate(dit.blocks):
            both = chunks[2 * index : 2 * index + 2]
            image, context = block(image, context, *both, image.shape[1])
            ledger.compare_scaled(f"dit.trace.block{index}.img", image)
            if not block.last:
                ledger.compare_scaled(f"dit.trace.block{index}.txt", context)
            if index not in skipped:
                without = block(*without, *both, image.shape[1])
        velocity = dit.picture(norm_linear(without[0], dit.norm, dit.out, final), *latents.shape[2:])
        ledger.compare_scaled("dit.out_skip_layers", velocity)

    def autoencoder(self) -> None:
        config, (pixels, noise) = self.engine.config, self.given("vae.pixels", "vae.noise")
        moments = self.model.vae_encoder(pixels)
        for name, part in zip(("mean", "logvar"), moments.chunk(2, dim=1), strict=True):
            self.ledger.compare_scaled(f"vae.{name}", part)
        seen = deepgen.Picture(moments, (0, 0), moments)
        latents = deepgen.posterior(config, seen, 0, [FlowTape(noise[0], [noise[0]])])
        self.ledger.compare_scaled("vae.latents_scaled", latents)
        (latents,) = self.given("vae.dec_latents_scaled")
        pixels = deepgen.decode(self.model, latents, latents.shape[2] // 2, latents.shape[3] // 2)
        self.ledger.compare_scaled("vae.dec_pixels", pixels.movedim(3, 1))

    def schedules(self) -> None:
        for name in self.recorded:
            if name.startswith("sched.sigmas_"):
                steps = int(name.rpartition("_")[2])
                sigmas = Levels.of(steps, self.engine.config.shift).sigmas
                self.ledger.compare_scaled(name, sigmas, tolerance=TABLES)
                at = [FLOW_STEPS * sigma for sigma in sigmas[:-1]]
                self.ledger.compare_scaled(f"sched.timesteps_{steps}", at, tolerance=TABLES)
        x, velocity = self.given("sched.step_sample", "sched.step_model_output")
        sigmas = Levels.of(4, self.engine.config.shift).sigmas
        self.ledger.compare_scaled("sched.step_out", euler_step(x, velocity, sigmas[1] - sigmas[0]))

    def sizes(self) -> None:
        """UniPic-2's original rounds a side of thin pictures to nothing, of which the record has none."""
        (raw,) = self.given("resize.raw")
        image = Image.fromarray(raw.numpy())
        made = resize(image, fitted_size(image.size, "longest", 128))
        self.ledger.compare("resize.out_longest128", np.array(made), EXACT)
        wrong = 0
        for row in self.case.settings["resize_table"]:
            size, side = tuple(row["input_wh"]), row["target"]
            for fit, name in (("longest", "deepgen_resize_image"), ("keep", "deepgen_fix_pixels")):
                wrong += fitted_size(size, fit, side) != tuple(row[name])
            wrong += unipic2.fitted_size(size, "longest", side) != tuple(row["unipic_fix_longer_edge"])
        self.ledger.limit("resize_table", float(wrong), EXACT, f"{wrong} sizes differ" if wrong else "")


def released_conditioner(folder: Path) -> Connector:
    """MetaQuery's conditioner in float32 from the recorded `weights`."""
    place = folder / "weights" / "conditioner"
    told, (file,) = json.loads((place / "config.json").read_text("utf-8")), place.glob("*.safetensors")
    inner, theirs = told["connector_config"], load_file(file)
    config = ConnectorConfig(
        width=inner["hidden_size"],
        depth=inner["num_hidden_layers"],
        heads=inner["num_attention_heads"],
        mlp=aligned(inner["intermediate_size"]),
        queries=told["num_queries"],
        taps=0,
        pooled=told["pooled_projection_dim"],
        text=told["joint_attention_dim"],
        norm_eps=1e-6,
    )
    connector = Connector(config, told["llm_hidden_size"], Attention()).requires_grad_(False)
    named = {keys.spelled("connector", name): tensor for name, tensor in theirs.items()}
    rows = connector_rows(config)
    for name, ours in connector.state_dict().items():
        made = torch.cat([named[other] for other in rows[f"connector.{name}"]])
        ours.zero_()[tuple(map(slice, made.shape))] = made  # padded with zeros, which stay zeros
    return connector


def connector_rows(config: ConnectorConfig) -> keys.Rows:
    made = keys.tables.rows({ours: theirs for ours, theirs in keys.ONCE.items() if ours.startswith("connector.")})
    for i in range(config.depth):
        made |= keys.tables.rows(keys.CONNECTOR_BLOCK, f"connector.encoder.{i}.", f"{keys.CONNECTOR_BLOCKS}{i}.")
    return made
