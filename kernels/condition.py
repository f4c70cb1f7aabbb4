"""What a chunk of the diffusion head's denoising steps begins with: y = silu(t_i + c) for its timesteps i.

Every modulation of the head depends on y alone, and not on the state, so those of several steps are made at once.
The index of the step is read from device memory, so that a captured chunk of steps can be replayed; its counterpart is
kernels/head_step.py. Called by `models/unipic/head.py`. Letters: T steps of the table, M rows, W head width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ._device import activate
from ._op import Case, Cost, Operator, cdiv, launch, next_power_of_2, random_tensor, tl, triton, unit_rows


def condition_ref(embedded: Tensor, c: Tensor, clock: Tensor, steps: int) -> Tensor:
    """In the tensors' dtype. What the operator takes is said at `condition`."""
    index = clock[0] - torch.arange(steps, device=clock.device)
    clock[1:2] = clock[:1]
    return F.silu(embedded[index][:, None] + c)


@triton.jit(do_not_specialize=["rows"])
def _condition_kernel(
    embedded_ptr,  # (T, W) contiguous
    c_ptr,  # (M, W), rows c_stride apart
    clock_ptr,  # (3) int64
    y_ptr,  # (steps, M, W) contiguous
    c_stride,
    rows,  # M
    W: tl.constexpr,
    BLOCK: tl.constexpr,
):
    out = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    first = tl.load(clock_ptr)
    index, row = first - out // rows, out % rows
    t = tl.load(embedded_ptr + index * W + at, mask=at < W, other=0.0).to(tl.float32)
    c = tl.load(c_ptr + row * c_stride + at, mask=at < W, other=0.0).to(tl.float32)
    y = activate(t + c, False, False, True)
    tl.store(y_ptr + out * W + at, y.to(y_ptr.dtype.element_ty), mask=at < W)
    if out + tl.program_id(1) == 0:  # nobody reads this cell here
        tl.store(clock_ptr + 1, first)


def _condition_triton(embedded: Tensor, c: Tensor, clock: Tensor, steps: int) -> Tensor:
    c, (rows, width) = unit_rows(c), c.shape
    y = c.new_empty(steps, rows, width)
    block = min(1024, next_power_of_2(width))
    launch(
        _condition_kernel,
        (steps * rows, cdiv(width, block)),
        embedded.contiguous(),
        c,
        clock,
        y,
        c.stride(0),
        rows,
        W=width,
        BLOCK=block,
        num_warps=4,
    )
    return y


def condition_cost(embedded, c, clock, steps) -> Cost:
    return Cost(5 * steps * c.numel(), c.element_size() * ((steps + 1) * c.numel() + steps * c.shape[1]))


_condition = Operator(
    "condition(Tensor embedded, Tensor c, Tensor(a!) clock, int steps) -> Tensor",
    torch=condition_ref,
    triton=_condition_triton,
    cost=condition_cost,
)


def condition(embedded: Tensor, c: Tensor, clock: Tensor, steps: int) -> Tensor:
    """silu(t + c) for the `steps` timesteps from index clock[0] downwards: (steps, M, W). Begins them in the clock.

    embedded (T, W) of all timesteps, c (M, W), clock (3) int64 as `head_step` has it.
    """
    return _condition(embedded, c, clock, steps)


def condition_cases() -> list[Case]:
    def make(rows: int, width: int, steps: int, dtype: torch.dtype = torch.bfloat16):
        def arguments(device):
            how = {"dtype": dtype, "device": device}
            clock = torch.tensor([steps, 0, steps]).to(device)
            return random_tensor(steps + 2, width, **how), random_tensor(rows, width, **how), clock, steps

        return arguments

    return [
        Case("400 tokens with guidance, a chunk of 5", make(800, 1536, 5), "aot gpu"),
        Case("a step, two programs a row", make(3, 1536, 1)),
        Case("a chunk, odd width, float32", make(2, 37, 3, torch.float32)),
        Case("one row", make(1, 16, 2)),
    ]
