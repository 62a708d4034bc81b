"""Encode and decode large pictures in overlapping tiles: the memory of one tile instead of that of a picture.

Group norm and attention see one tile at a time, so tiles differ a little in tone; blending them linearly
where they overlap turns the step between them into a ramp. A picture that fits one tile gives the untiled
result, bit for bit. b batch, c channels, H W size of what is cut.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

import torch
from torch import Tensor

from ldm.types import Autoencoder


def tiled_encode(
    autoencoder: Autoencoder, images: Tensor, tile: int = 512, overlap: int = 64, noise: Tensor | None = None
) -> Tensor:
    """`autoencoder.encode(images, noise)` in tiles: the moments are blended, then sampled once.

    tile, overlap: pixels a side, multiples of the autoencoder's factor; overlap at most half a tile.
    """
    factor = autoencoder.factor
    for name, size in (("tile", tile), ("overlap", overlap), *(("image size", s) for s in images.shape[2:])):
        if size % factor:
            raise ValueError(f"{name} {size} is not a multiple of the autoencoder's factor {factor}")
    return autoencoder.latents(tiled(autoencoder.moments, images, tile, overlap, Fraction(1, factor)), noise)


def tiled_decode(autoencoder: Autoencoder, latents: Tensor, tile: int = 512, overlap: int = 64) -> Tensor:
    """`autoencoder.decode(latents)` in tiles; tile and overlap in pixels, as in `tiled_encode`."""
    factor = autoencoder.factor
    for name, size in (("tile", tile), ("overlap", overlap)):
        if size % factor:
            raise ValueError(f"{name} {size} is not a multiple of the autoencoder's factor {factor}")
    return tiled(autoencoder.decode, latents, tile // factor, overlap // factor, Fraction(factor))


def tiled(
    function: Callable[[Tensor], Tensor], x: Tensor, tile: int, overlap: int, scale: Fraction
) -> Tensor:
    """`function` of tiles of [b c H W], blended to [b c' H*scale W*scale] of the type that it returns.

    Tiles are `tile` - `overlap` apart, and the last ends where x ends. Weights and sums are in float32.
    """
    if not 0 <= overlap <= tile // 2:
        raise ValueError(f"overlap {overlap} must be from 0 to half of tile {tile}")
    rows, columns = (spans(size, tile, overlap, scale) for size in x.shape[2:])
    if len(rows) == len(columns) == 1:
        return function(x)
    total: Tensor | None = None
    for source_y, target_y, weight_y in rows:
        for source_x, target_x, weight_x in columns:
            part = function(x[:, :, source_y, source_x])
            exact = torch.promote_types(part.dtype, torch.float32)
            if total is None:
                size = [int(side * scale) for side in x.shape[2:]]
                total = part.new_zeros(*part.shape[:2], *size, dtype=exact)
            weight = (weight_y[:, None] * weight_x).to(total)
            total[:, :, target_y, target_x] += part.to(exact) * weight
    assert total is not None
    return total.to(part.dtype)


def spans(size: int, tile: int, overlap: int, scale: Fraction) -> list[tuple[slice, slice, Tensor]]:
    """Tiles along one side: (slice of x, slice of the result, float64 weights there); weights add up to 1."""
    starts = [*range(0, size - tile, tile - overlap), max(size - tile, 0)]
    targets = [slice(int(start * scale), int(min(start + tile, size) * scale)) for start in starts]
    places = torch.arange(int(size * scale), dtype=torch.float64) + 0.5
    slope = max(float(overlap * scale), 1e-9)  # an overlap of 0 is a step
    weights = []
    for start, target in zip(starts, targets, strict=True):
        rise = (places - target.start) / slope if start else torch.ones_like(places)
        fall = (target.stop - places) / slope if start + tile < size else torch.ones_like(places)
        weights.append(torch.minimum(rise, fall).clamp(0, 1))
    shares = torch.stack(weights) / torch.stack(weights).sum(0)
    return [
        (slice(start, start + tile), target, share[target])
        for start, target, share in zip(starts, targets, shares, strict=True)
    ]
