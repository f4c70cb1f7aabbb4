"""Moving tokens between the visible set and the full grid, the data movement of masked autoregressive decoding.

    place_tokens    [x | base where nothing is visible] + position                  decoder input
    select_tokens   x[index];   add_positions   x + position[index]                 what the round predicts

Called by engine/models/unipic/mar.py and engine/layers/vit_block.py. Index plans are int64 raster positions
(0 .. n-1), one row a sequence, all rows equally long, made before the loop by engine/schedules.py; where x has R = k B
rows for B rows of index, these repeat. The first `buffer` rows of every sequence are the MAR buffer. D is the MAR
width, C a token's.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ._op import Case, Cost, Operator, cdiv, launch, random_tensor, row_share, tl, triton


def inverse_index(index: Tensor, n: int) -> Tensor:
    """Where each of n positions stands in index (B, V), -1 where it does not: (B, n). No host synchronisation."""
    rank = torch.arange(index.shape[1], device=index.device).expand_as(index)
    return torch.full((len(index), n), -1, device=index.device).scatter(1, index, rank)


def _for_rows(index: Tensor, rows: int) -> Tensor:
    return index if len(index) == rows else index.repeat(rows // len(index), 1)


def place_tokens_ref(x, visible, source, base, position) -> Tensor:
    """Decoder input, in the tensors' dtype; source is what the kernel reads instead of visible."""
    rows, _, width = x.shape
    buffer, visible = x.shape[1] - visible.shape[1], _for_rows(visible, rows)
    full = base.expand(rows, position.shape[0], width).clone()
    full[:, :buffer] = x[:, :buffer]
    tokens = x[:, buffer:].to(full.dtype)  # under autocast, in training, x is bfloat16 and a mask token float32
    full = full.scatter(1, (visible + buffer)[..., None].expand(-1, -1, width), tokens)
    return full + position


def select_tokens_ref(x: Tensor, index: Tensor) -> Tensor:
    return x.gather(1, _for_rows(index, len(x))[..., None].expand(-1, -1, x.shape[-1]))


def add_positions_ref(x: Tensor, index: Tensor, position: Tensor) -> Tensor:
    return x + position[_for_rows(index, len(x))]


