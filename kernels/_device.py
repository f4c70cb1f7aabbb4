"""Functions that several kernels share, for use inside `@triton.jit` functions."""

from ._op import tl, triton


@triton.jit
def round_to_int(x):
    """To the nearest whole number, halves away from zero; Triton's own casts cut off."""
    return tl.where(x >= 0, tl.floor(x + 0.5), tl.ceil(x - 0.5))


@triton.jit
def row_scale(largest):
    """What one step of int8 is worth in a row whose largest magnitude this is; never zero."""
    return tl.maximum(largest, 1e-12) / 127.0


@triton.jit
def to_int8(row, scale):
    return round_to_int(row / scale).to(tl.int8)


@triton.jit
def rounded_to_int8(x):
    """x float32 from -127 to 127, halves to even: one addition leaves the whole number in the lowest bits."""
    return (x + 12582912.0).to(tl.int32, bitcast=True).to(tl.int8)  # 1.5 * 2**23


@triton.jit
def to_half(x):
    """float32 as float16; what is too large for it becomes its largest number, and what is no number stays none."""
    return tl.clamp(x, -65504.0, 65504.0, propagate_nan=tl.PropagateNan.ALL).to(tl.float16)


@triton.jit
def quantise_row(row, mask):
    """(whole numbers from -127 to 127 as int8, their scale) of one row (BLOCK) float32: row ~ whole * scale."""
    scale = row_scale(tl.max(tl.where(mask, tl.abs(row), 0.0), axis=0))
    return to_int8(row, scale), scale


@triton.jit
def activate(x, GELU: tl.constexpr, GELU_TANH: tl.constexpr, SILU: tl.constexpr):
    """x float32, through at most one of these."""
    if GELU:
        x = 0.5 * x * (1.0 + tl.math.erf(x * 0.7071067811865476))
    if GELU_TANH:  # (1 + tanh u) / 2 = sigmoid(2 u)
        x = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    if SILU:
        x = x * tl.sigmoid(x)
    return x


@triton.jit
def walsh_hadamard_rows(x, COLUMNS: tl.constexpr):
    """Rows of x (rows, COLUMNS) times Sylvester's matrix of +1 and -1, as quantise.py's `walsh_hadamard`."""
    ROWS: tl.constexpr = x.shape[0]
    for stage in tl.static_range(COLUMNS.bit_length() - 1):
        pairs = tl.permute(tl.reshape(x, (ROWS, COLUMNS // 2 // 2**stage, 2, 2**stage)), (0, 1, 3, 2))
        low, high = tl.split(pairs)
        x = tl.reshape(tl.permute(tl.join(low + high, low - high), (0, 1, 3, 2)), (ROWS, COLUMNS))
    return x


@triton.jit
def moments(row_ptr, K: tl.constexpr, BLOCK_M: tl.constexpr, STAT: tl.constexpr):
    """Mean and variance of rows of K values, each (BLOCK_M) float32, in one pass; all of row_ptr can be read.

    Sums are of what is above the mean of the first STAT values: where a mean is large, squares of the values themselves
    would have no digits left for the variance.
    """
    FIRST: tl.constexpr = min(K, STAT)
    near = tl.sum(_above(row_ptr, 0, tl.zeros((BLOCK_M,), tl.float32), K, STAT), axis=1) / FIRST
    total = tl.zeros((BLOCK_M, STAT), tl.float32)
    squares = tl.zeros((BLOCK_M, STAT), tl.float32)
    for start in tl.range(0, K, STAT, loop_unroll_factor=2):
        x = _above(row_ptr, start, near, K, STAT)
        total += x
        squares += x * x
    more = tl.sum(total, axis=1) / K
    return near + more, tl.maximum(tl.sum(squares, axis=1) / K - more * more, 0.0)


@triton.jit
def _above(row_ptr, start, near, K: tl.constexpr, STAT: tl.constexpr):
    """x - near of columns start ..., (rows, STAT); 0 beyond the last."""
    col = start + tl.arange(0, STAT)
    if K % STAT:
        x = tl.load(row_ptr[:, None] + col[None, :], mask=(col < K)[None, :], other=0.0).to(tl.float32)
        x = tl.where((col < K)[None, :], x - near[:, None], 0.0)
    else:
        x = tl.load(row_ptr[:, None] + col[None, :]).to(tl.float32) - near[:, None]
    return x


@triton.jit
def philox(k0, k1, c0, c1, c2, c3):
    """Philox 4x32-10 as in kernels/philox.py, on uint32: four random words for a key and a counter."""
    for _ in tl.static_range(10):
        high0, low0 = tl.umulhi(c0, 0xD2511F53), c0 * 0xD2511F53
        high1, low1 = tl.umulhi(c2, 0xCD9E8D57), c2 * 0xCD9E8D57
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = k0 + 0x9E3779B9, k1 + 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def uniform(word):
    """A uint32 word to float32 in (0, 1]."""
    return word.to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10  # 2**-32, 2**-33


@triton.jit
def normal(k0, k1, position, channel, step, stream, CHANNELS: tl.constexpr):
    """Standard normals, one for each channel of a position; float32, arguments int64 and broadcast together.

    Four channels share a counter; each computes it for itself, which costs less than passing words around.
    """
    element = position * ((CHANNELS + 3) // 4) + channel // 4
    zero = tl.zeros_like(element)
    step, stream = (zero + step).to(tl.uint32), (zero + stream).to(tl.uint32)
    k0, k1 = (zero + k0).to(tl.uint32), (zero + k1).to(tl.uint32)
    w0, w1, w2, w3 = philox(k0, k1, element.to(tl.uint32), step, stream, zero.to(tl.uint32))
    front = channel % 4 < 2
    radius = tl.sqrt_rn(-2.0 * tl.log(uniform(tl.where(front, w0, w2))))
    cos, sin = cos_sin(6.283185307179586 * uniform(tl.where(front, w1, w3)))
    return radius * tl.where(channel % 2 == 0, cos, sin)


@triton.jit
def cos_sin(angle):
    """Of float32 angles from 0 to 1e5, both to 1e-7 (2e-6 beyond 3e4).

    Triton's own carry a path for any angle, which is most of a kernel's code, and share nothing.
    """
    k = tl.floor(angle * 0.6366197723675814 + 0.5)
    # Minus k pi / 2, in parts so short that their products with k are exact.
    x = angle - k * 1.5703125 - k * 0.00048351287841796875 - k * 3.1385570764541626e-07 - k * 6.07710062827671e-11
    z = x * x
    sin = ((2.71502608e-06 * z - 0.000198389273) * z + 0.00833332818) * z - 0.166666672
    cos = (2.44285529e-05 * z - 0.00138872792) * z + 0.0416666456  # least squares over +-pi / 4
    sin, cos = sin * z * x + x, cos * z * z - 0.5 * z + 1.0
    quarter = k.to(tl.int32) & 3
    odd = (quarter & 1) == 1
    cos, sin = tl.where(odd, sin, cos), tl.where(odd, cos, sin)
    return tl.where((quarter == 1) | (quarter == 2), -cos, cos), tl.where(quarter >= 2, -sin, sin)
