"""Inpainting with any checkpoint: what is known is kept by what samplers are told, not by a special network.

b batch, c channels, h w latent size.
"""

from __future__ import annotations

from torch import Tensor

from ldm.types import Denoise


def keep_known(denoise: Denoise, latents: Tensor, mask: Tensor) -> Denoise:
    """`denoise` with its clean estimate replaced by `latents` where the mask is 0.

    latents [b c h w] are clean; mask float [b or 1, 1, h, w], 1 where to draw anew, 0 where to keep, between
    them a blend. Every sampler is a combination of clean estimates, so the known part stays at
    alpha * latents + sigma * noise of each row and ends as `latents`, histories of multistep samplers
    included, without a further call. RePaint (2201.09865) instead overwrites x at each step, which breaks
    those histories. Start from prior(noise, grid, (1 - mask) * latents): the first row may have alpha > 0.
    """
    if mask.shape[0] not in (1, len(latents)) or mask.shape[1:] != (1, *latents.shape[2:]):
        raise ValueError(f"mask {list(mask.shape)} does not fit latents {list(latents.shape)}")
    known = (1 - mask) * latents
    return lambda x, row: mask * denoise(x, row) + known
