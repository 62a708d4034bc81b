"""Samplers: plain functions (denoise, x, grid, *, noise, callback, **options) -> latents.

They see a clean estimate D(x, row) and the floats of the grid's rows, know neither network nor process, and
never ask the device for a number. x is the state at the first row, alpha * latents + sigma * noise (`prior`);
`noise(i)` is the fresh noise of step i; `callback(i, denoised)` runs after step i, whose clean estimate it
gets. Subscript t is the row a step leaves, s the row it reaches. alpha_t = 0 and sigma_s = 0 need no special
grid.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

from torch import Tensor

from ldm.types import Denoise, Grid, GridRow, NoiseSource

Callback = Callable[[int, Tensor], None]


def prior(noise: Tensor, grid: Grid, latents: Tensor | None = None) -> Tensor:
    """Where sampling starts: sigma * noise of the first row; with latents (image to image) on top of alpha *
    latents.
    """
    start = grid[0].sigma * noise
    return start if latents is None else start + grid[0].alpha * latents


def truncate(grid: Grid, strength: float) -> Grid:
    """The last round(strength * N) steps of a grid of N, at least one, for image to image: 1 keeps all."""
    if not 0 < strength <= 1:
        raise ValueError(f"strength={strength} is not above 0 and at most 1")
    steps = max(1, math.floor(strength * (len(grid) - 1) + 0.5))
    return grid[-(steps + 1) :]


def ddim(
    denoise: Denoise,
    x: Tensor,
    grid: Grid,
    *,
    noise: NoiseSource,
    callback: Callback | None = None,
    eta: float = 0.0,
) -> Tensor:
    """DDIM (equation 12 of 2010.02502) in the form that serves every process.

    eta = 0 is DDIM, and Euler's step in sigma / alpha or along a rectified flow; eta = 1 is ddpm's ancestral
    step (with the posterior's variance, "fixed small"), and euler_ancestral in sigma / alpha.
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta={eta} is not within 0 and 1")
    for i, (t, s) in enumerate(pairwise(grid)):
        denoised = denoise(x, t)
        rho = t.alpha * s.sigma / (s.alpha * t.sigma)
        up = eta * s.sigma * math.sqrt(max(0.0, 1 - rho**2))
        down = math.sqrt(s.sigma**2 - up**2)
        x = s.alpha * denoised + down * _noise_estimate(x, denoised, t)
        if up > 0:
            x = x + up * noise(i)
        if callback is not None:
            callback(i, denoised)
    return x


def heun(
    denoise: Denoise, x: Tensor, grid: Grid, *, noise: NoiseSource, callback: Callback | None = None
) -> Tensor:
    """Heun's second-order step (algorithm 1 of 2206.00364); two estimates a step but for the last."""
    for i, (t, s) in enumerate(pairwise(grid)):
        denoised = denoise(x, t)
        eps = _noise_estimate(x, denoised, t)
        ahead = s.alpha * denoised + s.sigma * eps
        if s.sigma > 0:
            corrected = denoise(ahead, s)
            eps_ahead = _noise_estimate(ahead, corrected, s)
            drift = (s.alpha - t.alpha) / 2 * (denoised + corrected)
            ahead = x + drift + (s.sigma - t.sigma) / 2 * (eps + eps_ahead)
        x = ahead
        if callback is not None:
            callback(i, denoised)
    return x


def dpmpp_2m(
    denoise: Denoise, x: Tensor, grid: Grid, *, noise: NoiseSource, callback: Callback | None = None
) -> Tensor:
    """DPM-Solver++(2M) (algorithm 2 of 2211.01095): second order with one estimate a step.

    Steps whose width in log-SNR is infinite, or that follow such a one, are of first order.
    """
    last, h_last = None, math.inf
    for i, (t, s) in enumerate(pairwise(grid)):
        denoised = denoise(x, t)
        h = _half_log_snr(s) - _half_log_snr(t)
        extrapolated = denoised
        if last is not None and math.isfinite(h) and math.isfinite(h_last):
            c = h / (2 * h_last)
            extrapolated = (1 + c) * denoised - c * last
        ratio = s.sigma / t.sigma
        x = ratio * x + (s.alpha - t.alpha * ratio) * extrapolated
        last, h_last = denoised, h
        if callback is not None:
            callback(i, denoised)
    return x


def _noise_estimate(x: Tensor, denoised: Tensor, row: GridRow) -> Tensor:
    return (x - row.alpha * denoised) / row.sigma


def _half_log_snr(row: GridRow) -> float:
    """log(alpha / sigma), infinite at the ends of a process."""
    if row.alpha == 0 or row.sigma == 0:
        return -math.inf if row.alpha == 0 else math.inf
    return math.log(row.alpha / row.sigma)
