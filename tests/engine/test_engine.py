"""The engine's promises to a library user, on a random-weight model: seeds, masks, streams, locks, cancelling."""

import json
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from unipic_run import Answer, CancelToken, Engine, Event
from unipic_run.engine.errors import (
    BudgetError,
    Cancelled,
    CorruptWeightsError,
    UnipicWarning,
    UnsupportedDeviceError,
    UsageError,
)
from unipic_run.engine.kv_cache import Prompts
from unipic_run.engine.noise import PhiloxNoise
from unipic_run.engine.png_metadata import save_png
from unipic_run.engine.request import as_largest

QUICK = {"res": 64, "steps": 3}
pytestmark = pytest.mark.filterwarnings("ignore::unipic_run.engine.errors.UnipicWarning")


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    noise = np.random.default_rng(0).integers(0, 256, (8, 10, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((90, 70), Image.Resampling.BICUBIC)


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


def psnr(a: Image.Image, b: Image.Image) -> float:
    error = np.square(pixels(a) - pixels(b)).mean()
    return float("inf") if error == 0 else float(10 * np.log10(255**2 / error))


def test_image_i_is_the_single_run_with_seed_plus_i(tiny_engine: Engine) -> None:
    three = tiny_engine.generate("a red fox", n=3, seed=2**64 - 2, **QUICK)
    assert three.seeds == (2**64 - 2, 2**64 - 1, 0)
    for seed, image in zip(three.seeds, three.images, strict=True):
        alone = tiny_engine.generate(["a red fox"], seed=seed, **QUICK).images[0]
        assert alone.tobytes() == image.tobytes()
    assert three.images[0].tobytes() != three.images[1].tobytes()


def test_a_seed_that_made_nothing_is_not_recorded(tiny_engine: Engine) -> None:
    events: list[Event] = []
    seeded = tiny_engine.generate("a red fox", seed=7, **QUICK)
    for seed in ({}, {"seed": 1}):
        given = tiny_engine.generate("a red fox", noise=[PhiloxNoise(7)], on_event=events.append, **seed, **QUICK)
        assert given.images[0].tobytes() == seeded.images[0].tobytes()
        assert given.seeds == () and {**given.settings[0], "seed": 7} == seeded.settings[0]
    assert not any("seed" in settings for event in events for settings in event.settings)


def test_a_prompt_does_not_depend_on_its_neighbours(tiny_engine: Engine) -> None:
    together = tiny_engine.generate(["a cat", "a much longer prompt about dogs"], seed=5, n=2, **QUICK)
    assert together.seeds == (5, 6, 5, 6)
    alone = tiny_engine.generate("a much longer prompt about dogs", seed=5, n=2, **QUICK)
    assert [i.tobytes() for i in together.images[2:]] == [i.tobytes() for i in alone.images]


def test_batches_agree_with_single_images(tiny_engine: Engine) -> None:
    prompts = ["a cat", "a much longer prompt about dogs", "three birds"]
    singles = tiny_engine.generate(prompts, seed=5, batch_size=1, **QUICK)
    batch = tiny_engine.generate(prompts, seed=5, batch_size=3, **QUICK)
    assert all(psnr(a, b) >= 40 for a, b in zip(singles.images, batch.images, strict=True))


def test_options_change_the_picture(tiny_engine: Engine) -> None:
    def picture(**options: object) -> bytes:
        return tiny_engine.generate("a cat", seed=1, **{**QUICK, **options}).images[0].tobytes()

    variants = [{}, {"guidance": 1.0}, {"cfg_schedule": "linear"}, {"temperature": 0.5}, {"negative": "blur"}]
    variants += [{"order": "gtr"}, {"head_steps": (4, 2)}, {"cfg_interval": (0.0, 0.5)}, {"steps": 5}]
    variants += [{"solver": "ddim"}, {"solver": "dpm2"}, {"cfg_cache": 9.0}]
    assert len({picture(**options) for options in variants}) == len(variants)


def test_sizes_that_are_not_square(tiny_engine: Engine) -> None:
    result = tiny_engine.generate("a cat", size=(96, 48), steps=2, seed=1)
    assert result.images[0].size == (96, 48) and result.settings[0]["size"] == "96x48"
    assert set(result.timings) == {"condition", "sample", "decode"} and result.attention == "sdpa"


def test_more_rounds_than_tokens(tiny_engine: Engine) -> None:
    assert tiny_engine.generate("a cat", size=(16, 32), steps=50, seed=1).images[0].size == (16, 32)


def test_events_count_rounds_and_show_previews(tiny_engine: Engine) -> None:
    events: list[Event] = []
    tiny_engine.generate("a cat", n=2, seed=1, res=64, steps=4, preview_every=2, on_event=events.append)
    rounds = [(e.done, e.round, len(e.previews)) for e in events if e.stage == "sample"]
    assert rounds == [(i, r, int(r == 2)) for i in range(2) for r in (1, 2, 3, 4)]
    assert next(e.previews[0].size for e in events if e.previews) == (64, 64)


def test_previews_do_not_change_the_result(tiny_engine: Engine) -> None:
    plain = tiny_engine.generate("a cat", seed=1, **QUICK).images[0]
    watched = tiny_engine.generate("a cat", seed=1, preview_every=1, **QUICK).images[0]
    assert plain.tobytes() == watched.tobytes()


def test_only_the_last_stage_before_sampling_is_an_event(tiny_engine: Engine, photo: Image.Image) -> None:
    events: list[Event] = []
    edited = tiny_engine.edit(photo, "make it night", res=64, steps=2, on_event=events.append)
    assert [event.stage for event in events] == ["condition", "sample", "sample", "decode"]
    assert set(edited.timings) == {"look", "condition", "sample", "decode"}


def test_masked_edit_keeps_size_and_unmasked_pixels(tiny_engine: Engine, photo: Image.Image) -> None:
    mask = Image.new("L", photo.size)
    mask.paste(255, (20, 10, 41, 35))
    image = tiny_engine.edit(photo, "a hat", mask=mask, steps=3, seed=1).images[0]
    kept = np.asarray(mask) == 0
    assert image.size == photo.size
    assert (pixels(image)[kept] == pixels(photo)[kept]).all()
    assert (pixels(image)[~kept] != pixels(photo)[~kept]).any()


def test_masked_edit_sees_the_surroundings(tiny_engine: Engine, photo: Image.Image) -> None:
    """The hole's new content depends on the visible cells around it."""
    mask = Image.new("L", photo.size)
    mask.paste(255, (32, 16, 48, 32))
    hole = (32, 16, 48, 32)
    one = tiny_engine.edit(photo, "a hat", mask=mask, steps=3, seed=1).images[0].crop(hole)
    other = tiny_engine.edit(photo.rotate(180), "a hat", mask=mask, steps=3, seed=1).images[0].crop(hole)
    assert one.tobytes() != other.tobytes()


def test_outpainting_adds_pixels_around_the_picture(tiny_engine: Engine, photo: Image.Image) -> None:
    image = tiny_engine.edit(photo, "wider", outpaint=(20, 0, 33, 5), steps=3, seed=1).images[0]
    assert image.size == (90 + 53, 70 + 5)
    assert image.crop((20, 0, 110, 70)).tobytes() == photo.tobytes()


def test_a_picture_too_large_to_fill_is_refused_unless_fitted(tiny_engine: Engine) -> None:
    big = Image.new("RGB", (4096, 2560))
    mask = Image.new("L", big.size, 255)
    with pytest.raises(UsageError, match=r"4096x2560, 40960 tokens of at most .*fit keep"):
        tiny_engine.edit(big, "x", mask=mask, steps=1)
    assert tiny_engine.edit(big, "x", mask=mask, fit="keep", res=64, steps=1).images[0].size == (80, 48)


@pytest.mark.parametrize(("fit", "size"), [(None, (80, 64)), ("keep", (80, 64)), ("crop", (64, 64))])
def test_edit_sizes(tiny_engine: Engine, photo: Image.Image, fit: str | None, size: tuple[int, int]) -> None:
    assert tiny_engine.edit(photo, "make it night", fit=fit, res=64, steps=2).images[0].size == size


def test_several_instructions_read_the_picture_once(tiny_engine: Engine, photo: Image.Image) -> None:
    looks = []
    hook = tiny_engine.loaded.model.vae_encoder.register_forward_hook(lambda *_: looks.append(1))
    both = tiny_engine.edit(photo, ["make it night", "add snow"], res=64, steps=2, seed=1)
    hook.remove()
    alone = tiny_engine.edit(photo, "add snow", res=64, steps=2, seed=1)
    assert len(looks) == 1 and both.images[1].tobytes() == alone.images[0].tobytes()


def test_autocast_of_the_caller_changes_nothing(tiny_engine: Engine, photo: Image.Image) -> None:
    image, answer = tiny_engine.generate("a", seed=1, steps=2, res=128).images[0], tiny_engine.ask(photo, "what?")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert np.array_equal(tiny_engine.generate("a", seed=1, steps=2, res=128).images[0], image)
        for piece in (stream := tiny_engine.ask(photo, "what?", stream=True)):
            assert piece and torch.is_autocast_enabled("cpu"), "the caller's own"
        assert list(stream) == [] and tiny_engine.ask(photo, "what?").ids == answer.ids


@pytest.mark.parametrize(
    "call",
    [
        lambda engine, photo: engine.generate("a", on_event=3),
        lambda engine, photo: engine.generate("a", noise=[3]),
        lambda engine, photo: engine.generate("a", noise=3),
        lambda engine, photo: engine.generate(b"ab"),
        lambda engine, photo: engine.ask(photo, "what?", on_answer=3),
        lambda engine, photo: as_largest(3),
        lambda engine, photo: save_png(3, "a.png"),
    ],
)
def test_things_of_the_wrong_kind_are_refused_before_the_work(tiny_engine: Engine, photo: Image.Image, call) -> None:
    with pytest.raises(UsageError):
        call(tiny_engine, photo)


def test_streamed_answer_is_the_answer(tiny_engine: Engine, photo: Image.Image) -> None:
    answer = tiny_engine.ask(photo, "what is this?", res=64, max_new_tokens=12)
    pieces = list(tiny_engine.ask(photo, "what is this?", res=64, max_new_tokens=12, stream=True))
    assert len(answer.ids) <= 12 and len(pieces) > 3
    assert "".join(pieces) == answer.text, "with the bytes that never became a character"


def test_an_answer_tells_whether_the_limit_ended_it(tiny_engine: Engine, photo: Image.Image, monkeypatch) -> None:
    ask = partial(tiny_engine.ask, photo, "what is this?", res=64)
    with pytest.warns(UnipicWarning, match="cut at 5 tokens: raise"):
        limited = ask(max_new_tokens=5)
    assert limited.cut and len(limited.ids) == 5
    with pytest.warns(UnipicWarning, match="'what is this\\?' was cut at 5 tokens"):
        list(ask(max_new_tokens=5, stream=True))
    # The tiny model's weights are random: it is made to end where it would say its fourth token.
    ended = limited.ids.index(limited.ids[3])
    config = replace(tiny_engine.loaded.model.config, eos_token=limited.ids[3])
    monkeypatch.setattr(tiny_engine.loaded.model, "config", config)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UnipicWarning)
        whole = ask(max_new_tokens=5)
    assert not whole.cut and whole.ids == limited.ids[:ended]


def test_questions_about_one_picture_do_not_influence_each_other(tiny_engine: Engine, photo: Image.Image) -> None:
    options = {"res": 64, "max_new_tokens": 8}
    both = tiny_engine.ask(photo, ["what is this?", "how many colours are there?"], **options)
    assert both[1].ids == tiny_engine.ask(photo, "how many colours are there?", **options).ids


def test_sampled_answers_follow_their_seed(tiny_engine: Engine, photo: Image.Image) -> None:
    options = {"res": 64, "max_new_tokens": 8, "temperature": 1.0, "top_p": 0.9}
    first, again, other = (tiny_engine.ask(photo, "what?", seed=seed, **options).ids for seed in (1, 1, 2))
    assert first == again != other


def test_cancel_stops_within_a_round_and_leaves_the_engine_usable(tiny_engine: Engine) -> None:
    token, rounds = CancelToken(), []

    def stop(event: Event) -> None:
        rounds.append(event.round)
        if event.round == 2:
            token.cancel()

    before = tiny_engine.generate("a cat", seed=1, **QUICK).images[0]
    with pytest.raises(Cancelled):
        tiny_engine.generate("a cat", res=64, steps=9, on_event=stop, cancel=token)
    assert max(rounds) == 2
    assert tiny_engine.generate("a cat", seed=1, **QUICK).images[0].tobytes() == before.tobytes()


def test_cancel_stops_an_answer(tiny_engine: Engine, photo: Image.Image) -> None:
    token = CancelToken()
    with pytest.raises(Cancelled):
        for _ in tiny_engine.ask(photo, "what?", res=64, stream=True, cancel=token):
            token.cancel()


def test_an_error_in_a_callback_leaves_the_engine_usable(tiny_engine: Engine) -> None:
    def broken(event: Event) -> None:
        raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        tiny_engine.generate("a cat", on_event=broken, **QUICK)
    assert tiny_engine.generate("a cat", **QUICK).images


@pytest.mark.parametrize("stage", ["condition", "sample", "decode"])
@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (RuntimeError, "CUDA out of memory in MY model"),
        (MemoryError, "mine"),
        (BudgetError, "of another engine"),
        (StopIteration, "of an iterator"),
    ],
)
def test_what_a_callback_raises_comes_out_as_it_is_and_at_once(
    tiny_engine: Engine, kind: type[Exception], text: str, stage: str
) -> None:
    failure, heard = kind(text), []

    def broken(event: Event) -> None:
        heard.append(event.stage)
        if event.stage == stage:
            raise failure

    with pytest.raises(kind) as caught:
        tiny_engine.generate("a cat", n=2, batch_size=2, preview_every=1, on_event=broken, **QUICK)
    assert caught.value is failure and failure.__context__ is failure.__cause__ is None
    assert caught.traceback[-1].name == "broken"
    assert heard[-1] == stage and heard.count("condition") == heard.count(stage) == 1, "nothing is made again"


