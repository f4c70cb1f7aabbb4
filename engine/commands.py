"""The commands that make no picture: what a request would take, the models on this machine, and the machine."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from . import arguments as a
from . import options as o
from .errors import UsageError
from .gpus import GIB
from .terminal import gigabytes, terminal_of


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
    model: o.PlanModel = None,
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
    quiet: o.Quiet = False,
) -> None:
    """Predict memory and time of a request on a card; needs neither the card nor any weights."""
    from .estimate import ask_for, told
    from .plot import save_plot
    from .png_metadata import check_output

    terminal = terminal_of(ctx, as_json, quiet)
    if task == "ask" and (steps is not None or n != 1):
        raise UsageError("a question is not sampled", "leave --steps and -n out, or plan gen or edit")
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
            f"{name:<10} {stage['peak_bytes'] / GIB:>9.2f} {stage['reserved_bytes'] / GIB:>9.2f} "
            f"{stage['flop'] / 1e12:>8.1f} {stage['nbytes'] / 1e9:>9.0f} {stage['launches']:>9} "
            f"{stage['seconds']:>8.2f}"
        )
    terminal.line(terminal.data["placement"]["line"])
    if (waits := terminal.data["placement"]["waiting_seconds"]) >= 0.05:
        terminal.line(f"stages compute; weights that are not there yet take {waits:.1f} s more")
    if (graphs := terminal.data["graphs"]["pool"] + terminal.data["graphs"]["kept"]) >= 0.05 * GIB:
        fit = "would take" if terminal.data["graphs"]["fit"] else "find no room: they want"
        terminal.line(f"CUDA graphs {fit} {graphs / GIB:.1f} GiB beside it")
    if left := terminal.data["left_to_torch"]:
        calls = sum(map(len, left.values()))
        terminal.line(f"counted as our kernels, but faster by torch on this card: {calls} kinds of {', '.join(left)}")
    if plot:
        save_plot(asked, plot, overwrite)
        terminal.data["plot"] = plot
    if length := terminal.data.get("max_new_tokens"):
        terminal.say(f"an answer of {length} tokens")
    terminal.say("predicted from fixed rates, not measured; what torch reserves is an estimate")


def pull(
    ctx: typer.Context, model: o.Name, revision: o.Revision = None, as_json: o.Json = False, quiet: o.Quiet = False
) -> None:
    """Fetch a model and convert it; prints its folder."""
    from . import hub

    terminal = terminal_of(ctx, as_json, quiet)
    found = hub.pull(model, revision, terminal.progress, terminal.say)
    terminal.say(f"{found.source}; licence: {found.licence}; {found.note}")
    terminal.data |= asdict(found)
    terminal.line(str(found.path))


def convert(
    ctx: typer.Context,
    src: Annotated[Path, typer.Argument(metavar="SRC", help="Folder of a released checkpoint.", show_default=False)],
    dst: Annotated[Path, typer.Argument(metavar="DST", help="Folder to make.", show_default=False)],
    quant: Annotated[str, typer.Option("--quant", metavar="NAME", help="none, or int8: half the size.")] = "none",
    as_json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Turn a released checkpoint into safetensors once, without running anything in it; prints the folder."""
    from .checkpoint.convert import convert as convert_folder
    from .checkpoint.convert import left_out

    terminal = terminal_of(ctx, as_json, quiet)
    folder = convert_folder(src, dst, terminal.progress, quant=quant)
    if sentence := left_out(folder):
        terminal.say(sentence)
    terminal.data |= {"path": str(folder)}
    terminal.line(str(folder))


def verify(ctx: typer.Context, model: o.Name, as_json: o.Json = False, quiet: o.Quiet = False) -> None:
    """Read every file of a converted model again and compare it with its recorded sha256."""
    from .checkpoint import manifest
    from .info import on_disk

    terminal = terminal_of(ctx, as_json, quiet)
    terminal.data["verified"] = []
    for folder in on_disk(model):
        files = manifest.verify(folder, terminal.progress)["files"]
        terminal.data["verified"].append({"path": str(folder), "files": files})
        terminal.line(f"ok {folder}: {len(files)} files, {gigabytes(sum(entry['size'] for entry in files.values()))}")


def list_models(ctx: typer.Context, as_json: o.Json = False) -> None:
    """Show the models on this machine and those that can be pulled."""
    from . import hub

    terminal = terminal_of(ctx, as_json)
    models = hub.list_models()
    terminal.data["models"] = [asdict(row) for row in models]
    for row in models:
        where = f"{gigabytes(row.nbytes)}  {row.path}" if row.path else f"not here: unipic-run pull {row.name}"
        terminal.line(f"{row.name}  {where}  ({row.source})")


def info(
    ctx: typer.Context,
    path: Annotated[
        str, typer.Argument(metavar="PATH", help="A PNG, a checkpoint folder or a model's name.", show_default=False)
    ],
    as_json: o.Json = False,
) -> None:
    """Show the settings a picture was made with, or what a checkpoint holds."""
    from .info import info as look_at

    terminal = terminal_of(ctx, as_json)
    terminal.data |= look_at(path)
    for name, value in (terminal.data | terminal.data.get("settings", {})).items():
        if name != "settings":
            terminal.line(f"{name:<12}  {value}")


def doctor(ctx: typer.Context, as_json: o.Json = False) -> None:
    """Say what works on this machine and how to fix what does not."""
    from .doctor import examine
    from .facts import gather

    terminal = terminal_of(ctx, as_json)
    facts = gather()
    checks = examine(facts)
    terminal.data["checks"] = [asdict(check) for check in checks]
    for check in checks:
        terminal.line(check.text())
    if facts.torch:
        from .fits import fits_on, told

        fits = fits_on(facts.gpus)
        terminal.data["fits"] = [asdict(one) for one in fits]
        for line in told(fits):
            terminal.line(line)
    if any(check.state == "fail" for check in checks):
        raise typer.Exit(1)
