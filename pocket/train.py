"""Trains the pocket model from nothing: the autoencoder, then four times LLM, MAR and head together.

python -m unipic_run.pocket.train --minutes 150        a sitting; the same command again goes on where it ended

The state stays in --work. Every phase ends with weights in --out, which the next begins with. Delete both folders to
begin anew.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from ..engine.checkpoint import manifest
from ..engine.checkpoint.config_file import read_config_file
from ..engine.models.unipic.config import UniPicConfig
from ..engine.models.unipic.model import UniPic
from ..engine.models.unipic.prompts import IMAGE
from ..engine.tokens import Tokens
from .config import VAE, pocket_config
from .export import export
from .plans import JOINT, VAEPlan
from .sheet import engine_of, look
from .sitting import write_state
from .tokenizer import END, pocket_tokenizer
from .train_joint import train_joint
from .train_vae import Autoencoder, judge_vae, train_vae

HERE = Path(__file__).parent
VAE_STATE, VAE_DONE = "vae-state.safetensors", "vae.safetensors"


def main() -> None:
    torch.set_flush_denormal(True)  # before any thread begins; averages that fade out would slow a CPU several times
    options = arguments()
    if options.threads:
        torch.set_num_threads(options.threads)
    until = time.monotonic() + 60 * options.minutes
    if not phases_in(options.out):
        finish_vae(options)
    while time.monotonic() < until and 0 < (done := phases_in(options.out)) <= len(JOINT):
        joint(options, done - 1, (until - time.monotonic()) / 60)
    if phases_in(options.out) > len(JOINT):
        print(f"{options.out} is trained to the end: delete it, and {options.work}, to begin anew")


def finish_vae(options: argparse.Namespace) -> None:
    """A sitting of phase 1, and the finished autoencoder when that was the last."""
    work = options.work
    vae, done = train_vae(VAE, VAEPlan(), work / VAE_STATE, options.minutes, options.device)
    judged = judge_vae(vae)
    print(f"autoencoder: {judged.psnr:.1f} dB, {judged.read:.3f} of test scenes read, deviation {judged.std:.3f}")
    if done:
        # What ships is bfloat16: the latents that the next phase learns are those of the shipped encoder.
        shipped = {name: tensor.bfloat16() for name, tensor in vae.state_dict().items()}
        write_state(options.out / VAE_DONE, shipped, {"scale": f"{1 / judged.std:.4f}"})


def phases_in(folder: Path) -> int:
    """How many phases the weights in a folder have behind them."""
    if (folder / manifest.NAME).exists():
        return manifest.verify(folder)["source"]["phases"]
    return int((folder / VAE_DONE).exists())


def begun(folder: Path) -> tuple[dict[str, Tensor], float]:
    """What a joint phase begins with: tensors of the autoencoder or of all, float32, and the scale of its latents."""
    if (folder / manifest.NAME).exists():
        path, scale = folder / "model.safetensors", read_config_file(folder)["config"]["vae_scale"]
    else:
        path = folder / VAE_DONE
        with safe_open(path, framework="pt") as file:
            scale = float(file.metadata()["scale"])
    return {name: tensor.float() for name, tensor in load_file(path).items()}, scale


def joint(options: argparse.Namespace, phase: int, minutes: float) -> None:
    """A sitting of a joint phase, a look at the model, and its export when the phase is over."""
    work, plan = options.work, JOINT[phase]
    work.mkdir(parents=True, exist_ok=True)
    tensors, scale = begun(options.out)
    vae = Autoencoder(VAE)
    vae.load_state_dict({name: tensors[name] for name in vae.state_dict()})
    vae.to(options.device, memory_format=torch.channels_last).requires_grad_(False).eval()
    tokens = saved_tokens(work)
    config = configured(tokens, scale)

    def show(model: UniPic, weights: dict[str, Tensor], step: int) -> None:
        with engine_of(model, weights, tokens) as engine:
            shares = look(engine, work / f"sheet-{phase + 2}-{step:06}.png")
        row = {"phase": phase + 2, "step": step, **{name: round(share, 3) for name, share in shares.items()}}
        with (work / "curve.jsonl").open("a", encoding="utf-8") as curve:
            curve.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)

    model, weights, run, done = train_joint(
        config,
        vae,
        tensors if phase else None,
        tokens,
        plan,
        work / f"joint-state-{phase + 2}.safetensors",
        work / f"shards-{phase + 2}",
        minutes,
        options.device,
        show,
        options.look_every,
    )
    show(model, weights, run.step)
    if done:
        export(options.out, config, weights, {"trained by": "pocket/train.py", "phases": phase + 2})
        print(f"phase {phase + 2} is over: {options.out}")


def configured(tokens: Tokens, scale: float) -> UniPicConfig:
    known = tokens.tokenizer
    return pocket_config(known.get_vocab_size(), known.token_to_id(IMAGE), known.token_to_id(END), scale)


def saved_tokens(work: Path) -> Tokens:
    """The engine's tokens are read from a file."""
    path, tokenizer = work / "tokenizer.json", pocket_tokenizer()
    tokenizer.save(str(path))
    return Tokens(path, IMAGE, tokenizer.token_to_id(IMAGE))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=150.0, help="of this sitting")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="of the CPU; all by default")
    parser.add_argument("--look-every", type=int, default=1000, help="steps between sample sheets")
    parser.add_argument("--work", type=Path, default=Path("pocket-work"), help="state, shards and sheets")
    parser.add_argument("--out", type=Path, default=HERE / "weights", help="where the model goes")
    return parser.parse_args()


if __name__ == "__main__":
    main()