@pytest.mark.parametrize("kind", [RuntimeError, MemoryError, BudgetError])
def test_what_hears_an_answer_may_fail_like_that_too(tiny_engine: Engine, kind: type[Exception]) -> None:
    failure = kind("out of memory")

    def broken(answer: Answer) -> None:
        raise failure

    with pytest.raises(kind) as caught:
        tiny_engine.ask(Image.new("RGB", (64, 64)), ["what?", "where?"], res=64, max_new_tokens=1, on_answer=broken)
    assert caught.value is failure and tiny_engine.generate("a cat", **QUICK).images


@pytest.mark.parametrize(
    "call",
    [
        lambda e: e.generate("a cat <image>"),
        lambda e: e.generate("a cat", res=64, size=(64, 64)),
        lambda e: e.generate("a cat", noise=[]),
        lambda e: e.generate("a cat", negative="<image>"),
        lambda e: e.generate("a " * 50_000, res=64),
        lambda e: e.generate("a cat", size=(4096, 4096)),
        lambda e: e.ask(Image.new("RGB", (9, 9)), "what?", res=64, max_new_tokens=99_999),
        lambda e: e.ask(Image.new("RGB", (9, 9)), ["a", "b"], stream=True),
        lambda e: e.ask(Image.new("RGB", (9, 9)), []),
        lambda e: e.ask(Image.new("RGB", (9, 9)), None),
        lambda e: e.generate("a cat", size="64x64"),
        lambda e: e.generate("a cat", size=64),
        lambda e: e.generate("a cat", size=np.array([64, 64, 64])),
        lambda e: e.generate("a cat", cancel="x"),
        lambda e: e.ask(Image.new("RGB", (9, 9)), "what?", cancel="x"),
        lambda e: e.edit(Image.new("RGB", (9, 9)), "x", references=5),
        lambda e: type(e).from_pretrained(None),
        lambda e: e.generate("a cat", size=(64,)),
        lambda e: e.generate(5),
        lambda e: e.generate("a \ud800 cat"),
        lambda e: e.edit(Image.new("RGB", (9, 9)), "x", outpaint=5),
        lambda e: e.edit(Image.new("RGB", (50, 40)), "x", res=16384),
        lambda e: e.edit(Image.new("RGB", (50, 40)), "x", outpaint=(9, 0, 0, 0), res=64),
        lambda e: e.edit(Image.new("RGB", (9, 9)), "x", fit="stretch"),
        lambda e: e.edit(Image.new("RGB", (9, 9)), "x", posterior="median"),
        lambda e: e.edit(Image.new("RGB", (9, 9)), "x", posterior="sample"),
    ],
)
def test_bad_calls_are_usage_errors(tiny_engine: Engine, call: Callable[[Engine], object]) -> None:
    with pytest.raises(UsageError):
        call(tiny_engine)


