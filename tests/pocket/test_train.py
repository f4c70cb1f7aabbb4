"""Training runs the model that inference runs, goes down, and is the same whether interrupted or not."""

import copy
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from unipic_run import Engine
from unipic_run.engine.layers.vae import VAEConfig
from unipic_run.engine.models.unipic import model as family
from unipic_run.engine.models.unipic.config import UniPicConfig
from unipic_run.engine.models.unipic.prompts import IMAGE, turn
from unipic_run.engine.noise import PhiloxNoise
from unipic_run.engine.schedules import reveal_rounds
from unipic_run.engine.task import Batch, Task
from unipic_run.engine.tokens import Tokens
from unipic_run.kernels.linear import in_software
from unipic_run.pocket import batches, losses
from unipic_run.pocket.batches import Answers, Draw, Seen, words_of
from unipic_run.pocket.config import GRID, pocket_config
from unipic_run.pocket.data import Shard, label, looks
from unipic_run.pocket.export import export
from unipic_run.pocket.head_losses import head_losses
from unipic_run.pocket.losses import (
    PREDICTED,
    SLIPS,
    Hints,
    Named,
    answer_losses,
    chosen,
    conditions,
    packed,
    picture_losses,
)
from unipic_run.pocket.muon import Optimiser, orthogonal
from unipic_run.pocket.painter import paint
from unipic_run.pocket.plans import DecoderPlan, JointPlan, Sizes, VAEPlan
from unipic_run.pocket.samples import sample
from unipic_run.pocket.scenes import COLOURS, SHAPES, SIZES, Figure, Scene
from unipic_run.pocket.sitting import Plan, Run, generator, sit
from unipic_run.pocket.tokenizer import END, UNKNOWN, pocket_tokenizer
from unipic_run.pocket.train_decoder import AT_ONCE, SHARES, Wanted, redrawn, train_decoder, weighed
from unipic_run.pocket.train_joint import Joint, fast_products, initialise, joint_losses, train_joint
from unipic_run.pocket.train_vae import Autoencoder, crops, judge_vae, train_vae, vae_losses
from unipic_run.pocket.vocabulary import vocabulary

TINY_VAE = VAEConfig(base=32, multipliers=(1, 1, 1, 1, 1), latent=16, groups=8)
TINY_PLAN = JointPlan(
    steps=4,
    seed=2,
    hint_weights=(0.1, 0.0),
    words_first=1,
    pictures=4,
    edits=2,
    answers=4,
    shard=Sizes(scenes=4, edits=4),
    first_shards=1,
    fresh_every=100,
)
PROMPTS = ("a red circle", "two small blue stars above a large yellow ring on a black background", "three crosses")


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer = pocket_tokenizer()
    tokenizer.save(str(path))
    return Tokens(path, IMAGE, tokenizer.token_to_id(IMAGE))


@pytest.fixture(scope="module")
def config(tokens) -> UniPicConfig:
    known = tokens.tokenizer
    full = pocket_config(known.get_vocab_size(), known.token_to_id(IMAGE), known.token_to_id(END), vae_scale=1.5)
    return replace(
        full,
        llm=replace(full.llm, width=32, layers=2, heads=4, kv_heads=2, head_dim=8, mlp=48),
        mar=replace(full.mar, width=32, heads=4, encoder_depth=1, decoder_depth=2, mlp=48, buffer=4),
        head=replace(full.head, width=32, depth=1, condition=32, frequencies=16, steps=4),
        vae=TINY_VAE,
        rounds=3,
    )


@pytest.fixture(scope="module")
def vae():
    torch.manual_seed(0)
    return Autoencoder(TINY_VAE).requires_grad_(False).eval()


@pytest.fixture(scope="module")
def random_model(config):
    """Every weight random, so that no part of the path can be left out unnoticed."""
    joint = Joint(config)
    initialise(joint, 0)
    noise = generator(9, 0)
    for parameter in joint.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=noise)
    return joint.model.requires_grad_(False)


