"""From clean latents back to the noise that deterministic sampling draws them from.

Subscript s is the row a step leaves, t the noisier row it reaches: the reverse of samplers.py.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from ldm.types import Denoise, Grid


def invert(denoise: Denoise, latents: Tensor, grid: Grid, refinements: int = 0) -> Tensor:
    """The noise from whose `prior` ddim (eta = 0) on the same grid draws `latents` again.

    DDIM inversion (appendix F of 2105.05233), with each step solved for the x_t that ddim's step takes to
    x_s: a first guess by the estimates of the level before, then 1 + `refinements` fixed-point iterations
    (2312.12540), each a call of the network. Guide little or not at all: a strong scale is no contraction.
    """
    if refinements < 0:
        raise ValueError(f"refinements={refinements} is below 0")
    x, clean, noise = latents, latents, torch.zeros_like(latents)
    for s, t in pairwise(grid[::-1]):
        # One equation in two forms; where noise prevails the clean estimate moves less with x, and at
        # alpha_t = 0 the noise estimate says nothing.
        by_clean = s.sigma > s.alpha or t.alpha == 0
        if by_clean and s.sigma == 0:
            raise ValueError("one step from alpha = 0 to clean latents cannot be inverted; take more")
        start = x
        for k in range(refinements + 2):
            if k > 0:
                clean = denoise(x, t)
                noise = (x - t.alpha * clean) / t.sigma
            if by_clean:
                ratio = t.sigma / s.sigma
                x = ratio * start + (t.alpha - s.alpha * ratio) * clean
            else:
                ratio = t.alpha / s.alpha
                x = ratio * start + (t.sigma - s.sigma * ratio) * noise
    return x / grid[0].sigma