def test_sizes_off_the_trained_one_are_noted(tiny_engine: Engine) -> None:
    with pytest.warns(UnipicWarning, match="64x64 is far from the 128x128"):
        tiny_engine.generate("a cat", **QUICK)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tiny_engine.generate("a cat", steps=1)


def test_numpy_numbers_are_welcome(tiny_engine: Engine, photo: Image.Image) -> None:
    made = tiny_engine.generate("a cat", seed=np.int64(3), size=np.array([64, 32]), guidance=np.float32(2), steps=1)
    assert made.seeds == (3,) and made.images[0].size == (64, 32) and made.settings[0]["guidance"] == 2.0
    wide = tiny_engine.edit(photo, "wider", outpaint=np.array([20, 0, 33, 5]), steps=1)
    assert wide.images[0].size == (90 + 53, 70 + 5)
    how = {"res": np.int64(64), "max_new_tokens": np.int32(2), "temperature": np.float32(0.5), "seed": np.uint64(9)}
    answer = tiny_engine.ask(photo, "what?", **how)
    for settings in (made.settings[0], wide.settings[0], answer.settings):
        assert json.loads(json.dumps(settings))


def test_an_edit_of_one_picture_may_say_so(tiny_engine: Engine, photo: Image.Image) -> None:
    one, same = (tiny_engine.edit(photo, "x", references=r, res=64, steps=1, seed=1).images[0] for r in (None, ()))
    assert one.tobytes() == same.tobytes()