def test_the_tokenizer_knows_every_word_and_the_templates(tokens):
    unknown = tokens.tokenizer.token_to_id(UNKNOWN)
    for text in (*vocabulary(), *(turn(kind, PROMPTS[1]) for kind in ("generate", "edit", "ask"))):
        assert unknown not in tokens.encode(text), text
    assert len(tokens.encode(turn("generate", PROMPTS[0]))) == 9
    assert tokens.encode("a Purple elephant")[2] == unknown
    said = "a red circle, two stars and a ring on a white background"
    assert tokens.decode(tokens.encode(said)) == said


@pytest.mark.parametrize("kind", ["generate", "edit"])
def test_training_sees_what_sampling_sees(random_model, tokens, kind):
    """Conditions z of padded prompts of different lengths against those of the sampler, in every round."""
    model, noise = random_model, generator(1, 1)
    pixels = torch.rand(1, 3, 16 * GRID, 16 * GRID, generator=noise) * 2 - 1 if kind == "edit" else None
    task = Task(kind, GRID, GRID, 5, 1.0, "constant", 1.0, sources=() if pixels is None else (pixels,))
    noises = [PhiloxNoise(i) for i in range(len(PROMPTS))]
    rounds = reveal_rounds(torch.stack([each.order(GRID**2) for each in noises]), GRID, GRID, task.steps)
    known = torch.randn(len(PROMPTS), GRID**2, 16, generator=noise)
    with torch.inference_mode():
        seen = None if pixels is None else family.look(model, tokens, task, Batch(PROMPTS, noises))
        given = family.condition(model, tokens, task, Batch(PROMPTS, noises), seen)
        sampler = family.Sampler(model, given.rows, given.source and given.source.x_con, task, noises)
        sources = None if pixels is None else given.source.latents.expand(len(PROMPTS), -1, -1)
        words = words_of(tokens, [turn(kind, prompt) for prompt in PROMPTS])
        for plan in rounds.rounds:
            z, _ = conditions(model, tokens, words, sources, known, plan.visible, plan.predicted)
            torch.testing.assert_close(z, sampler.understand(known, plan), atol=2e-5, rtol=1e-4)


def test_training_foresees_what_answering_says(random_model, tokens):
    """The cross-entropy of a batch against the logits of the decoding loop."""
    model = random_model
    questions = ("what color is the ring?", "count the stars", "where is the cross?", "describe the picture")
    answers = ("blue", "a red circle", "two", "in the middle")
    latents = torch.randn(2, GRID**2, 16, generator=generator(2, 2))  # two questions about each
    words = words_of(tokens, [turn("ask", question) for question in questions], [said + END for said in answers])
    expected = []
    with torch.inference_mode():
        for row, question, said in zip(latents.repeat_interleave(2, 0), questions, answers, strict=True):
            position = model.mar_encoder.positions(GRID, GRID)
            x_con = model.mar_encoder(row[None], family.all_visible(row[None]), position)
            features = family.buffers_last(model.proj_in(x_con), model.config.mar.buffer)
            cache = family.read_image(model, tokens, features, spare=40)
            ids = family.question_ids(tokens, question)
            for word in tokens.encode(said + END):
                expected.append(-family.next_logits(model, cache, ids).log_softmax(-1)[word])
                ids = [word]
        seen = Seen(latents, torch.zeros(2, GRID**2 + 1, dtype=torch.int64))
        found = answer_losses(model, Hints(model.config.mar.width, 16), tokens, Answers(seen, words))["answer"]
    torch.testing.assert_close(found, torch.stack(expected).mean(), atol=1e-5, rtol=1e-4)


def test_questions_are_about_pictures_where_objects_stand_anywhere(vae, tokens):
    """As in the exam: about what edits begin with, and not about composed pictures."""
    shard = Shard(2, 0, Sizes(scenes=4, edits=4)).encode(vae, 1.0, None)
    drawn = Draw(np.random.default_rng(1), [shard], tokens, torch.device("cpu")).answers(3, 2)
    found = [(shard.sources == row).flatten(1).all(1).nonzero().item() for row in drawn.seen.latents]
    assert len(set(found)) == 3 and len(drawn.words.ids) == 6
    assert torch.equal(drawn.seen.labels, torch.stack([label(shard.edits[i].source) for i in found]))