@triton.jit(do_not_specialize=["batch", "n", "seen", "buffer"])
def _place_kernel(
    x_ptr,  # (R, buffer + V, D) contiguous
    source_ptr,  # (B, n) contiguous
    base_ptr,  # (R, buffer + n, D), rows and positions at strides that may be 0
    position_ptr,  # (buffer + n, D) contiguous
    y_ptr,  # (R, buffer + n, D)
    batch,  # B
    n,
    seen,  # V
    buffer,
    base_row,
    base_position,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    out = tl.program_id(0).to(tl.int64)
    row, at = out // (buffer + n), out % (buffer + n)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    rank = tl.load(source_ptr + (row % batch) * n + at - buffer, mask=at >= buffer, other=0)
    if rank >= 0:  # so it is over the buffer, too
        x_at = (row * (buffer + seen) + tl.where(at < buffer, at, buffer + rank)) * D
        y = tl.load(x_ptr + x_at + col, mask=col < D, other=0.0).to(tl.float32)
    else:
        base_at = row * base_row + at * base_position
        y = tl.load(base_ptr + base_at + col, mask=col < D, other=0.0).to(tl.float32)
    y += tl.load(position_ptr + at * D + col, mask=col < D, other=0.0).to(tl.float32)
    tl.store(y_ptr + out * D + col, y.to(y_ptr.dtype.element_ty), mask=col < D)


@triton.jit(do_not_specialize=["batch", "count"])
def _rows_kernel(
    x_ptr,  # (R, n or N, D), rows and tokens at strides
    index_ptr,  # (B, N) contiguous
    position_ptr,  # (n, D) contiguous
    y_ptr,  # (R, N, D) contiguous
    batch,  # B
    count,  # N
    x_row,
    x_token,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    GATHER: tl.constexpr,  # x[index], else x + position[index]
):
    out = tl.program_id(0).to(tl.int64)
    row, token = out // count, out % count
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    at = tl.load(index_ptr + (row % batch) * count + token)
    if GATHER:
        y = tl.load(x_ptr + row * x_row + at * x_token + col, mask=col < D, other=0.0)
    else:
        y = tl.load(x_ptr + row * x_row + token * x_token + col, mask=col < D, other=0.0).to(tl.float32)
        y += tl.load(position_ptr + at * D + col, mask=col < D, other=0.0).to(tl.float32)
    tl.store(y_ptr + out * D + col, y.to(y_ptr.dtype.element_ty), mask=col < D)


def _place_triton(x, visible, source, base, position):
    (rows, length, width), total = x.shape, len(position)
    buffer, n = length - visible.shape[1], total - length + visible.shape[1]
    source = inverse_index(visible, n) if source is None else source.contiguous()
    y, share = x.new_empty(rows, total, width), row_share(width)
    base = (base if base.stride(-1) == 1 else base.contiguous()).expand(rows, total, width)
    launch(
        _place_kernel,
        (rows * total, cdiv(width, share["BLOCK"])),
        x.contiguous(),
        source,
        base,
        position.contiguous(),
        y,
        len(source),
        n,
        visible.shape[1],
        buffer,
        base.stride(0),
        base.stride(1),
        **share,
    )
    return y


def _rows(x: Tensor, index: Tensor, position: Tensor | None) -> Tensor:
    (rows, _, width), count = x.shape, index.shape[1]
    x = x if x.stride(-1) == 1 else x.contiguous()
    y, share = x.new_empty(rows, count, width), row_share(width)
    launch(
        _rows_kernel,
        (rows * count, cdiv(width, share["BLOCK"])),
        x,
        index.contiguous(),
        x if position is None else position.contiguous(),
        y,
        len(index),
        count,
        x.stride(0),
        x.stride(1),
        **share,
        GATHER=position is None,
    )
    return y


def _select_triton(x, index):
    return _rows(x, index, None)


def place_tokens_cost(x, visible, source, base, position) -> Cost:
    rows, total, width = len(x), *position.shape
    hidden = (total - x.shape[1]) * rows  # rows that the base fills
    read = x.numel() + position.numel() + (hidden * width if base.shape[1] > 1 else base.numel())
    return Cost(rows * total * width, (read + rows * total * width) * x.element_size() + 8 * visible.numel())


def select_tokens_cost(x, index) -> Cost:
    moved = 2 * len(x) * index.shape[1] * x.shape[-1] * x.element_size()
    return Cost(0, moved + 8 * index.numel())


def add_positions_cost(x, index, position) -> Cost:
    return Cost(x.numel(), 3 * x.numel() * x.element_size() + 8 * index.numel())


_place = Operator(
    "place_tokens(Tensor x, Tensor visible, Tensor? source, Tensor base, Tensor position) -> Tensor",
    torch=place_tokens_ref,
    triton=_place_triton,
    cost=place_tokens_cost,
)
_select = Operator(
    "select_tokens(Tensor x, Tensor index) -> Tensor",
    torch=select_tokens_ref,
    triton=_select_triton,
    cost=select_tokens_cost,
)
_add_positions = Operator(
    "add_positions(Tensor x, Tensor index, Tensor position) -> Tensor",
    torch=add_positions_ref,
    triton=_rows,
    cost=add_positions_cost,
)


def select_tokens(x: Tensor, index: Tensor) -> Tensor:
    """Rows of x (R, n, D) at index (B, N): (R, N, D)."""
    return _select(x, index)


def add_positions(x: Tensor, index: Tensor, position: Tensor) -> Tensor:
    """x (R, N, D) + position (n, D) at index (B, N)."""
    return _add_positions(x, index, position)


def place_tokens(x: Tensor, visible: Tensor, base: Tensor, position: Tensor, source: Tensor | None = None) -> Tensor:
    """Decoder input: base everywhere, x over the buffer and the visible positions, plus position.

    x (R, buffer + V, D), visible (B, V), base (1, buffer + n, D) or broadcastable, position (buffer + n, D), and
    source (B, n) = inverse_index(visible, n), computed here where it is not given. Returns (R, buffer + n, D).
    """
    return _place(x, visible, source, base, position)


def grid_positions(table: Tensor, buffer: int, rows: int, columns: int) -> Tensor:
    """A learned position table (1, buffer + g*g, D) resized to a rows x columns grid: (buffer + rows*columns, D).

    Bilinear, half-pixel centres, no antialias, in the table's dtype; buffer rows and the native grid stay as they are.
    """
    front, grid = table[0, :buffer], table[0, buffer:]
    side = round(grid.shape[0] ** 0.5)
    if (rows, columns) != (side, side):
        image = grid.view(1, side, side, -1).permute(0, 3, 1, 2)  # (1, D, g, g)
        image = F.interpolate(image, size=(rows, columns), mode="bilinear", align_corners=False)
        grid = image.permute(0, 2, 3, 1).reshape(rows * columns, -1)
    return torch.cat([front, grid])


def _plan(batch: int, n: int, count: int) -> Tensor:
    noise = torch.Generator().manual_seed(n + count)
    return torch.rand(batch, n, generator=noise).argsort(1)[:, :count].sort(1).values


def place_tokens_cases() -> list[Case]:
    def make(rows, batch, n, seen, buffer, width, dtype=torch.float32, mask: bool = True):
        def arguments(device):
            how = {"dtype": dtype, "device": device}
            visible = _plan(batch, n, seen).to(device)
            base = random_tensor(1, 1 if mask else buffer + n, width, **how)
            x, position = random_tensor(rows, buffer + seen, width, **how), random_tensor(buffer + n, width, **how)
            return x, visible, inverse_index(visible, n) if mask else None, base, position

        return arguments

    half = torch.bfloat16
    return [
        Case("MAR decoder at 1024", make(2, 1, 4096, 2000, 64, 1280, half), "aot gpu"),
        Case("an edit, base from the source", make(2, 1, 4096, 2000, 64, 1280, half, mask=False), "aot gpu"),
        Case("two guidance halves, two programs a row", make(4, 2, 7, 3, 2, 1280, half)),
        Case("odd width, base of its own", make(2, 1, 9, 4, 3, 37, mask=False)),
        Case("nothing visible", make(1, 1, 5, 0, 2, 32)),
        Case("everything visible, no buffer", make(1, 1, 5, 5, 0, 32)),
    ]


def select_tokens_cases() -> list[Case]:
    def make(rows, batch, n, count, width, dtype=torch.float32, spread: int = 1):
        def arguments(device):
            x = random_tensor(rows, n, spread * width, dtype=dtype, device=device)[..., :width]
            return x, _plan(batch, n, count).to(device)

        return arguments

    half = torch.bfloat16
    return [
        Case("last decoder block", make(2, 2, 4160, 400, 1280, half), "aot gpu"),
        Case("two guidance halves, rows apart", make(4, 2, 9, 3, 1280, half, spread=2)),
        Case("latent tokens", make(1, 1, 9, 5, 16)),
        Case("one row of odd width", make(1, 1, 3, 1, 37)),
        Case("no rows", make(2, 1, 3, 0, 16)),
    ]


def add_positions_cases() -> list[Case]:
    def add(rows, batch, n, count, width, dtype=torch.float32):
        def arguments(device):
            how = {"dtype": dtype, "device": device}
            z, position = random_tensor(rows, count, width, **how), random_tensor(n, width, **how)
            return z, _plan(batch, n, count).to(device), position

        return arguments

    half = torch.bfloat16
    return [
        Case("conditions of a round", add(2, 1, 4096, 400, 1280, half), "aot gpu"),
        Case("two guidance halves", add(4, 2, 9, 3, 1280, half)),
        Case("one row of odd width", add(1, 1, 3, 1, 37)),
        Case("no rows", add(2, 1, 3, 0, 16)),
    ]
