"""Classifier-free guidance (2207.12598), with the rescale of 2305.08891 and the interval of 2404.07724."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ldm.diffusion.denoiser import Denoiser
from ldm.types import Conditioning, Denoise, GridRow


def guided(
    denoiser: Denoiser,
    conditioning: Conditioning,
    null: Conditioning | None,
    scale: float,
    rescale: float = 0.0,
    interval: tuple[float, float] = (0.0, math.inf),
) -> Denoise:
    """The clean estimate of an output pushed from `null` (or a negative prompt) through `conditioning`.

    One forward of twice the batch, [conditioning, null]; at scale 1 one of the batch itself, and `null` may
    be None. `rescale` in [0, 1] gives the network's guided output back the standard deviation, over c, h and
    w, of the conditional one; it acts on F, as published, and not on the clean estimate. Guidance acts at
    levels low < sigma / alpha <= high of `interval`, as published, which no grid or number of steps moves;
    elsewhere the conditional network is asked alone.
    """
    if not 0 <= rescale <= 1:
        raise ValueError(f"guidance rescale={rescale} is not within 0 and 1")
    low, high = interval
    if not 0 <= low < high:
        raise ValueError(f"guidance interval=({low}, {high}) is not 0 <= low < high")
    if scale == 1:
        return lambda x, row: denoiser.at_row(x, row, conditioning)
    if null is None:
        raise ValueError(f"guidance scale={scale} needs a null conditioning; only scale=1 does without")
    both = conditioning.cat(null)

    def denoise(x: Tensor, row: GridRow) -> Tensor:
        if not low < (row.sigma / row.alpha if row.alpha > 0 else math.inf) <= high:
            return denoiser.at_row(x, row, conditioning)
        conditional, unconditional = denoiser.output_at(torch.cat([x, x]), row, both).chunk(2)
        output = torch.lerp(unconditional, conditional, scale)
        if rescale > 0:
            tiny = torch.finfo(output.dtype).tiny  # an untrained network may say 0 everywhere
            ratio = _std(conditional) / _std(output).clamp(min=tiny)
            output = output * (rescale * ratio + (1 - rescale))
        return denoiser.noise_scheduler.clean_from_output(x, output, row.alpha, row.sigma)

    return denoise


def _std(x: Tensor) -> Tensor:
    return x.std(dim=tuple(range(1, x.ndim)), keepdim=True)