def test_labels_name_what_a_cell_shows():
    scene = sample(np.random.default_rng(3), "single object", "train").scene
    labels, figure = label(scene), scene.figures[0]
    assert labels[int(figure.y) // 16 * GRID + int(figure.x) // 16] > 0
    assert len(set(labels[:-1].tolist())) == 2  # nothing, and the one object


def test_a_label_can_be_taken_apart():
    for i in range(20):
        scene = sample(np.random.default_rng(i), "single object", "train").scene
        shape, colour, size = (int(part.unique().item()) for part in looks(label(scene)[:-1].unique()[1:]))
        assert (SHAPES[shape], tuple(COLOURS)[colour], tuple(SIZES)[size]) == scene.figures[0].look[:3]


def test_a_teacher_that_has_learned_nothing_moves_nothing(config):
    joint = Joint(config)
    initialise(joint, 0)
    features = torch.randn(2, GRID**2, config.mar.width, requires_grad=True)
    drawn = [sample(np.random.default_rng(i), "scene", "train").scene for i in range(2)]
    at = torch.arange(GRID**2).expand(2, -1)
    joint.hints.foreseen(features, torch.stack([label(scene) for scene in drawn]), at).backward()
    assert not features.grad.any()
    assert all(reader.weight.grad.any() for reader in joint.hints.foreseen.read.values())


def test_a_teacher_is_right_where_features_say_what_is_there():
    """One-hot features, read by ones: no look is asked of cells without an object."""
    scene = sample(np.random.default_rng(3), "single object", "train").scene
    labels, named = label(scene)[None], Named(2)
    shows = labels[:, :-1] > 0
    for name, reader in named.read.items():
        torch.nn.init.zeros_(reader.weight)
        torch.nn.init.zeros_(reader.bias)
        figure = scene.figures[0]
        right = {"shape": SHAPES.index(figure.shape), "colour": tuple(COLOURS).index(figure.colour)}
        right |= {"size": tuple(SIZES).index(figure.size), "ground": int(labels[0, -1])}
        if name == "object":
            reader.weight.data += torch.tensor([[50.0, 0.0], [0.0, 50.0]])
        else:
            reader.weight.data[right[name]] += torch.tensor([50.0 if name == "ground" else -50.0, 50.0])
    features = torch.stack([~shows, shows], dim=-1).float()
    assert named(features, labels, torch.arange(GRID**2)[None]) < 1e-6


def test_objects_are_learned_from_more_often_and_weigh_what_they_stand_for():
    noise, shows = generator(4, 0), torch.zeros(3, 64, dtype=torch.bool)
    shows[0, :8] = shows[1, :40] = True  # few cells, many, none
    values, total, draws = torch.randn(3, 64, generator=noise), torch.zeros(3), 1500
    for _ in range(draws):
        masked = torch.rand(3, 64, generator=noise).argsort(dim=1)
        predicted, weights = chosen(masked, shows, 1.0)
        assert predicted.shape == (3, PREDICTED) and (predicted.diff(dim=1) > 0).all()
        counts = shows.gather(1, predicted).sum(1)
        assert counts[0] == 8 and counts[1] >= PREDICTED // 2 and counts[2] == 0
        torch.testing.assert_close(weights.sum(1), torch.full((3,), 64.0))
        total += (weights * values.gather(1, predicted)).sum(1)
    torch.testing.assert_close(total / draws, values.sum(1), atol=1.0, rtol=0.0)
    few, weights = chosen(masked[:, :5], shows, 1.0)
    assert torch.equal(few, masked[:, :5].sort(dim=1).values) and (weights == 1).all()


def test_only_tokens_with_weight_move_the_head(random_model):
    """In several noise levels each, so a weight that went to another token would show."""
    z, x = (torch.randn(6, width, generator=generator(5, i)) for i, width in enumerate((32, 16)))
    z.requires_grad_()
    weights = torch.tensor([0.0, 0.0, 0.0, 2.0, 0.0, 0.0])
    found = head_losses(random_model.head, z, x, weights, generator(5, 2))
    (found["noise"] + found["variance"]).backward()
    assert z.grad.any(dim=1).tolist() == (weights > 0).tolist()


@pytest.mark.parametrize("kind", ["pictures", "edits"])
def test_only_visible_tokens_are_a_little_off_in_training(config, vae, tokens, random_model, kind, monkeypatch):
    shard, seen = Shard(2, 0, Sizes(scenes=4, edits=4)).encode(vae, 1.0, None), {}

    def recorded(model, tokens, words, sources, known, *plan):
        seen.update(known=known, sources=sources)
        return conditions(model, tokens, words, sources, known, *plan)

    def told(head, z, x, weights, noise):
        seen["made"] = x
        return head_losses(head, z, x, weights, noise)

    monkeypatch.setattr(losses, "conditions", recorded)
    monkeypatch.setattr(losses, "head_losses", told)
    batch = getattr(Draw(np.random.default_rng(1), [shard], tokens, torch.device("cpu")), kind)(4)
    hints = Hints(config.mar.width, config.mar.channels)
    picture_losses(random_model, hints, tokens, batch, 0.5, generator(1, 1), 1.0)
    off = (seen["known"] - batch.made.latents).flatten(1).std(1)
    assert (off > 0).all() and (off < 1.1 * SLIPS).all() and off.unique().numel() == 4
    clean = {tuple(token) for token in batch.made.latents.flatten(0, 1).tolist()}
    assert all(tuple(token) in clean for token in seen["made"].tolist())
    assert seen["sources"] is (batch.source and batch.source.latents)


def test_prompts_of_training_name_groups_in_order(vae, tokens, monkeypatch):
    shard, ways = Shard(2, 0, Sizes(scenes=4, edits=1)).encode(vae, 1.0, None), []
    monkeypatch.setattr(batches, "phrase", lambda spec, rng, ordered=False: ways.append(ordered) or "a ring")
    Draw(np.random.default_rng(1), [shard], tokens, torch.device("cpu")).pictures(4)
    assert ways == [True] * 4


def test_the_weights_of_a_plan_reach_what_they_weigh(config, vae, tokens, monkeypatch):
    """Tokens are one where an object shows and zero elsewhere, so that the head's side can tell them."""
    joint, shard, weighed = Joint(config), Shard(2, 0, Sizes(scenes=4, edits=4)).encode(vae, 1.0, None), []
    initialise(joint, 0)
    for name, labels in (("latents", "labels"), ("sources", "source_labels"), ("targets", "target_labels")):
        shows = getattr(shard, labels)[:, :-1, None] > 0
        setattr(shard, name, shows.float().expand(-1, -1, 16))

    def recorded(head, z, x, weights, noise):
        weighed.append((x[:, 0], weights))
        return head_losses(head, z, x, weights, noise)

    def taken(step, **changes):
        plan = replace(TINY_PLAN, pictures=4, edits=4, copy_weight=0.5, answer_weight=0.25, **changes)
        draw = Draw(np.random.default_rng(1), [shard], tokens, torch.device("cpu"))
        weighed.clear()
        return joint_losses(joint, tokens, plan, draw, step), list(weighed)

    monkeypatch.setattr(losses, "head_losses", recorded)
    plain, heavy = (taken(1, object_weights=weights)[1] for weights in ((1.0, 1.0), (5.0, 1.0)))
    assert len(plain) == len(heavy) == 2  # pictures and edits, in the second of four steps
    for (shows, once), (_, more) in zip(plain, heavy, strict=True):
        assert shows.any() and torch.equal(more, torch.where(shows > 0, 4.0, 1.0) * once)
    found, _ = taken(2, hint_weights=(0.0, 0.0))
    parts = found["noise"] + found["variance"] + 2 * 0.25 * found["answer"] + 0.5 * found["copy"]
    torch.testing.assert_close(found["loss"], parts)


@pytest.mark.parametrize("step", [1, 2])  # with edits, and with answers
def test_fast_products_lead_where_float32_does(config, vae, tokens, random_model, step, monkeypatch):
    joint = Joint(config)
    joint.model.load_state_dict(random_model.state_dict())
    shard, device = Shard(2, 0, Sizes(scenes=16, edits=16)).encode(vae, 1.0, None), torch.device("cpu")
    plan = replace(TINY_PLAN, pictures=16, edits=16, answers=16)  # of a few alone, chance decides the fourth digit

    def found(context):
        with context:
            draw = Draw(np.random.default_rng(1), [shard], tokens, device)
            total = joint_losses(joint, tokens, plan, draw, step)["loss"]
        joint.zero_grad()
        total.backward()
        gradients = [p.grad.flatten() for p in joint.trained().values() if p.grad is not None]
        assert {gradient.dtype for gradient in gradients} == {torch.float32}
        return total.detach(), torch.cat(gradients)

    loss, gradient = found(nullcontext())
    allowed = torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed()
    fast, fast_gradient = found(fast_products(device))
    assert torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed() is allowed
    torch.testing.assert_close(fast, loss, rtol=1e-3, atol=0.0)
    assert F.cosine_similarity(gradient, fast_gradient, dim=0) > 0.9999
    monkeypatch.setattr("unipic_run.pocket.train_joint.in_software", lambda x: True)
    emulated, emulated_gradient = found(fast_products(device))
    assert torch.equal(emulated, loss) and torch.equal(emulated_gradient, gradient)
    if not in_software(torch.empty(0, dtype=torch.bfloat16)):
        assert not torch.equal(fast, loss), "products are taken in bfloat16"


def test_questions_about_one_picture_stand_without_pads(tokens):
    words = words_of(tokens, ["what?", "where is the ring?", "count the stars", "what?"], ["blue", "left", "two", "a"])
    ids, answers, number, place = packed(words, 2)
    totals = words.lengths.view(2, 2).sum(1)
    assert ids.shape[1] == totals.max() and totals[0] != totals[1]
    for row, total in enumerate(totals.tolist()):
        rows = words.ids[2 * row : 2 * row + 2]
        expected = torch.cat([r[:n] for r, n in zip(rows, words.lengths[2 * row :].tolist(), strict=False)])
        assert torch.equal(ids[row, :total], expected)
        assert torch.equal(rows[number[row], place[row]], ids[row])
    assert answers.sum() == words.answers.sum()


@pytest.fixture(scope="module")
def train(config, vae, tokens, tmp_path_factory):
    """A few steps of a joint phase; the latents of its one shard are encoded once."""
    kept = tmp_path_factory.mktemp("shards")

    def trained(state=None, begin=None, **changes):
        plan = replace(TINY_PLAN, **changes)
        return train_joint(config, vae, begin, tokens, plan, state, kept / str(plan.seed), 1.0)

    return trained


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(train):
    first, again, other = (train(steps=2, seed=seed)[1] for seed in (2, 2, 3))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["proj_in.0.weight"], other["proj_in.0.weight"])


