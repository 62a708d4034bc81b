"""Tables of a noise schedule that Stable Diffusion's own files hold beside the networks: [T], float32.

Computed in float64 and rounded once, as by who wrote those files. Ho et al. 2020 (2006.11239), equations 4, 6
and 7; T steps, alpha_bar the variance that is left of the latents.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

ADDED = 8  # tables that tell how noise is added; the rest is for taking it away


def _alpha_bar(noise_scheduler: Any) -> Tensor:
    steps = torch.arange(noise_scheduler.num_train_timesteps, dtype=torch.float64, device="cpu")
    squared: Tensor = noise_scheduler.alpha(steps) ** 2
    return squared


def chain(noise_scheduler: Any) -> dict[str, Tensor]:
    """The twelve tables of latent diffusion, of a VariancePreserving scheduler; inf where alpha_bar is 0."""
    kept = _alpha_bar(noise_scheduler)
    before = torch.cat([torch.ones_like(kept[:1]), kept[:-1]])
    alphas = kept / before
    betas, noise = 1 - alphas, 1 - kept
    variance = betas * (1 - before) / noise
    tables = {
        "betas": betas,
        "alphas_cumprod": kept,
        "alphas_cumprod_prev": before,
        "sqrt_alphas_cumprod": kept.sqrt(),
        "sqrt_one_minus_alphas_cumprod": noise.sqrt(),
        "log_one_minus_alphas_cumprod": noise.log(),
        "sqrt_recip_alphas_cumprod": (1 / kept).sqrt(),
        "sqrt_recipm1_alphas_cumprod": (1 / kept - 1).sqrt(),
        "posterior_variance": variance,
        "posterior_log_variance_clipped": variance.clamp(min=1e-20).log(),
        "posterior_mean_coef1": betas * before.sqrt() / noise,
        "posterior_mean_coef2": (1 - before) * alphas.sqrt() / noise,
    }
    return {name: table.float() for name, table in tables.items()}


def added(noise_scheduler: Any) -> dict[str, Tensor]:
    """Those of `chain` that the noise of a small picture needs, in an upscaler."""
    return dict(list(chain(noise_scheduler).items())[:ADDED])


def sigmas(noise_scheduler: Any) -> Tensor:
    """sigma / alpha, rising, as of SDXL: its square is what is rounded first."""
    kept = _alpha_bar(noise_scheduler)
    return ((1 - kept) / kept).float() ** 0.5
