"""The `unipic-run` command: parse, make one call, print. Torch is imported only by what needs it.

Data goes to stdout (a path per picture, text, or with --json one object), all else to stderr. Exit codes: 0 ok,
2 usage, 3 out of memory, 4 model missing, 5 corrupt weights, 6 unsupported device, 130 cancelled, 1 anything else.
"""

import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from unipic_run import __version__
from unipic_run.engine import arguments as a
from unipic_run.engine import options as o
from unipic_run.engine.checks import PATCH
from unipic_run.engine.errors import UsageError
from unipic_run.engine.request import AskRequest, EditRequest, GenerateRequest
from unipic_run.engine.saving import Order, make_pictures, open_engine
from unipic_run.engine.terminal import Terminal, gigabytes

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
    attn: o.Attn = "auto",
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
    terminal = _terminal(ctx, as_json, quiet)
    old = a.repeated_settings(from_png, model, speed) if from_png else {}
    new = a.given(seed=seed, steps=steps, guidance=guidance, cfg_schedule=cfg_schedule, temperature=temperature)
    new |= a.shortcuts(speed, head_steps, order, cfg_interval, cfg_cache, solver, block_cache)
    asked = old | new | a.given(negative=negative, model=model, dtype=dtype, quant=quant, exact_rope=exact_rope)
    prompts = a.read_prompts(prompt, prompt_file, instead=old.get("prompt"))
    shape = a.wanted_size(res, size) or old.get("size")
    sampling = a.sampling(asked, n=n, batch_size=batch_size, preview_every=preview_every)
    GenerateRequest(tuple(prompts), shape or (PATCH, PATCH), sampling)  # refuses before a model is loaded
    _hint(terminal, asked.get("model"), prompts)
    pictures = Order("generate", tuple(prompts), sampling, a.given(size=shape and f"{shape[0]}x{shape[1]}"))
    saving = {"target": output, "overwrite": overwrite, "metadata": not no_metadata}
    loading = a.loading(asked, device=device, attention=attn, revision=revision, offline=offline)
    loading |= {"vram": vram, "drop_idle": drop_idle, "largest": a.largest("gen", len(prompts), sampling, shape)}
    make_pictures(terminal, pictures, saving, loading, size=shape)


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
    attn: o.Attn = "auto",
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

    terminal = _terminal(ctx, as_json, quiet)
    asked = a.given(seed=seed, steps=steps, guidance=guidance, cfg_schedule=cfg_schedule, temperature=temperature)
    asked |= a.shortcuts(speed, head_steps, order, cfg_interval, cfg_cache, solver, block_cache)
    asked |= a.given(negative=negative, model=model, dtype=dtype, quant=quant, exact_rope=exact_rope)
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
    EditRequest(picture, tuple(prompts), sampling, PATCH if res is None else res, **where)  # refuses early
    _hint(terminal, model, prompts)
    kind = "inpaint" if {"mask", "outpaint"} & {*where} else "edit"
    pictures = Order(kind, tuple(prompts), sampling, a.given(fit=fit, posterior=posterior))
    saving = {"target": output, "overwrite": overwrite, "metadata": not no_metadata}
    loading = a.loading(asked, device=device, attention=attn, revision=revision, offline=offline)
    made = a.edited_size(picture.size, res, fit, where.get("outpaint"), "mask" in where)
    loading |= {"vram": vram, "drop_idle": drop_idle, "largest": a.largest("edit", len(prompts), sampling, made)}
    make_pictures(terminal, pictures, saving, loading, image=picture, res=res, **where)


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
    attn: o.Attn = "auto",
    vram: o.Vram = None,
    drop_idle: o.DropIdle = False,
    exact_rope: o.ExactRope = None,
    revision: o.Revision = None,
    offline: o.Offline = False,
    as_json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Answer questions about a picture; a single answer is printed word by word as it comes."""
    terminal = _terminal(ctx, as_json, quiet)
    picture, questions = a.read_picture(image), a.read_prompts(question)
    how = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p}
    for text in questions:
        AskRequest(text, PATCH if res is None else res, **how, seed=seed or 0)  # refuses before a model is loaded
    _hint(terminal, model, questions)
    asked = a.given(model=model, dtype=dtype, quant=quant, exact_rope=exact_rope)
    loading = a.loading(asked, device=device, attention=attn, revision=revision, offline=offline)
    loading |= {"vram": vram, "drop_idle": drop_idle, "largest": a.largest("ask", size=res and (res, res))}
    with open_engine(terminal, loading) as engine:
        if len(questions) == 1 and not as_json:
            terminal.stream(engine.ask(picture, questions[0], res=res, seed=seed, stream=True, **how))
            return
        answers = engine.ask(picture, questions, res=res, seed=seed, **how)
    rows = [
        {"question": text, "text": answer.text, "settings": answer.settings}
        for text, answer in zip(questions, answers, strict=True)
    ]
    terminal.data |= {"answers": rows, "timings": answers[-1].timings, "peak_bytes": answers[-1].peak_bytes}
    terminal.data["attention"] = answers[-1].attention
    for row in rows:
        terminal.line(row["text"])


@app.command()
def plan(
    ctx: typer.Context,
    task: Annotated[str, typer.Argument(metavar="TASK", help="gen, edit or ask.", show_default=False)],
    res: o.Res = None,
    steps: o.Steps = None,
    speed: o.Speed = None,
    head_steps: o.HeadSteps = None,
    order: o.Reveal = None,
    cfg_interval: o.Interval = None,
    solver: o.Solver = None,
    cfg_cache: o.Cache = None,
    block_cache: o.PlanBlockCache = None,
    n: o.N = 1,
    model: o.Model = None,
    dtype: o.Dtype = None,
    quant: o.PlanQuant = None,
    attn: o.PlanAttn = "sdpa",
    gpu: Annotated[str, typer.Option("--gpu", metavar="NAME", help="Whose rates and memory to take.")] = "rtx4090",
    vram: o.PlanVram = None,
    plot: Annotated[
        str | None, typer.Option("--plot", metavar="FILE", help="Also draw memory over time to a PNG.")
    ] = None,
    overwrite: o.Overwrite = False,
    as_json: o.Json = False,
) -> None:
    """Predict memory and time of a request on a card; needs neither the card nor any weights."""
    from unipic_run.engine.estimate import ask_for, told
    from unipic_run.engine.plot import save_plot
    from unipic_run.engine.png_metadata import check_output

    terminal = _terminal(ctx, as_json)
    if plot:
        check_output(plot, overwrite=overwrite)
    how = {
        "dtype": dtype if dtype not in (None, "auto") else "bf16",
        "quant": quant or "none",
        "attention": attn,
        "gpu": gpu,
        "vram": vram,
        "shortcuts": a.shortcuts(speed, head_steps, order, cfg_interval, cfg_cache, solver, block_cache),
    }
    asked = ask_for(model or "unipic", task, res=res, steps=steps, images=n, **how, say=terminal.say)
    terminal.data |= told(asked)
    names = ("stage", "peak GiB", "reserved", "TFLOP", "GB moved", "launches", "seconds")
    terminal.line("{:<10} {:>9} {:>9} {:>8} {:>9} {:>9} {:>8}".format(*names))
    for name, stage in terminal.data["stages"].items():
        terminal.line(
            f"{name:<10} {stage['peak_bytes'] / 2**30:>9.2f} {stage['reserved_bytes'] / 2**30:>9.2f} "
            f"{stage['flop'] / 1e12:>8.1f} {stage['nbytes'] / 1e9:>9.0f} {stage['launches']:>9} "
            f"{stage['seconds']:>8.2f}"
        )
    terminal.line(terminal.data["placement"]["line"])
    if graphs := terminal.data["graphs"]["pool"] + terminal.data["graphs"]["kept"]:
        fit = "would take" if terminal.data["graphs"]["fit"] else "find no room: they want"
        terminal.line(f"CUDA graphs {fit} {graphs / 2**30:.1f} GiB beside it")
    if left := terminal.data["left_to_torch"]:
        calls = sum(map(len, left.values()))
        terminal.line(f"counted as our kernels, but faster by torch on this card: {calls} kinds of {', '.join(left)}")
    if plot:
        save_plot(asked, plot, overwrite)
        terminal.data["plot"] = plot
    terminal.say("predicted from fixed rates, not measured; what torch reserves is an estimate")


@app.command()
def pull(
    ctx: typer.Context, model: o.Name, revision: o.Revision = None, as_json: o.Json = False, quiet: o.Quiet = False
) -> None:
    """Fetch a model and convert it; prints its folder."""
    from unipic_run.engine import hub

    terminal = _terminal(ctx, as_json, quiet)
    found = hub.pull(model, revision, terminal.progress, terminal.say)
    terminal.say(f"{found.source}; licence: {found.licence}; {found.note}")
    terminal.data |= asdict(found)
    terminal.line(str(found.path))


@app.command()
def convert(
    ctx: typer.Context,
    src: Annotated[Path, typer.Argument(help="Folder of a released checkpoint.", show_default=False)],
    dst: Annotated[Path, typer.Argument(help="Folder to make.", show_default=False)],
    quant: Annotated[str, typer.Option("--quant", metavar="NAME", help="none, or int8: half the size.")] = "none",
    as_json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Turn a released checkpoint into safetensors once, without running anything in it; prints the folder."""
    from unipic_run.engine.checkpoint import manifest
    from unipic_run.engine.checkpoint.convert import convert as convert_folder

    terminal = _terminal(ctx, as_json, quiet)
    folder = convert_folder(src, dst, terminal.progress, quant=quant)
    if ignored := manifest.read(folder)["source"].get("ignored"):
        terminal.say(f"left out, since this model does not use them: {', '.join(ignored)}")
    terminal.data |= {"path": str(folder)}
    terminal.line(str(folder))