def cut_at(step, advance):
    """Run.advance that saves each step and is interrupted before one of them."""

    def interrupted(run, losses):
        if run.step == step:
            raise KeyboardInterrupt
        advance(run, losses)
        run.save()

    return interrupted


def test_an_interrupted_run_ends_where_an_uninterrupted_one_does(train, tmp_path, monkeypatch):
    whole, state = train(tmp_path / "whole.safetensors")[1], tmp_path / "cut.safetensors"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Run, "advance", cut_at(2, Run.advance))
        train(state)
    *_, resumed, run, done = train(state)
    assert done and run.step == TINY_PLAN.steps
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_a_phase_goes_on_from_the_weights_of_the_one_before(train, config, tmp_path):
    weights = train()[1]
    after = train(begin=weights, seed=5, steps=1, rate=0.0, matrix_rate=0.0)[1]
    assert all(torch.equal(weights[name], after[name]) for name in weights)


def test_both_phases_go_down(train, monkeypatch):
    losses = []
    monkeypatch.setattr(Run, "advance", recording(Run.advance, losses))
    train(steps=30, rate=5e-3, decay=0.0)
    assert np.mean(losses[-5:]) < 0.9 * np.mean(losses[:5])
    losses.clear()
    vae = Autoencoder(TINY_VAE)
    pixels, weights = crops(np.random.default_rng(0), 2, 32)
    run = Run(dict(vae.named_parameters()), Plan(12, 2e-3, 0.02, 1, 0.5, 0.9, 0.0), None)
    sit(run, lambda step: vae_losses(vae, pixels, weights, generator(0, step)), 1.0)
    assert losses[-1] < 0.9 * losses[0]


