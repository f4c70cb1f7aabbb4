"""Recorded runs of UniPic-2, whose diffusion transformer and autoencoder are DeepGen's.

MetaQuery's language model and conditioner are replayed too. Of Kontext's text encoders nothing is: its recorded prompt
embeddings are played in.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from unipic_run.bench.parity_case import Case
from unipic_run.bench.parity_deepgen import INJECTED, LEVELS_OFF, WatchedSampler, replay_levels, resized, tape
from unipic_run.bench.parity_ledger import EXACT, Ledger
from unipic_run.engine.engine import Engine
from unipic_run.engine.layers.attention import Attention
from unipic_run.engine.models.deepgen import conditioner, keys
from unipic_run.engine.models.deepgen import model as deepgen
from unipic_run.engine.models.deepgen.conditioner import Row
from unipic_run.engine.models.deepgen.config import ConnectorConfig
from unipic_run.engine.models.deepgen.connector import Connector
from unipic_run.engine.models.deepgen.prompts import PICTURE, TURN, as_ids
from unipic_run.engine.models.deepgen.released_config import aligned
from unipic_run.engine.models.deepgen.sampler import Guided
from unipic_run.engine.run import to_levels
from unipic_run.engine.schedules import FLOW_STEPS

ENCODERS = "CLIP and T5, which the engine does not have: the recorded embeddings are played in"
PROCESSOR = "made by Qwen's own image processor, which the engine does not have: played in"


def replay_kontext(engine: Engine, case: Case) -> Ledger:
    """A case of kind `unipic2_kontext`."""
    ledger, tensors = case.ledger(), case.tensors
    for name in tensors:
        if "embeds" in name or name.startswith("tokenizer"):
            ledger.leave(name, ENCODERS)
    pairs = ("negative_prompt_embeds", "prompt_embeds"), ("negative_pooled_prompt_embeds", "pooled_prompt_embeds")
    text, pooled = (torch.cat([tensors[name] for name in pair]) for pair in pairs)
    ledger.compare("dit_seq_uncond_cond", text, EXACT)
    ledger.compare("dit_pooled_uncond_cond", pooled, EXACT)
    replay_sampling(ledger, engine, case, text.flip(0), pooled.flip(0))
    return ledger


def replay_metaquery(engine: Engine, case: Case) -> Ledger:
    """A case of kind `unipic2_metaquery`; `engine` has the language model without DeepGen's update."""
    ledger, tensors, settings = case.ledger(), case.tensors, case.settings
    model, (conditions, queries) = engine.loaded.model, released_conditioner(case.folder.parent)
    grids, features = [], []
    if "vis.patches" in tensors:
        _, rows, columns = tensors["vis.grid_thw"][0].tolist()
        grids = [(rows // engine.config.vision.merge, columns // engine.config.vision.merge)]
        features = [model.vision(tensors["vis.patches"], rows, columns)]
        ledger.compare_scaled("vis.embeds", torch.cat(features * 2))
        for name in ("vis.patches", "vis.grid_thw"):
            ledger.leave(name, PROCESSOR)
    said = [settings["prompt"], settings["negative_prompt"]]
    texts = [TURN.format(f"{PICTURE}{text}" if grids else f"Generate an image: {text}") for text in said]
    ids = [as_ids(engine.loaded.tokens, text, engine.config.image_token, grids) for text in texts]
    compare_rows(ledger, ids, len(queries))
    rows = [Row(row, features, grids) for row in ids]
    hidden = conditioner.query_states(model.llm, model.embed, queries, rows, engine.config.image_token)
    ledger.compare_scaled("query_hidden", hidden)
    text, pooled = conditions(hidden)
    ledger.compare_scaled("seq", text)
    ledger.compare_scaled("pooled", pooled)
    ledger.compare_scaled("dit_seq_uncond_cond", text.flip(0))
    ledger.compare_scaled("dit_pooled_uncond_cond", pooled.flip(0))
    replay_sampling(ledger, engine, case, text, pooled)
    return ledger


def compare_rows(ledger: Ledger, ids: list[list[int]], queries: int) -> None:
    """Ids, mask and positions at the slots that hold a token: on the record's pads nothing depends."""
    mask = ledger.recorded["attention_mask"].bool()
    ledger.compare("attention_mask", mask.sum(1), EXACT, torch.tensor([len(row) + queries for row in ids]))
    for row, (own, filled) in enumerate(zip(ids, mask, strict=True)):
        ledger.compare(f"input_ids (row {row})", own, EXACT, ledger.recorded["input_ids"][row][filled][:-queries])
        at = torch.arange(len(own) + queries).expand(3, -1)
        ledger.compare(f"position_ids (row {row})", at, EXACT, ledger.recorded["position_ids"][:, row, filled])
    for name in ("input_ids", "position_ids"):
        ledger.leave(name, "compared row by row: prompts are never padded here, and queries have no ids")


def replay_sampling(ledger: Ledger, engine: Engine, case: Case, text: Tensor, pooled: Tensor) -> None:
    """From conditions (2, M, text) and (2, pooled), conditional row first, to the picture."""
    model, settings, guidance = engine.loaded.model, case.settings, case.settings["guidance_scale"]
    text, pooled = text.to(engine.device), pooled.to(engine.device)
    levels, references = replay_levels(ledger, engine, settings["num_steps"]), []
    if "ref0.raw_uint8" in case.tensors:
        pixels = resized(ledger, case, 0, settings["resize_longest_edge"]).to(engine.device)
        seen = deepgen.Picture(text, (0, 0), model.vae_encoder(pixels))
        references = [deepgen.posterior(engine.config, seen, 0, [tape(case, 0, [0])])]
        ledger.compare_scaled("ref0.latents", references[0])
        ledger.leave("ref0.vae_noise", INJECTED)
    timesteps = torch.tensor(levels.sigmas[:-1], device=text.device) * FLOW_STEPS
    sampler = WatchedSampler(model, [Guided(text, model.modulation(timesteps, pooled))], references, guidance)
    x, states = case.tensors["noise"].to(text), []
    for step in range(len(levels)):
        x, _ = sampler.step(x, levels, step)
        states.append(x)
    ledger.leave("noise", INJECTED)
    ledger.compare_scaled("noise_pred", torch.stack(sampler.seen).flip(1))
    ledger.compare_scaled("latents", torch.stack(states))
    pixels = deepgen.decode(model, x, settings["height"] // 16, settings["width"] // 16)
    ledger.compare_levels("image_uint8_hwc", to_levels(pixels)[0].cpu(), case.tensors["image_uint8_hwc"], LEVELS_OFF)


def released_conditioner(folder: Path) -> tuple[Connector, Tensor]:
    """MetaQuery's conditioner in float32 from the recorded `weights`, and its queries."""
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
    return connector, connector.queries


def connector_rows(config: ConnectorConfig) -> keys.Rows:
    made = keys.tables.rows({ours: theirs for ours, theirs in keys.ONCE.items() if ours.startswith("connector.")})
    for i in range(config.depth):
        made |= keys.tables.rows(keys.CONNECTOR_BLOCK, f"connector.encoder.{i}.", f"{keys.CONNECTOR_BLOCKS}{i}.")
    return made