@app.command()
def verify(ctx: typer.Context, model: o.Name, as_json: o.Json = False, quiet: o.Quiet = False) -> None:
    """Read every file of a converted model again and compare it with its recorded sha256."""
    from unipic_run.engine.checkpoint import manifest
    from unipic_run.engine.info import on_disk

    terminal = _terminal(ctx, as_json, quiet)
    terminal.data["verified"] = []
    for folder in on_disk(model):
        files = manifest.verify(folder, terminal.progress)["files"]
        terminal.data["verified"].append({"path": str(folder), "files": files})
        terminal.line(f"ok {folder}: {len(files)} files, {gigabytes(sum(entry['size'] for entry in files.values()))}")


@app.command("list")
def list_models(ctx: typer.Context, as_json: o.Json = False) -> None:
    """Show the models on this machine and those that can be pulled."""
    from unipic_run.engine import hub

    terminal = _terminal(ctx, as_json)
    models = hub.list_models()
    terminal.data["models"] = [asdict(row) for row in models]
    for row in models:
        where = f"{gigabytes(row.nbytes)}  {row.path}" if row.path else f"not here: unipic-run pull {row.name}"
        terminal.line(f"{row.name}  {where}  ({row.source})")


@app.command()
def info(
    ctx: typer.Context,
    path: Annotated[str, typer.Argument(help="A PNG, a checkpoint folder or a model's name.", show_default=False)],
    as_json: o.Json = False,
) -> None:
    """Show the settings a picture was made with, or what a checkpoint holds."""
    from unipic_run.engine.info import info as look_at

    terminal = _terminal(ctx, as_json)
    terminal.data |= look_at(path)
    for name, value in (terminal.data | terminal.data.get("settings", {})).items():
        if name != "settings":
            terminal.line(f"{name:<12}  {value}")


