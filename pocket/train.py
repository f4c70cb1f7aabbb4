"""Trains the pocket model from nothing: the autoencoder, then LLM, MAR and head together; then exports it.

python -m unipic_run.pocket.train --minutes 150        a sitting; the same command again goes on where it ended

The full state stays in --work. --pack writes what another machine needs to go on into --resume, where a sitting without
a state of its own looks for it.
"""

import argparse
import shutil
import time
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from ..engine.checkpoint.manifest import sha256
from ..engine.models.unipic.config import UniPicConfig
from ..engine.models.unipic.model import UniPic
from ..engine.models.unipic.prompts import IMAGE
from ..engine.tokens import Tokens
from .config import VAE, pocket_config
from .export import export
from .plans import JointPlan, VAEPlan
from .sheet import engine_of, look
from .sitting import pack, write_state
from .tokenizer import END, pocket_tokenizer
from .train_joint import train_joint
from .train_vae import Autoencoder, judge_vae, train_vae

HERE = Path(__file__).parent
# What the work folder holds. The states are packed under the same names; the finished autoencoder is packed as it is.
VAE_STATE, VAE_DONE, JOINT_STATE = "vae-state.safetensors", "vae.safetensors", "joint-state.safetensors"


def main() -> None:
    options = arguments()
    if options.threads:
        torch.set_num_threads(options.threads)
    until = time.monotonic() + 60 * options.minutes
    for name in (VAE_STATE, VAE_DONE, JOINT_STATE):
        take(options.resume / name, options.work / name)
    if not (options.work / VAE_DONE).exists():
        finish_vae(options, now=options.freeze_vae)
    if (options.work / VAE_DONE).exists() and time.monotonic() < until:
        joint(options, (until - time.monotonic()) / 60)
    if options.pack:
        pack_all(options.work, options.resume)


def finish_vae(options: argparse.Namespace, now: bool) -> None:
    """A sitting of phase 1, and the finished autoencoder when that was the last (or `now`)."""
    work = options.work
    vae, done = train_vae(VAE, VAEPlan(), work / VAE_STATE, options.minutes, options.device)
    judged = judge_vae(vae)
    print(f"autoencoder: {judged.psnr:.1f} dB, {judged.read:.3f} of test scenes read, deviation {judged.std:.3f}")
    if done or now:
        # What ships is bfloat16: the latents that phase 2 learns are those of the shipped encoder.
        shipped = {name: tensor.bfloat16() for name, tensor in vae.state_dict().items()}
        write_state(work / VAE_DONE, shipped, {"scale": f"{1 / judged.std:.4f}"})


def finished_vae(work: Path, device: str) -> tuple[Autoencoder, float]:
    """The autoencoder, and the factor that gives its latents unit deviation."""
    vae = Autoencoder(VAE)
    vae.load_state_dict({name: tensor.float() for name, tensor in load_file(work / VAE_DONE).items()})
    return vae.to(device, memory_format=torch.channels_last).requires_grad_(False).eval(), scale_in(work / VAE_DONE)


def scale_in(path: Path) -> float:
    with safe_open(path, framework="pt") as file:
        return float(file.metadata()["scale"])


def joint(options: argparse.Namespace, minutes: float) -> None:
    """A sitting of phase 2, a look at the model, and its export."""
    work, plan = options.work, JointPlan()
    vae, scale = finished_vae(work, options.device)
    tokens = saved_tokens(work)
    config = configured(tokens, scale)

    def show(model: UniPic, weights: dict[str, Tensor], step: int) -> None:
        with engine_of(model, weights, tokens) as engine:
            shares = look(engine, work / f"sheet-{step:06}.png")
        line = f"look {step}  " + "  ".join(f"{name} {share:.2f}" for name, share in shares.items())
        with (work / "curve.txt").open("a", encoding="utf-8") as curve:
            curve.write(line + "\n")
        print(line, flush=True)

    model, weights, run, done = train_joint(
        config,
        vae,
        tokens,
        plan,
        work / JOINT_STATE,
        work / f"shards-{sha256(work / VAE_DONE)[:12]}",  # latents of another autoencoder are of no use
        minutes,
        options.device,
        show,
        options.look_every,
    )
    show(model, weights, run.step)
    told = {"trained by": "pocket/train.py", "step": run.step, "of": plan.steps, "complete": done}
    export(options.out, config, weights, told)
    print(f"exported step {run.step} of {plan.steps} to {options.out}")


def configured(tokens: Tokens, scale: float) -> UniPicConfig:
    known = tokens.tokenizer
    return pocket_config(known.get_vocab_size(), known.token_to_id(IMAGE), known.token_to_id(END), scale)


def saved_tokens(work: Path) -> Tokens:
    """The engine's tokens are read from a file."""
    path, tokenizer = work / "tokenizer.json", pocket_tokenizer()
    tokenizer.save(str(path))
    return Tokens(path, IMAGE, tokenizer.token_to_id(IMAGE))


def take(packed: Path, own: Path) -> None:
    """Begin from what was handed on, where this machine has nothing of its own."""
    own.parent.mkdir(parents=True, exist_ok=True)
    if packed.exists() and not own.exists():
        shutil.copyfile(packed, own)


def pack_all(work: Path, resume: Path) -> None:
    """Hand on the state of the phase that is under way, and the autoencoder when it is finished."""
    resume.mkdir(parents=True, exist_ok=True)
    if (work / VAE_DONE).exists():
        shutil.copyfile(work / VAE_DONE, resume / VAE_DONE)
        (resume / VAE_STATE).unlink(missing_ok=True)
    for name in (VAE_STATE, JOINT_STATE):
        if (work / name).exists() and not (name == VAE_STATE and (work / VAE_DONE).exists()):
            pack(work / name, resume / name)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=150.0, help="of this sitting")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="of the CPU; all by default")
    parser.add_argument("--look-every", type=int, default=1000, help="steps between sample sheets")
    parser.add_argument("--freeze-vae", action="store_true", help="end phase 1 with this sitting, however far it got")
    parser.add_argument("--pack", action="store_true", help="hand the state on at the end")
    parser.add_argument("--work", type=Path, default=Path("pocket-work"), help="state, shards and sheets")
    parser.add_argument("--resume", type=Path, default=HERE / "resume", help="packed states")
    parser.add_argument("--out", type=Path, default=HERE / "weights", help="where the trained model goes")
    return parser.parse_args()


if __name__ == "__main__":
    main()
