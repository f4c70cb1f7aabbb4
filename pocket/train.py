"""Trains the pocket model from nothing: the autoencoder, then LLM, MAR and head together, with the decoder between.

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
from ..engine.models.unipic.model import UniPic, build
from ..engine.models.unipic.prompts import IMAGE
from ..engine.tokens import Tokens
from .config import VAE, pocket_config
from .export import export
from .plans import PHASES, DecoderPlan, JointPlan, VAEPlan
from .sheet import engine_of, look
from .sitting import write_state
from .tokenizer import END, pocket_tokenizer
from .train_decoder import train_decoder
from .train_joint import train_joint
from .train_vae import Autoencoder, judge_vae, train_vae

HERE = Path(__file__).parent
VAE_STATE, VAE_DONE = "vae-state.safetensors", "vae.safetensors"
FIRST_JOINT = 2


def main() -> None:
    torch.set_flush_denormal(True)  # before any thread begins; averages that fade out would slow a CPU several times
    options = arguments()
    if options.threads:
        torch.set_num_threads(options.threads)
    until = time.monotonic() + 60 * options.minutes
    while time.monotonic() < until and (done := phases_in(options.out)) < len(PHASES):
        sitting(options, done, (until - time.monotonic()) / 60)
    if phases_in(options.out) == len(PHASES):
        print(f"{options.out} is trained to the end: delete it, and {options.work}, to begin anew")


def sitting(options: argparse.Namespace, done: int, minutes: float) -> None:
    """As much of the next phase as the minutes allow."""
    match PHASES[done]:
        case VAEPlan() as plan:
            autoencoder(options, plan, minutes)
        case JointPlan() as plan:
            joint(options, plan, done + 1, minutes)
        case DecoderPlan() as plan:
            decoder(options, plan, done + 1, minutes)


def autoencoder(options: argparse.Namespace, plan: VAEPlan, minutes: float) -> None:
    """A sitting of phase 1, and the finished autoencoder when that was the last."""
    work = options.work
    vae, done = train_vae(VAE, plan, work / VAE_STATE, minutes, options.device)
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


class Later:
    """A phase after the first: what it begins with, looks at the model on the way, and the export at its end."""

    def __init__(self, options: argparse.Namespace, number: int) -> None:
        self.number, self.work, self.out = number, options.work, options.out
        self.work.mkdir(parents=True, exist_ok=True)
        self.tensors, scale = begun(self.out)
        self.vae = Autoencoder(VAE)
        self.vae.load_state_dict({name: self.tensors[name] for name in self.vae.state_dict()})
        self.vae.to(options.device, memory_format=torch.channels_last).requires_grad_(False).eval()
        self.tokens = saved_tokens(self.work)
        self.config = configured(self.tokens, scale)
        self.state = self.work / f"state-{number}.safetensors"
        self.data = self.work / f"data-{number}"

    def show(self, model: UniPic, weights: dict[str, Tensor], step: int) -> None:
        with engine_of(model, weights, self.tokens) as engine:
            shares = look(engine, self.work / f"sheet-{self.number}-{step:06}.png")
        row = {"phase": self.number, "step": step, **{name: round(share, 3) for name, share in shares.items()}}
        with (self.work / "curve.jsonl").open("a", encoding="utf-8") as curve:
            curve.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)

    def end(self, weights: dict[str, Tensor]) -> None:
        export(self.out, self.config, weights, {"trained by": "pocket/train.py", "phases": self.number})
        print(f"phase {self.number} is over: {self.out}")


def joint(options: argparse.Namespace, plan: JointPlan, number: int, minutes: float) -> None:
    """A sitting of LLM, MAR and head, and a look at the model."""
    phase = Later(options, number)
    model, weights, run, done = train_joint(
        phase.config,
        phase.vae,
        phase.tensors if number > FIRST_JOINT else None,
        phase.tokens,
        plan,
        phase.state,
        phase.data,
        minutes,
        options.device,
        phase.show,
        options.look_every,
    )
    phase.show(model, weights, run.step)
    if done:
        phase.end(weights)


def decoder(options: argparse.Namespace, plan: DecoderPlan, number: int, minutes: float) -> None:
    """A sitting of the decoder on what the model draws, and a look at the model."""
    phase = Later(options, number)
    model = build(phase.config)
    model.load_state_dict(phase.tensors)
    model.to(options.device).requires_grad_(False).eval()
    weights, run, done = train_decoder(model, phase.vae, phase.tokens, plan, phase.state, phase.data, minutes)
    phase.show(model, weights, run.step)
    if done:
        phase.end(weights)


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
