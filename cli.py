"""The `unipic-run` command: parse, make one call, print. Torch is imported only by what needs it.

Data goes to stdout (a path per picture, text, or with --json one object), all else to stderr. Exit codes: 0 ok,
2 usage, 3 out of memory, 4 model missing, 5 corrupt weights, 6 unsupported device, 130 cancelled, 1 anything else.
"""

import os
import sys
from collections.abc import Sequence
from functools import partial
from typing import Annotated

import typer
from unipic_run import __version__
from unipic_run.engine import arguments as a
from unipic_run.engine import options as o
from unipic_run.engine.checks import PATCH
from unipic_run.engine.commands import convert, doctor, info, list_models, plan, pull, verify
from unipic_run.engine.errors import UsageError
from unipic_run.engine.outcome import Answer
from unipic_run.engine.request import AskRequest, EditRequest, GenerateRequest, check_res
from unipic_run.engine.saving import Order, make_pictures, open_engine
from unipic_run.engine.terminal import Terminal, terminal_of

app = typer.Typer(
    help="Generate, edit and understand pictures with one set of weights.",
    epilog="Pictures carry their settings: `unipic-run info a.png` shows them, `unipic-run gen --from a.png` repeats.",
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(invoke_without_command=True)
def unipic_run(
    ctx: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Show the version.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks and all warnings; works anywhere.")] = False,
) -> None:
    if version:
        print(f"unipic-run {__version__}")
        raise typer.Exit
    if ctx.invoked_subcommand is None:
        typer.echo(ctx.get_help())
        raise typer.Exit(2)


@app.command()
def gen(
    ctx: typer.Context,
    prompt: o.Prompt = None,
    prompt_file: o.PromptFile = None,
    from_png: o.From = None,
    size: o.Size = None,
    res: o.Res = None,
    n: o.N = 1,
    seed: o.Seed = None,
    steps: o.Steps = None,
    guidance: o.Guidance = None,
    cfg_schedule: o.Schedule = None,
    temperature: o.Temperature = None,
    negative: o.Negative = None,
    speed: o.Speed = None,
    head_steps: o.HeadSteps = None,
    order: o.Reveal = None,
    cfg_interval: o.Interval = None,
    solver: o.Solver = None,
    cfg_cache: o.Cache = None,
    block_cache: o.BlockCache = None,
    batch_size: o.Batch = None,
    model: o.Model = None,
    device: o.Device = "auto",
    dtype: o.Dtype = None,
    quant: o.Quant = None,
    attn: o.Attn = None,
    vram: o.Vram = None,
    drop_idle: o.DropIdle = False,
    exact_rope: o.ExactRope = None,
    revision: o.Revision = None,
    offline: o.Offline = False,
    output: o.Output = None,
    overwrite: o.Overwrite = False,
    preview_every: o.Preview = 0,
    no_metadata: o.NoMetadata = False,
    as_json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Paint pictures from text; prints the path of each."""
    terminal = terminal_of(ctx, as_json, quiet)
    old = a.repeated_settings(from_png, model, speed) if from_png else {}
    new = a.given(seed=seed, steps=steps, guidance=guidance, cfg_schedule=cfg_schedule, temperature=temperature)
    new |= a.shortcuts(speed, head_steps, order, cfg_interval, cfg_cache, solver, block_cache)
    new |= a.given(negative=negative, model=model, dtype=dtype, quant=quant, exact_rope=exact_rope, attention=attn)
    asked = old | new
    prompts = a.read_prompts(prompt, prompt_file, instead=old.get("prompt"))
    shape = a.wanted_size(res, size) or old.get("size")
    sampling = a.sampling(asked, n=n, batch_size=batch_size, preview_every=preview_every)
    request = GenerateRequest(tuple(prompts), shape or (PATCH, PATCH), sampling)  # refuses before a model is loaded
    _hint(terminal, asked.get("model"), prompts)
    _say_drawn(terminal, asked.get("seed"), sampling.seed, lost=no_metadata)
    pictures = Order("generate", tuple(prompts), sampling, a.given(size=shape and f"{shape[0]}x{shape[1]}"))
    saving = {"target": output, "overwrite": overwrite, "metadata": not no_metadata}
    loading = a.loading(asked, device=device, revision=revision, offline=offline)
    loading |= {"vram": vram, "drop_idle": drop_idle, "largest": a.largest("gen", len(prompts), sampling, shape)}
    make_pictures(terminal, pictures, request, saving, loading, size=shape)


@app.command()
def edit(
    ctx: typer.Context,
    image: o.Image,
    prompt: o.Prompt = None,
    prompt_file: o.PromptFile = None,
    mask: o.Mask = None,
    outpaint: o.Outpaint = None,
    ref: o.Ref = None,
    fit: o.Fit = None,
    posterior: o.Posterior = None,
    size: o.EditSize = None,
    res: o.Res = None,
    n: o.N = 1,
    seed: o.Seed = None,
    steps: o.Steps = None,
    guidance: o.Guidance = None,
    cfg_schedule: o.Schedule = None,
    temperature: o.Temperature = None,
    negative: o.Negative = None,
    speed: o.Speed = None,
    head_steps: o.HeadSteps = None,
    order: o.Reveal = None,
    cfg_interval: o.Interval = None,
    solver: o.Solver = None,
    cfg_cache: o.Cache = None,
    block_cache: o.BlockCache = None,
    batch_size: o.Batch = None,
    model: o.Model = None,
    device: o.Device = "auto",
    dtype: o.Dtype = None,
    quant: o.Quant = None,
    attn: o.Attn = None,
    vram: o.Vram = None,
    drop_idle: o.DropIdle = False,
    exact_rope: o.ExactRope = None,
    revision: o.Revision = None,
    offline: o.Offline = False,
    output: o.Output = None,
    overwrite: o.Overwrite = False,
    preview_every: o.Preview = 0,
    no_metadata: o.NoMetadata = False,
    as_json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Change a picture by instruction, or repaint where a mask is white; prints the path of each result."""
    from unipic_run.engine.picture import open_mask

    terminal = terminal_of(ctx, as_json, quiet)
    asked = a.given(seed=seed, steps=steps, guidance=guidance, cfg_schedule=cfg_schedule, temperature=temperature)
    asked |= a.shortcuts(speed, head_steps, order, cfg_interval, cfg_cache, solver, block_cache)
    asked |= a.given(negative=negative, model=model, dtype=dtype, quant=quant, exact_rope=exact_rope, attention=attn)
    a.check_stdin(image, prompt, prompt_file, *(ref or ()))
    picture, prompts = a.read_picture(image), a.read_prompts(prompt, prompt_file)
    where = a.given(
        mask=None if mask is None else open_mask(mask, picture.size),
        outpaint=None if outpaint is None else a.parse_outpaint(outpaint),
        fit=fit,
        posterior=posterior,
        references=tuple(map(a.read_picture, ref)) if ref else None,
        size=None if size is None else a.parse_size(size),
    )
    sampling = a.sampling(asked, n=n, batch_size=batch_size, preview_every=preview_every)
    request = EditRequest(picture, tuple(prompts), sampling, PATCH if res is None else res, **where)  # refuses early
    check_res(res, fit, request.masked)
    _hint(terminal, model, prompts)
    _say_drawn(terminal, seed, sampling.seed, lost=no_metadata)
    kind = "inpaint" if request.masked else "edit"
    known = a.given(fit=fit, posterior=posterior, masked="mask" in where or None, references=ref and len(ref))
    pictures = Order(kind, tuple(prompts), sampling, known)
    saving = {"target": output, "overwrite": overwrite, "metadata": not no_metadata}
    loading = a.loading(asked, device=device, revision=revision, offline=offline)
    made = where.get("size") or a.edited_size(picture.size, res, fit, where.get("outpaint"), "mask" in where)
    largest = a.largest("edit", len(prompts), sampling, made, 1 + len(request.references))
    loading |= {"vram": vram, "drop_idle": drop_idle, "largest": largest}
    make_pictures(terminal, pictures, request, saving, loading, image=picture, res=res, **where)


@app.command()
def ask(
    ctx: typer.Context,
    image: o.Image,
    question: o.Question,
    res: o.Res = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", metavar="N", help="Longest answer.")] = 1024,
    temperature: Annotated[float, typer.Option("--temperature", metavar="X", help="0 takes the likeliest word.")] = 0.0,
    top_p: Annotated[float, typer.Option("--top-p", metavar="P", help="Share of likely words to draw from.")] = 1.0,
    seed: o.Seed = None,
    model: o.Model = None,
    device: o.Device = "auto",
    dtype: o.Dtype = None,
    quant: o.Quant = None,
    attn: o.Attn = None,
    vram: o.Vram = None,
    drop_idle: o.DropIdle = False,
    exact_rope: o.ExactRope = None,
    revision: o.Revision = None,
    offline: o.Offline = False,
    as_json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Answer questions about a picture; a single answer is printed word by word as it comes."""
    terminal = terminal_of(ctx, as_json, quiet)
    a.check_stdin(image, *question)
    picture, questions = a.read_picture(image), a.read_prompts(question)
    drawn = a.sampling(a.given(seed=seed)).seed
    how = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p, "seed": drawn}
    for text in questions:
        AskRequest(text, PATCH if res is None else res, **how)  # refuses before a model is loaded
    _hint(terminal, model, questions)
    _say_drawn(terminal, seed, drawn, lost=temperature > 0)
    asked = a.given(model=model, dtype=dtype, quant=quant, exact_rope=exact_rope, attention=attn)
    loading = a.loading(asked, device=device, revision=revision, offline=offline)
    loading |= {"vram": vram, "drop_idle": drop_idle, "largest": a.largest("ask", size=res and (res, res))}
    with open_engine(terminal, loading) as engine:
        if len(questions) == 1 and not as_json:
            terminal.stream(engine.ask(picture, questions[0], res=res, stream=True, **how))
            return
        engine.ask(picture, questions, res=res, on_answer=partial(_tell, terminal), **how)


app.command()(plan)
app.command()(pull)
app.command()(convert)
app.command()(verify)
app.command("list")(list_models)
app.command()(info)
app.command()(doctor)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    if "_UNIPIC_RUN_COMPLETE" in os.environ:
        app(prog_name="unipic-run")  # a shell asks how a word goes on
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    end = arguments.index("--") if "--" in arguments else len(arguments)
    options, rest = arguments[:end], arguments[end:]
    with Terminal(json="--json" in options, debug="--debug" in options) as terminal:
        return terminal.run(lambda: _call([word for word in options if word != "--debug"] + rest, terminal))


def _call(arguments: list[str], terminal: Terminal) -> int:
    """Parse and carry out; what the parser refuses becomes a UsageError."""
    a.check_not_empty(arguments)
    command = typer.main.get_command(app)
    try:
        with command.make_context("unipic-run", arguments, obj=terminal) as context:
            command.invoke(context)
    except typer.Exit as end:
        return end.exit_code
    except SystemExit:  # rich's way, when whoever read the help has gone
        raise BrokenPipeError from None
    except Exception as error:
        if not hasattr(error, "format_message"):  # the parser's errors, whose class depends on the version of typer
            raise
        context = getattr(error, "ctx", None)
        where = context.command_path if context else " ".join(["unipic-run", *arguments[:1]])
        what, given = error.format_message().rstrip("."), a.value_of(getattr(error, "param", None), arguments)
        what += f", not {given[:100]!r}" if given is not None and repr(given) not in what else ""
        raise UsageError(what, f"see {where} --help") from None
    return 0


def _hint(terminal: Terminal, model: str | None, texts: Sequence[str]) -> None:
    """Rather than let a model of few words paint something else in silence."""
    if model == "pocket":
        from unipic_run.pocket.vocabulary import hint

        if said := hint(texts):
            terminal.say(said)


def _tell(terminal: Terminal, answer: Answer) -> None:
    """One of several answers; of seconds in all, those of answers are added up, and each has its own beside it."""
    row = {"question": answer.settings["question"], "text": answer.text, "ids": answer.ids, "cut": answer.cut}
    row |= {"settings": answer.settings, "timings": answer.timings}
    before = terminal.data.get("timings", {"answer": 0.0})
    timings = {name: seconds for name, seconds in answer.timings.items() if name not in ("compile", "capture")}
    timings["answer"] += before["answer"]
    terminal.data |= {"answers": [*terminal.data.get("answers", ()), row], "timings": timings}
    terminal.data |= {"peak_bytes": answer.peak_bytes, "attention": answer.attention}
    terminal.line(answer.text)


def _say_drawn(terminal: Terminal, given: int | None, seed: int, lost: bool) -> None:
    """A drawn seed where neither a picture nor --json tells it."""
    if given is None and lost and not terminal.json:
        terminal.tell(f"seed {seed}")