@app.command()
def doctor(ctx: typer.Context, as_json: o.Json = False) -> None:
    """Say what works on this machine and how to fix what does not."""
    from unipic_run.engine.doctor import examine
    from unipic_run.engine.facts import gather

    terminal = _terminal(ctx, as_json)
    facts = gather()
    checks = examine(facts)
    terminal.data["checks"] = [asdict(check) for check in checks]
    for check in checks:
        terminal.line(check.text())
    if facts.torch:
        from unipic_run.engine.fits import fits_on, told

        fits = fits_on(facts.gpus)
        terminal.data["fits"] = [asdict(one) for one in fits]
        for line in told(fits):
            terminal.line(line)
    if any(check.state == "fail" for check in checks):
        raise typer.Exit(1)


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
    command = typer.main.get_command(app)
    try:
        with command.make_context("unipic-run", arguments, obj=terminal) as context:
            command.invoke(context)
    except typer.Exit as end:
        return end.exit_code
    except Exception as error:
        if not hasattr(error, "format_message"):  # the parser's errors, whose class depends on the version of typer
            raise
        where = getattr(getattr(error, "ctx", None), "command_path", "unipic-run")
        raise UsageError(error.format_message().rstrip("."), f"see {where} --help") from None
    return 0


def _hint(terminal: Terminal, model: str | None, texts: Sequence[str]) -> None:
    """Rather than let a model of few words paint something else in silence."""
    if model == "pocket":
        from unipic_run.pocket.vocabulary import hint

        if said := hint(texts):
            terminal.say(said)


def _terminal(ctx: typer.Context, as_json: bool, quiet: bool = False) -> Terminal:
    terminal = ctx.find_object(Terminal)
    terminal.json, terminal.quiet = as_json, quiet
    return terminal
