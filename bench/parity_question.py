"""Recorded answers replayed through `Engine.ask`."""

import warnings
from itertools import takewhile

import torch
from unipic_run.bench.parity_case import Case
from unipic_run.bench.parity_ledger import EXACT, NETWORK, Ledger
from unipic_run.bench.parity_runs import joined, prompt_ids
from unipic_run.bench.parity_watch import Watch
from unipic_run.engine.checks import PATCH
from unipic_run.engine.engine import Engine
from unipic_run.engine.errors import UnipicWarning
from unipic_run.engine.outcome import Answer


def replay_question(engine: Engine, case: Case) -> Ledger:
    """An `image_to_text` case."""
    settings, recorded = case.settings, case.tensors
    ledger = case.ledger()
    expected = recorded["generated_ids"][0].tolist()
    with Watch(engine) as watch, warnings.catch_warnings():
        warnings.simplefilter("ignore", UnipicWarning)
        answer: Answer = engine.ask(
            case.source,
            settings["prompt"],
            res=settings["image_size"],
            max_new_tokens=settings["max_new_tokens_used"],
        )
    eos = [engine.config.eos_token]
    ids = [*answer.ids, *(eos if expected[-1:] == eos else [])]  # the record ends with the token that stopped it
    ledger.compare("generated_ids", [ids], EXACT)
    text = engine.loaded.tokens.decode(ids, keep_special=True)
    ledger.limit("decoded", float(text != settings["decoded"]), EXACT, "" if text == settings["decoded"] else text)
    same = 1 + sum(takewhile(bool, (a == b for a, b in zip(ids, expected, strict=False))))  # behind it all differs
    for name, seen in (("logits", watch.logits), ("scores", watch.scores)):
        ledger.compare(name, torch.stack(seen[:same]), NETWORK, recorded[name][:same])
    latents, features = watch.encoded[0]
    side = settings["image_size"] // PATCH
    ledger.compare("pixels", watch.pixels, NETWORK)
    ledger.compare("latent_tokens", latents.unflatten(1, (side, side)), NETWORK)
    ledger.compare("x_enc", features, NETWORK)
    picture = watch.prefills[0]
    ledger.compare("z_enc", picture.x[:, len(picture.ids) :], NETWORK)
    prompt = watch.prefills[:2]  # the picture and the question
    ledger.compare("input_ids", [prompt_ids(prompt, engine.config.image_token)], EXACT)
    ledger.compare("inputs_embeds", joined(prompt, "x")[None], NETWORK)
    ledger.compare("prefill_hidden", joined(prompt, "hidden")[None], NETWORK)
    return ledger