def test_a_negative_prompt_without_guidance_is_noted(tiny_engine: Engine) -> None:
    with pytest.warns(UnipicWarning, match="steers nothing at guidance 1"):
        tiny_engine.generate("a cat", negative="blur", guidance=1.0, **QUICK)


def test_only_instructions_are_stripped(tiny_engine: Engine, photo: Image.Image) -> None:
    ask = [tiny_engine.ask(photo, text, res=64, max_new_tokens=6).ids for text in ("what?", "what?   ")]
    edits = [tiny_engine.edit(photo, text, res=64, steps=2, seed=1).images[0] for text in ("night", " night  ")]
    assert ask[0] != ask[1] and edits[0].tobytes() == edits[1].tobytes()


def test_values_that_are_not_numbers_are_an_error_not_a_black_picture(tiny_engine: Engine) -> None:
    bias = tiny_engine.loaded.model.vae_decoder.conv_out.bias
    before = bias.clone()
    bias.fill_(float("nan"))
    try:
        with pytest.raises(UnsupportedDeviceError, match="not numbers in fp32"):
            tiny_engine.generate("a cat", **QUICK)
    finally:
        bias.copy_(before)


def test_exact_rotary_frequencies_are_an_option(
    tiny_release: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UNIPIC_RUN_CACHE", str(tmp_path))
    ids = []
    for exact in (False, True):
        with Engine.from_pretrained(tiny_release, device="cpu", dtype=torch.bfloat16, exact_rope=exact) as engine:
            assert engine.loaded.model.llm.round_inv_freq is not exact
            ids.append(engine.generate("a cat", seed=1, **QUICK).images[0].tobytes())
    assert ids[0] != ids[1]


def test_pictures_do_not_tell_where_the_model_lies(tiny_engine: Engine, tiny_release: Path) -> None:
    model = tiny_engine.generate("a cat", **QUICK).settings[0]["model"]
    assert "/" not in model and tiny_release.name in model


def test_closed_engine_says_so(tiny_release: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNIPIC_RUN_CACHE", str(tmp_path))
    with Engine.from_pretrained(tiny_release, device="cpu", dtype="bf16") as engine:
        assert engine.dtype == torch.bfloat16
        assert engine.generate("a cat", **QUICK).images[0].size == (64, 64)
    with pytest.raises(UsageError, match="closed"):
        engine.generate("a cat")


@pytest.mark.parametrize("options", [{"device": "tpu"}, {"device": "cuda:99"}, {"attention": "xformers"}])
def test_unsupported_places(tiny_release: Path, options: dict[str, str]) -> None:
    with pytest.raises(UnsupportedDeviceError):
        Engine.from_pretrained(tiny_release, **{"device": "cpu", **options})


def test_a_tokenizer_of_another_model_is_refused(
    tiny_release: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from unipic_run.engine.tokens import Tokens

    path = tiny_release / "Qwen2.5-1.5B-Instruct" / "tokenizer.json"
    with pytest.raises(CorruptWeightsError, match="the model expects 7"):
        Tokens(path, "<image>", 7)
    with pytest.raises(CorruptWeightsError, match="cannot read"):
        Tokens(tmp_path / "none.json", "<image>", 7)


def test_modules_are_trainable(tiny_engine: Engine) -> None:
    """A small model can be trained on the engine's own modules: gradients reach every part of the sampling path."""
    model = tiny_engine.loaded.model
    names = ("mar_encoder", "mar_decoder", "head", "llm", "proj_in", "proj_out")
    parts = [getattr(model, name).requires_grad_(True) for name in names]
    try:
        visible, hidden = torch.tensor([[0, 3]]), torch.tensor([[1, 2]])
        x = model.mar_encoder(torch.randn(1, 4, 16), visible, model.mar_encoder.positions(2, 2))
        read = model.llm(model.proj_in(x), Prompts.of([(empty_cache(model), 1)]))
        x = x + model.proj_out(read)
        z = model.mar_decoder(x, visible, hidden, model.mar_decoder.base(None), *model.mar_decoder.positions(2, 2))
        out = model.head(torch.randn(2, 16), model.head.embed_steps([]).new_zeros(64), model.head.cond_embed(z[0]))
        out.square().sum().backward()
        without = {name for part in parts for name, p in part.named_parameters() if p.grad is None}
        assert all(name.startswith("time_embed") for name in without), without
    finally:
        for part in parts:
            part.requires_grad_(False).zero_grad()


def empty_cache(model: torch.nn.Module) -> object:
    from unipic_run.engine.models.unipic.model import new_cache

    return new_cache(model, 0, model.embed.weight)
