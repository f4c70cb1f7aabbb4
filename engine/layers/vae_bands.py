"""The VAE decoder in bands of rows: the same picture, with one map of full size in memory instead of five.

A map that is too large is read from top to bottom in bands. A 3x3 convolution keeps the last two rows of what it has
read, so nothing is computed twice at the seams, and its results come one row late. Because of that lag a residual
block can write its sum over its input: what it overwrites has been read by then.

A norm has to know the moments of a whole map before its first row. Those of the map inside a residual block take a
pass of their own, which computes it and forgets it: three convolutions instead of two. Upsampling and the last
convolution cost what they always did.

Letters: B images, C channels, h w the map's height and width, G groups. For inference only, as it writes in place.
"""

from collections.abc import Callable, Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels.linear import conv2d
from .vae import ResBlock, Upsample, VAEDecoder

BAND_BYTES = 8 * 2**20
WHOLE = 8  # a map of up to as many bands is not cut: there memory is not worth the third convolution
MIN_ROWS = 3  # the two convolutions of a block take a row each off the first band

Bands = Iterable[Tensor]  # (B, C, rows, w) from top to bottom, made one at a time; nobody may hold two


def decode_in_bands(decoder: VAEDecoder, latents: Tensor, band_bytes: int = BAND_BYTES) -> Tensor:
    """decoder(latents): (B, latent, h, w) to pixels (B, 3, s h, s w) with the stride s, about [-1, 1].

    band_bytes: the size of a band, of which about three live beside the last level's map and the one before it.
    """
    x = decoder.mid(decoder.conv_in(decoder.post_quant_conv(latents)))
    for level in reversed(decoder.up):
        for block in level.block:
            x = add_residual(block, x, band_bytes)
        if level.resize:
            x = upsample(level.upsample, x, band_bytes)
    return finish(decoder, x, band_bytes)


def add_residual(block: ResBlock, x: Tensor, band_bytes: int) -> Tensor:
    """block(x); if x is cut and the width stays, this is x with other values."""
    height, width = x.shape[2], block.conv1.out_channels
    rows = rows_of(x, max(1.0, width / x.shape[1]), band_bytes)
    if rows == height:
        return block(x)
    norm1 = normaliser(block.norm1, split(x, rows))

    def inner() -> Bands:
        return map(BandedConv(block.conv1, height), map(norm1, split(x, rows)))

    norm2 = normaliser(block.norm2, inner())
    out = x
    if width != x.shape[1]:
        out = x.new_empty(len(x), width, height, x.shape[3])
        write(out, map(block.nin_shortcut, split(x, rows)))
    return write(out, map(BandedConv(block.conv2, height), map(norm2, inner())), Tensor.add_)


def upsample(layer: Upsample, x: Tensor, band_bytes: int) -> Tensor:
    """layer(x), (B, C, h, w) to (B, C, 2h, 2w)."""
    batch, channels, height, width = x.shape
    rows = rows_of(x, 4.0, band_bytes)
    if rows == height:
        return layer(x)
    doubled = (F.interpolate(band, scale_factor=2.0, mode="nearest") for band in split(x, rows))
    out = x.new_empty(batch, channels, 2 * height, 2 * width)
    return write(out, map(BandedConv(layer.conv, 2 * height), doubled))


def finish(decoder: VAEDecoder, x: Tensor, band_bytes: int) -> Tensor:
    """The last norm and convolution, (B, C, h, w) to (B, 3, h, w)."""
    rows = rows_of(x, 1.0, band_bytes)
    norm = normaliser(decoder.norm_out, split(x, rows))
    out = x.new_empty(len(x), decoder.conv_out.out_channels, *x.shape[2:])
    return write(out, map(BandedConv(decoder.conv_out, x.shape[2]), map(norm, split(x, rows))))


class BandedConv:
    """A 3x3 convolution of a map of `height` rows, called with its bands in order; returns the rows that are known.

    The first band must have two rows, or be the map.
    """

    def __init__(self, conv: nn.Conv2d, height: int) -> None:
        self.conv, self.missing = conv, height
        self.kept: Tensor | None = None  # the two rows before the next band

    def __call__(self, band: Tensor) -> Tensor:
        self.missing -= band.shape[2]
        above = edge(band) if self.kept is None else self.kept
        x = torch.cat([above, band] if self.missing else [above, band, edge(band)], dim=2)
        self.kept = x[:, :, -2:].clone()  # not a view, which would keep all of x
        return conv2d(x, self.conv.weight, self.conv.bias, 1, (0, 1))


def edge(x: Tensor) -> Tensor:
    """The row of zeros that a convolution sees beyond its map."""
    return torch.zeros_like(x[:, :, :1])


def normaliser(norm: nn.GroupNorm, bands: Bands) -> Callable[[Tensor], Tensor]:
    """silu(norm(.)) for bands of the map that `bands` are all of.

    With its moments known, a group norm is a batch norm at inference, and that is one kernel in any dtype.
    """
    mean, var = (x.repeat_interleave(norm.num_channels // norm.num_groups, dim=1) for x in moments(norm, bands))
    weight, bias = (x.float().repeat(len(mean)) for x in (norm.weight, norm.bias))

    def normalise(band: Tensor) -> Tensor:
        flat = band.flatten(0, 1)[None]  # every channel of every image is a channel
        normed = F.batch_norm(flat, mean.flatten(), var.flatten(), weight, bias, eps=norm.eps)
        return F.silu(normed, inplace=True)[0].unflatten(0, band.shape[:2])

    return normalise


def moments(norm: nn.GroupNorm, bands: Bands) -> tuple[Tensor, Tensor]:
    """Mean and variance (B, G) in float32 of the groups of a map, by Chan's merging of those of its bands."""
    mean = var = norm.weight.new_zeros((), dtype=torch.float32)
    seen = 0
    for band in bands:
        seen += band.shape[2]
        share = band.shape[2] / seen
        values = band.float().unflatten(1, (norm.num_groups, -1))
        band_var, band_mean = torch.var_mean(values, dim=(2, 3, 4), correction=0)
        del band, values  # before the next one is made
        delta = band_mean - mean
        mean = mean.lerp(band_mean, share)
        var = var.lerp(band_var, share).addcmul(delta, delta, value=share * (1 - share))
    return mean, var


def rows_of(x: Tensor, growth: float, band_bytes: int) -> int:
    """Rows of x in a band, when what is made of a row has `growth` times its size."""
    height = x.shape[2]
    row_bytes = growth * x[:, :, :1].numel() * x.element_size()
    if height * row_bytes <= WHOLE * band_bytes:
        return height
    return min(height, max(MIN_ROWS, int(band_bytes / row_bytes)))


def split(x: Tensor, rows: int) -> Iterator[Tensor]:
    """Views."""
    return (x[:, :, row : row + rows] for row in range(0, x.shape[2], rows))


def write(out: Tensor, bands: Bands, how: Callable[[Tensor, Tensor], Tensor] = Tensor.copy_) -> Tensor:
    """out (B, C, h, w) once every band has been copied or added to its rows."""
    row = 0
    for band in bands:
        below = row + band.shape[2]
        how(out[:, :, row:below], band)
        row = below
        del band  # before the next one is made
    return out
