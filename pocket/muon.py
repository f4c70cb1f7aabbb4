"""Muon for matrices (Jordan et al. 2024: momentum whose singular values are all set to about one), AdamW for the rest.

Convolutions count as matrices (out, in * height * width). First and last layers, embeddings and vectors are AdamW's.
"""

from collections import defaultdict
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ..kernels.linear import in_software

MOMENTUM = 0.95
COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic iteration, tuned by its authors for few rounds
ROUNDS = 5
ENDS = ("embed", "conv_in", "conv_out", "quant_conv", "token", "latent", "final", "input_proj", "z_proj", "hints")


def orthogonal(matrices: Tensor) -> Tensor:
    """U V^T of each matrix U S V^T of (..., rows, columns), roughly: singular values end between 0.7 and 1.2.

    In bfloat16, as its authors do, but for CPUs that emulate it.
    """
    a, b, c = COEFFICIENTS
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    x = x if in_software(x.new_empty(0, dtype=torch.bfloat16)) else x.bfloat16()
    for _ in range(ROUNDS):
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    return (x.mT if tall else x).to(matrices.dtype)


class Optimiser:
    """`rate` is AdamW's, `matrix_rate` Muon's, in units of a matrix with singular values one."""

    def __init__(
        self, parameters: dict[str, nn.Parameter], rate: float, matrix_rate: float, weight_decay: float
    ) -> None:
        self.rate, self.matrix_rate, self.weight_decay = rate, matrix_rate, weight_decay
        inner = {n: p for n, p in parameters.items() if p.dim() > 1 and not any(end in n for end in ENDS)}
        self.matrices, self.others = inner, {n: p for n, p in parameters.items() if n not in inner}
        self.momenta = {name: torch.zeros_like(p) for name, p in inner.items()}
        self.adam = torch.optim.AdamW(self.others.values(), lr=rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True)

    def zero_grad(self) -> None:
        for parameter in (*self.matrices.values(), *self.others.values()):
            parameter.grad = None

    @torch.no_grad()
    def step(self, share: float) -> None:
        """One step at a share of the full rates."""
        for group in self.adam.param_groups:
            group["lr"] = share * self.rate
        self.adam.step()
        rate = share * self.matrix_rate
        alike: dict[torch.Size, list[tuple[nn.Parameter, Tensor]]] = defaultdict(list)
        for name, p in self.matrices.items():
            if p.grad is not None:
                self.momenta[name].lerp_(p.grad, 1 - MOMENTUM)
                ahead = p.grad.lerp(self.momenta[name], MOMENTUM).flatten(1)
                alike[ahead.shape].append((p, ahead))
        for (rows, columns), some in alike.items():
            moves = orthogonal(torch.stack([ahead for _, ahead in some])) * max(1.0, rows / columns) ** 0.5
            for (p, _), move in zip(some, moves, strict=True):
                p.mul_(1 - rate * self.weight_decay).sub_(move.view(p.shape), alpha=rate)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The state, by name."""
        for name, momentum in self.momenta.items():
            yield f"momentum/{name}", momentum
        for name, p in self.others.items():
            if state := self.adam.state[p]:
                yield f"first/{name}", state["exp_avg"]
                yield f"second/{name}", state["exp_avg_sq"]

    def load(self, tensors: dict[str, Tensor], taken: int) -> None:
        """Go on after `taken` steps from what `tensors` gave."""
        for name, momentum in self.momenta.items():
            momentum.copy_(tensors[f"momentum/{name}"])
        for name, p in self.others.items():
            if f"first/{name}" in tensors:
                first, second = (torch.empty_like(p).copy_(tensors[f"{kind}/{name}"]) for kind in ("first", "second"))
                done = torch.tensor(float(taken), device=p.device)
                self.adam.state[p] = {"step": done, "exp_avg": first, "exp_avg_sq": second}