def test_the_autoencoder_comes_back_with_averaged_weights_and_is_judged():
    trained, done = train_vae(TINY_VAE, VAEPlan(steps=2, batch=1), None, 1.0)
    judged = judge_vae(trained, pictures=2)
    assert done and judged.read == 0.0 and judged.std > 0


def recording(advance, losses):
    def recorded(run, found):
        losses.append(found["loss"].item())
        advance(run, found)

    return recorded


@pytest.mark.parametrize("kind", ["generate", "edit"])
def test_the_model_draws_only_a_share_of_a_picture_anew(random_model, tokens, kind):
    latents, sources = torch.randn(2, 3, GRID**2, 16, generator=generator(3, 0))
    wanted = Wanted(kind, ["make it blue"] * 3, latents, sources if kind == "edit" else None)
    again, same, other = (
        redrawn(random_model, tokens, wanted, np.random.default_rng(seed), generator(seed, 1)) for seed in (1, 1, 2)
    )
    assert torch.equal(again, same) and not torch.equal(again, other)
    changed = (again != latents).all(-1)
    assert torch.equal(changed, (again != latents).any(-1))
    assert changed.sum(1).tolist() == [round(np.random.default_rng(1).uniform(*SHARES) * GRID**2)] * 3
    assert again.isfinite().all()


