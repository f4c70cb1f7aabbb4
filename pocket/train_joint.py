"""The joint phases: LLM, MAR and head together, on generation, edits and questions, over a frozen autoencoder."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..engine.models.unipic.config import UniPicConfig
from ..engine.models.unipic.model import UniPic, build
from ..engine.tokens import Tokens
from ..kernels.linear import in_software
from .batches import Draw, Pictures, Pool, step_rng
from .losses import GOLDEN, VARIANCE_WEIGHT, Hints, answer_losses, masked_share, picture_losses
from .plans import JointPlan
from .sitting import Losses, Plan, Run, generator, sit
from .train_vae import Autoencoder

EDIT_SHIFT = 0.37  # the edits' masked share is another than the generations' of the same step


class Joint(nn.Module):
    """What this phase trains: the model without its autoencoder, and the hints."""

    def __init__(self, config: UniPicConfig) -> None:
        super().__init__()
        self.model = build(config)
        self.hints = Hints(config.mar.width, config.mar.channels)

    def trained(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.named_parameters() if not name.startswith("model.vae_")}


def initialise(joint: Joint, seed: int) -> None:
    """Xavier matrices; modulations and the head's last layer zero, so that each of its blocks starts as nothing.

    Teachers start at zero too: what they have not learned yet must not move the model.
    """
    noise = generator(seed, 0)
    for name, p in joint.trained().items():
        if any(part in name for part in ("modulation", "head.final", "hints.")) or name.endswith("bias"):
            nn.init.zeros_(p)
        elif name.endswith(("pos_embed", "fake_latent", "mask_token", "embed.weight")) and "decoder.embed" not in name:
            nn.init.normal_(p, 0, 0.02 if "diffusion" in name else 0.1, noise)
        elif p.dim() > 1:
            nn.init.xavier_uniform_(p, generator=noise)
        else:
            nn.init.ones_(p)


def joint_losses(joint: Joint, tokens: Tokens, plan: JointPlan, draw: Draw, step: int) -> Losses:
    """The sum over pictures and, by turns, edits or answers, and its parts."""
    noise = generator(plan.seed, step)
    model, hints = joint.model, joint.hints
    hint_weight, object_weight = (
        first + (last - first) * step / plan.steps for first, last in (plan.hint_weights, plan.object_weights)
    )

    def of_pictures(batch: Pictures, share: float) -> tuple[Tensor, Losses]:
        found = picture_losses(model, hints, tokens, batch, share, noise, object_weight)
        return found["noise"] + VARIANCE_WEIGHT * found["variance"] + hint_weight * found["hint"], found

    total, losses = of_pictures(draw.pictures(plan.pictures), masked_share(step, plan.words_first))
    if step % 2:
        share = masked_share(step + EDIT_SHIFT / GOLDEN, plan.words_first)
        more, edited = of_pictures(draw.edits(plan.edits), share)
        total = total + 2 * more * plan.edits / plan.pictures
        losses |= {
            "edit": edited["noise"],
            "edit hint": edited["hint"],
            "copy": edited["copy"],
            "shown": edited["shown"],
        }
    else:
        losses |= answer_losses(model, hints, tokens, draw.answers(plan.answers, plan.questions))
        total = total + 2 * plan.answer_weight * losses["answer"]
    total = total + plan.copy_weight * losses["copy"] + hint_weight * losses["shown"]
    return {"loss": total} | {name: value.detach() for name, value in losses.items()}


@contextmanager
def fast_products(device: torch.device) -> Iterator[None]:
    """Products in bfloat16, but for CPUs that emulate it; weights and their steps stay in float32.

    On a CPU attention is made of such products too: with gradients torch's own takes about twice as long there.
    """
    if in_software(torch.empty(0, dtype=torch.bfloat16, device=device)):
        yield
    elif device.type != "cpu":
        with torch.autocast(device.type, torch.bfloat16):
            yield
    else:
        before = torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed()
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)  # it concerns CPUs too: attention in bfloat16
        try:
            with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
                yield
        finally:
            torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(before)


def train_joint(
    config: UniPicConfig,
    vae: Autoencoder,
    begin: dict[str, Tensor] | None,
    tokens: Tokens,
    plan: JointPlan,
    state: Path | None,
    kept: Path | None,
    minutes: float,
    device: str = "cpu",
    look: Callable[[UniPic, dict[str, Tensor], int], None] | None = None,
    look_every: int = 1000,
) -> tuple[UniPic, dict[str, Tensor], Run, bool]:
    """The model, its averaged weights by name (the autoencoder's with them), the run, and whether it is complete.

    `begin` is what the phase before ended with, None for none.
    """
    torch.manual_seed(plan.seed)
    joint = Joint(config)
    initialise(joint, plan.seed)
    if begin is not None:
        joint.model.load_state_dict(begin)
    joint.model.vae_encoder, joint.model.vae_decoder = vae.vae_encoder, vae.vae_decoder
    joint.to(device)
    schedule = Plan(
        plan.steps, plan.rate, plan.matrix_rate, warmup=200, decay=plan.decay, average=0.999, weight_decay=0.02
    )
    run = Run(joint.trained(), schedule, state)
    pool = Pool(vae, config.vae_scale, plan, kept)

    def losses_of(step: int) -> Losses:
        draw = Draw(step_rng(plan.seed, step), pool.at(step), tokens, torch.device(device))
        with fast_products(torch.device(device)):
            return joint_losses(joint, tokens, plan, draw, step)

    def weights() -> dict[str, Tensor]:
        own = {name.removeprefix("model."): t for name, t in run.average.items() if name.startswith("model.")}
        return {**joint.model.state_dict(), **own}

    seen = None if look is None else (lambda step: look(joint.model, weights(), step))
    done = sit(run, losses_of, minutes, seen, look_every)
    return joint.model, weights(), run, done
