"""Spreading outliers: an exact rotation Q of a residual stream, folded into the weights around it (arXiv 2404.00456).

A few channels of a language model's activations are tens of times larger than the rest, and one scale a token then
leaves few steps for all others. In the basis x' = x Q they are ordinary numbers. RMSNorm without its gain g commutes
with Q, since |x'| = |x|, so nothing is computed at run time:

    writers   y = W u + b,               W' = Q^T W,         b' = b Q
    readers   y = W (g * norm(x)) + b,   W' = W diag(g) Q,   g' = 1
    table     rows are read as x,        E' = E Q                   and other rows that are
    taps      y = W [x1 x2 ...] + b,     W' = W diag(Q, Q, ...)
    logits    E (g * norm(x)),           E' M norm(x'),      M = Q^T diag(g) Q

M exists because the one table serves both ends; it costs D^2 for each token of an answer and nothing for a picture.

    Q = diag(signs) (H_m x H_p) / sqrt(D),  D = m p,  p a power of two,  H_m by Paley's construction where m > 1

The signs keep a constant offset of many channels from piling up in one. Sums are made in one fixed order, elementwise,
so a weight's rows do not depend on how it was cut into parts. Letters: D width of the stream.

Not taken in: the inputs of `down`, a product of two factors that no weight can carry a rotation through. Theirs is
made while the model runs, in groups of columns, by the kernel that quantises them (kernels/quantise.py).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels.linear import linear
from ..kernels.quantise import walsh_hadamard
from .recipe import Rotation, expand

_CHUNK = 2**22  # elements that are float32 at once


def hadamard(order: int) -> Tensor:
    """(order, order) float32 of +1 and -1 with H H^T = order I, by either of Paley's constructions: order - 1 is a
    prime that leaves 3 modulo 4, or order / 2 - 1 one that leaves 1. Raises ValueError for other orders.
    """
    if _skew(order):
        return _conference(order - 1) + torch.eye(order)
    if _symmetric(order):
        whole, half = torch.tensor([[1.0, 1.0], [1.0, -1.0]]), torch.tensor([[1.0, -1.0], [-1.0, -1.0]])
        return torch.kron(_conference(order // 2 - 1), whole) + torch.kron(torch.eye(order // 2), half)
    raise ValueError(f"order {order} has no Paley construction here: {order - 1} or {order / 2 - 1:g} must be a prime")


def _skew(order: int) -> bool:
    return order % 4 == 0 and _prime(order - 1)


def _symmetric(order: int) -> bool:
    return order % 8 == 4 and _prime(order // 2 - 1)


def _prime(q: int) -> bool:
    return q > 1 and all(q % divisor for divisor in range(2, int(q**0.5) + 1))


def _conference(q: int) -> Tensor:
    """(q + 1, q + 1) of 0 on the diagonal and +1 and -1 elsewhere, C C^T = q I; skew where a prime q leaves 3 modulo 4,
    symmetric where it leaves 1.
    """
    squares = {number * number % q for number in range(1, q)}
    character = torch.tensor([0.0] + [1.0 if number in squares else -1.0 for number in range(1, q)])
    difference = (torch.arange(q)[:, None] - torch.arange(q)) % q
    matrix = F.pad(character[difference], (1, 0, 1, 0))
    matrix[0, 1:], matrix[1:, 0] = 1, -1 if q % 4 == 3 else 1
    return matrix


def factors(width: int) -> tuple[int, int]:
    """(m, p) with width = m p, p a power of two and m the least order of a Hadamard matrix. Raises ValueError."""
    odd = width // (width & -width)
    for m in (odd, 4 * odd, 8 * odd):
        if width % m == 0 and (m == 1 or _skew(m) or _symmetric(m)):
            return m, width // m
    raise ValueError(
        f"width {width} has no Hadamard matrix here: {odd} times 4 or 8 must be one more than a prime, or twice that"
    )


def rotate(x: Tensor) -> Tensor:
    """x Q over the last dimension, in x's dtype; the arithmetic is float32, or float64 for float64."""
    rows = x.reshape(-1, x.shape[-1])
    y = torch.empty(rows.shape, dtype=x.dtype, device=x.device)
    step = max(1, _CHUNK // x.shape[-1])
    for at in range(0, len(rows), step):
        y[at : at + step] = _rotated(rows[at : at + step])
    return y.view(x.shape)


def _rotated(x: Tensor) -> Tensor:
    width = x.shape[-1]
    m, p = factors(width)
    x = wide(x)
    x = walsh_hadamard(x * _signs(width).to(x), p).view(-1, m, p)
    if m > 1:
        y = torch.zeros_like(x)
        for column, signs in enumerate(hadamard(m).T.tolist()):
            for row, sign in enumerate(signs):
                y[:, column].add_(x[:, row], alpha=sign)
        x = y
    return x.reshape(-1, width) * width**-0.5


def wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _signs(width: int) -> Tensor:
    """+1 and -1 without a pattern: one bit of a multiplicative hash of the channel."""
    return 1.0 - 2.0 * ((torch.arange(width) * 2654435761) >> 16 & 1)


class RotatedEmbedding(nn.Embedding):
    """A table E' = E Q, which is the logits matrix as well; `mix` (D, D) is what then stands between."""

    def __init__(self, rows: int, width: int) -> None:
        factors(width)  # refuses a width that has no rotation
        super().__init__(rows, width, _weight=torch.empty(rows, width))  # to draw it torch would load its compiler
        self.mix = nn.Parameter(torch.empty(width, width))

    def logits(self, x: Tensor) -> Tensor:
        return linear(linear(x, self.mix), self.weight)


class Folding:
    """What the rotation makes of a checkpoint's tensors, by name."""

    def __init__(self, rotation: Rotation, modules: list[str]) -> None:
        """`modules`: the names of all modules. Raises ValueError for a name of the rotation that is none of them."""
        writers = [name for pattern in rotation.writers for name in expand(pattern, modules)]
        pairs = [
            pair
            for norms, linears in rotation.readers
            for pair in zip(expand(norms, modules), expand(linears, modules), strict=True)
        ]
        self.last = f"{rotation.last}.weight"
        self.rows = {f"{rotation.table}.weight", *rotation.rows}
        self.taps = {f"{name}.weight" for pattern in rotation.taps for name in expand(pattern, modules)}
        self.mix = f"{rotation.table}.mix"
        self.written = {f"{name}.{kind}" for name in writers for kind in ("weight", "bias")}
        self.gains = {f"{reader}.weight": f"{norm}.weight" for norm, reader in pairs}
        self.norms = {*self.gains.values(), self.last}

    def changes(self, name: str) -> bool:
        return any(name in names for names in (self.rows, self.taps, self.written, self.gains, self.norms))

    def __call__(self, name: str, tensor: Tensor, gains: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tensors that a stored one becomes; float32 where they changed, and not rounded yet.

        `gains`: the stored weights of `norms`.
        """
        if name in self.rows:
            return {name: rotate(tensor)}
        if name in self.taps:
            return {name: rotate(wide(tensor).unflatten(1, (-1, len(gains[self.last])))).flatten(1)}
        if name in self.written:
            return {name: rotate(wide(tensor).T).T if tensor.dim() == 2 else rotate(wide(tensor))}
        if name in self.gains:
            return {name: rotate(wide(tensor) * wide(gains[self.gains[name]].to(tensor.device)))}
        made = {name: torch.ones_like(tensor) if name in self.norms else tensor}
        return made | ({self.mix: rotate(rotate(wide(tensor).diag()).T).T} if name == self.last else {})