def test_what_an_edit_begins_with_is_looked_at_when_its_result_is_drawn_anew(random_model, tokens):
    latents, *pictures = torch.randn(3, 2, GRID**2, 16, generator=generator(3, 0))
    begun_with = [Wanted("edit", ["make it blue"] * 2, latents, sources) for sources in pictures]
    one, other = (
        redrawn(random_model, tokens, wanted, np.random.default_rng(1), generator(1, 1)) for wanted in begun_with
    )
    assert not torch.equal(one, other)


def test_many_pictures_are_drawn_in_parts():
    latents = torch.arange(2.0 * AT_ONCE + 1)[:, None, None]
    wanted = Wanted("edit", [str(i) for i in range(len(latents))], latents, -latents)
    parts = list(wanted.parts())
    assert [len(part.words) for part in parts] == [AT_ONCE, AT_ONCE, 1]
    assert [word for part in parts for word in part.words] == list(wanted.words)
    assert torch.equal(torch.cat([part.latents for part in parts]), latents)
    assert all(torch.equal(part.sources, -part.latents) for part in parts)


def test_a_small_object_weighs_as_much_as_a_large_one():
    small, large = (
        Figure("circle", "red", x, 64.0, np.mean(SIZES[size])) for x, size in ((32, "small"), (96, "large"))
    )
    scene = Scene((small, large), "white")
    levels, weights = weighed(scene)
    assert np.array_equal(levels, paint(scene))
    sums = [half[half > 1].sum() for half in np.split(weights, 2, axis=1)]
    assert sums[0] == pytest.approx(sums[1], rel=0.2)
    assert weights[0, 0] == 1.0


