"""The options of the `unipic-run` command, one row each: names, and the line that `--help` shows."""

from functools import partial
from typing import Annotated, Any

import typer


def _option(kind: Any, *names: str, panel: str | None = None, metavar: str | None = None, **more: Any) -> Any:
    metavar = "" if kind in (bool, bool | None) else metavar
    return Annotated[kind, typer.Option(*names, rich_help_panel=panel, metavar=metavar, **more)]


_in = partial(_option, panel="Model")
_out = partial(_option, panel="Output")

Image = Annotated[
    str, typer.Argument(metavar="IMAGE", help="PNG, JPEG or WebP file; - reads one from stdin.", show_default=False)
]
Prompt = Annotated[
    str | None, typer.Argument(metavar="PROMPT", help="What to paint or change; - reads one prompt a line from stdin.")
]
PromptFile = _option(str | None, "--prompt-file", metavar="FILE", help="One prompt a line instead; - is stdin.")
From = _option(str | None, "--from", metavar="PNG", help="Repeat the settings of a PNG; options given here win.")
Size = _option(str | None, "--size", metavar="WxH", help="Width and height in pixels, multiples of 16.")
Mask = _option(str | None, "--mask", metavar="FILE", help="White where to repaint; the rest stays as it is.")
Outpaint = _option(str | None, "--outpaint", metavar="L,T,R,B", help="Pixels to add left, top, right and bottom.")
Fit = _option(
    str | None, "--fit", metavar="HOW", help="keep the aspect, crop to a square, or longest: side of --res; per model."
)
Posterior = _option(
    str | None, "--posterior", metavar="HOW", help="Sources as latents: sample (from the seed) or mean; per model."
)
Ref = _option(
    list[str] | None, "--ref", metavar="FILE", help="A further picture that the prompt speaks of; repeatable."
)
EditSize = _option(str | None, "--size", metavar="WxH", help="Of the result, with models that can choose it.")
Question = Annotated[
    list[str],
    typer.Argument(metavar="QUESTION", help="One or more; - reads one a line from stdin.", show_default=False),
]
Name = Annotated[str, typer.Argument(metavar="MODEL", help="Short name, folder or hub id.", show_default=False)]
Res = _option(
    int | None,
    "--res",
    metavar="PIXELS",
    help="Side of a square, a multiple of 16; an edit: area or side.",
)
N = _option(int, "-n", metavar="N", help="Copies of each prompt; copy i has seed + i.")
Seed = _option(int | None, "--seed", metavar="S", help="Drawn and reported when not given.")
Steps = _option(int | None, "--steps", "--iters", metavar="N", help="Rounds, or denoising steps.")
Guidance = _option(float | None, "--guidance", "--cfg", metavar="X", help="1 turns guidance off.")
Schedule = _option(str | None, "--cfg-schedule", metavar="NAME", help="Guidance over the rounds: constant or linear.")
Speed = _option(
    str | None, "--speed", metavar="NAME", help="exact (default), balanced or fast: docs/speed.md has their price."
)
HeadSteps = _option(
    str | None, "--head-steps", metavar="A:B", help="Of the diffusion head, in the first and the last round: 50:5."
)
Reveal = _option(str | None, "--order", metavar="NAME", help="Of revealing tokens: random, or gtr (checkerboard).")
Interval = _option(
    str | None, "--cfg-interval", metavar="A:B", help="Shares of the run between which guidance is on: 0:0.6."
)
BlockCache = _option(
    float | None,
    "--block-cache",
    metavar="X",
    help="Not UniPic 1.0: reuse later blocks where the first moved less: 0.1.",
)
PlanBlockCache = _option(
    float | None, "--block-cache", metavar="X", help="Planned as if nothing were reused; 1: as if all that may be."
)
Cache = _option(
    float | None, "--cfg-cache", metavar="X", help="Keep what guidance adds until X times as much is known: 2."
)
Solver = _option(
    str | None, "--solver", metavar="NAME", help="Of the diffusion head: ddpm, or ddim or dpm2, noiseless."
)
Temperature = _option(float | None, "--temperature", metavar="X", help="Scales the noise of the diffusion head.")
Negative = _option(str | None, "--negative", metavar="TEXT", help="What to steer away from.")
Batch = _option(
    int | None, "--batch-size", metavar="N", help="Pictures computed together; 1 on a CPU, 4 on a GPU unless given."
)

Model = _in(str | None, "--model", "-m", metavar="NAME", help="Short name, folder or hub id; unipic by default.")
PlanModel = _in(
    str | None, "--model", "-m", metavar="NAME", help="Short name or its hub id, or a folder; unipic by default."
)
Device = _in(str, "--device", metavar="NAME", help="auto, cpu, cuda or cuda:N.")
Dtype = _in(str | None, "--dtype", metavar="NAME", help="auto, bf16, fp16 or fp32.")
Quant = _in(
    str | None, "--quant", metavar="NAME", help="none, int8, bnb8, nf4, or auto: what fits; else as stored on disk."
)
Attn = _in(str | None, "--attn", metavar="NAME", help="auto (unless given), sdpa, int8-qk, flash-attn or xformers.")
Vram = _in(
    str | None, "--vram", metavar="GIB", help="What of the GPU may be used; auto: what is free now. Else all of it."
)
DropIdle = _in(bool, "--drop-idle", help="With --vram: keep less in RAM after the first request; ignored on a CPU.")
PlanQuant = _in(str | None, "--quant", metavar="NAME", help="none (unless given), int8, or auto: what gen would take.")
PlanAttn = _in(str, "--attn", metavar="NAME", help="sdpa or int8-qk.")
PlanVram = _in(
    str | None, "--vram", metavar="GIB", help="What of the card may be used; auto: all but a margin. Else all of it."
)
ExactRope = _in(
    bool | None, "--exact-rope", help="Keep rotary frequencies in float32; the original rounds them in bf16."
)
Revision = _in(str | None, "--revision", metavar="REV", help="Branch, tag or commit on the hub.")
Offline = _in(bool, "--offline", help="Use only what is on this machine.")

Output = _out(str | None, "--output", "-o", metavar="PATH", help="Path, folder, template such as {seed}.png, or -.")
Overwrite = _out(bool, "--overwrite", help="Replace files that exist.")
Preview = _out(
    int, "--preview-every", metavar="K", show_default=False, help="Also save the unfinished picture every K rounds."
)
NoMetadata = _out(bool, "--no-metadata", help="Save the pictures without their settings.")
Json = _out(bool, "--json", help="One JSON object on stdout.")
Quiet = _out(bool, "--quiet", "-q", help="No progress and no notes.")