def test_the_decoder_learns_from_what_the_model_draws_and_nothing_else_changes(
    random_model, vae, tokens, tmp_path, monkeypatch
):
    plan = DecoderPlan(steps=12, batch=2, rate=2e-3, matrix_rate=0.02, shard=Sizes(scenes=2, edits=2), shards=1)
    losses = []
    monkeypatch.setattr(Run, "advance", recording(Run.advance, losses))
    before = {name: tensor.clone() for name, tensor in random_model.state_dict().items()}
    kept = []
    for _ in range(2):  # the second finds what the first has drawn
        model = copy.deepcopy(random_model)
        weights, run, done = train_decoder(model, vae, tokens, plan, None, tmp_path, 1.0)
        kept.append(weights)
        assert done and run.step == plan.steps
    assert losses[11] < 0.9 * losses[0]
    assert all(torch.equal(kept[0][name], kept[1][name]) for name in before)
    assert all(torch.equal(before[name], kept[0][name]) for name in before if not name.startswith("vae_decoder."))
    assert not torch.equal(before["vae_decoder.conv_out.weight"], kept[0]["vae_decoder.conv_out.weight"])


def test_muon_moves_alike_matrices_together_as_if_alone():
    noise = generator(4, 4)
    matrices = torch.randn(3, 24, 16, generator=noise)
    alone = torch.stack([orthogonal(matrix) for matrix in matrices])
    torch.testing.assert_close(orthogonal(matrices), alone, rtol=0.02, atol=0.02)
    shapes = {"matrix": (24, 16), "convolution": (24, 4, 2, 2), "vector": (8,)}
    weights = {name: torch.nn.Parameter(torch.zeros(shape)) for name, shape in shapes.items()}
    optimiser = Optimiser(weights, rate=0.1, matrix_rate=1.0, weight_decay=0.0)
    for weight in weights.values():
        weight.grad = torch.randn(weight.shape, generator=noise)
    optimiser.step(1.0)
    for weight in (weights["matrix"], weights["convolution"]):
        expected = -orthogonal(weight.grad.flatten(1)).view(weight.shape) * (24 / 16) ** 0.5
        torch.testing.assert_close(weight.detach(), expected, rtol=0.02, atol=0.02)
    assert weights["vector"].detach().abs().allclose(torch.tensor(0.1), rtol=1e-3), "AdamW's"


@pytest.mark.parametrize("shape", [(24, 64), (64, 24)])
def test_muon_moves_evenly_in_all_directions_of_a_gradient(shape):
    gradient = torch.randn(shape, generator=generator(3, 3)) @ torch.diag(torch.logspace(0, -1, shape[1]))
    left, values, right = torch.linalg.svd(orthogonal(gradient), full_matrices=False)
    assert values.min() > 0.5 and values.max() < 1.3
    turned, _, back = torch.linalg.svd(gradient, full_matrices=False)
    assert torch.einsum("ij,ij->", left @ right, turned @ back) > 0.99 * min(shape)


def test_the_minutes_end_a_sitting(tmp_path):
    weight = torch.nn.Parameter(torch.ones(2))
    run = Run({"w": weight}, Plan(100, 0.1, 0.1, 1, 0.5, 0.9, 0.0), tmp_path / "state.safetensors")
    assert not sit(run, lambda step: {"loss": weight.square().sum()}, minutes=0.0)
    assert run.step == 0


def test_the_rate_rises_stays_and_falls_to_nearly_nothing():
    plan = Plan(steps=100, rate=1.0, matrix_rate=1.0, warmup=10, decay=0.2, average=0.9, weight_decay=0.0)
    assert plan.share_at(0) == 0.1
    assert plan.share_at(9) == plan.share_at(79) == 1.0
    assert plan.share_at(99) == pytest.approx(0.05)


def test_an_exported_folder_loads_and_does_all_three_tasks(config, random_model, tmp_path):
    for _ in range(2):  # the second replaces the first
        export(tmp_path / "pocket", config, random_model.state_dict(), {"step": 0})
    with Engine.from_pretrained(tmp_path / "pocket", device="cpu") as engine:
        image = engine.generate("a red circle", seed=1).images[0]
        assert image.size == (128, 128)
        assert engine.edit(image, "make it blue", seed=1).images[0].size == (128, 128)
        assert isinstance(engine.ask(image, "what is in the picture?", max_new_tokens=4).text, str)
