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

import torch
from torch import Tensor

from ldm.errors import InputError
from ldm.types import Denoise, Grid, GridRow, NoiseSource

Callback = Callable[[int, Tensor], None]
MOST_CHURN = math.sqrt(2) - 1  # a level is raised by no more than this share of itself
ADAMS_BASHFORTH = (
    (1.0,),
    (3 / 2, -1 / 2),
    (23 / 12, -16 / 12, 5 / 12),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)


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
    return Grid(grid[-(steps + 1) :], grid.row_of)


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
        kept = down / t.sigma  # of x_t; s.alpha * denoised + down * noise estimate, by two operations
        x = torch.add((s.alpha - kept * t.alpha) * denoised, x, alpha=kept)
        if up > 0:
            x = x + up * noise(i)
        if callback is not None:
            callback(i, denoised)
    return x


def heun(
    denoise: Denoise,
    x: Tensor,
    grid: Grid,
    *,
    noise: NoiseSource,
    callback: Callback | None = None,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = math.inf,
    s_noise: float = 1.0,
) -> Tensor:
    """Heun's second-order step (algorithms 1 and 2 of 2206.00364); two estimates a step but for the last.

    With `s_churn`, steps from s_tmin <= sigma / alpha <= s_tmax first raise the level by the factor
    1 + min(s_churn / N, sqrt(2) - 1), with fresh noise of standard deviation s_noise. Unlike the paper, never
    above the first row, beyond which most processes end.
    """
    if min(s_churn, s_noise) < 0:
        raise ValueError(f"s_churn={s_churn} or s_noise={s_noise} is below 0")
    gamma = min(s_churn / (len(grid) - 1), MOST_CHURN)
    for i, (t, s) in enumerate(pairwise(grid)):
        if gamma > 0 and i > 0 and s_tmin <= t.sigma / t.alpha <= s_tmax:
            top = grid[0].sigma / grid[0].alpha if grid[0].alpha > 0 else math.inf
            raised = grid.row_of(min((1 + gamma) * t.sigma / t.alpha, top))
            ratio = raised.alpha / t.alpha
            added = math.sqrt(max(0.0, raised.sigma**2 - (ratio * t.sigma) ** 2))
            x, t = ratio * x + s_noise * added * noise(i), raised
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
    denoise: Denoise,
    x: Tensor,
    grid: Grid,
    *,
    noise: NoiseSource,
    callback: Callback | None = None,
    eta: float = 0.0,
) -> Tensor:
    """DPM-Solver++(2M) (algorithm 2 of 2211.01095): second order with one estimate a step.

    eta = 1 is its SDE form, SDE-DPM-Solver++(2M); between them part of the noise is fresh. Steps whose width
    in log-SNR is infinite, or that follow such a one, are of first order.
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta={eta} is not within 0 and 1")
    last, h_last = None, math.inf
    for i, (t, s) in enumerate(pairwise(grid)):
        denoised = denoise(x, t)
        h = _half_log_snr(s) - _half_log_snr(t)
        rho = t.alpha * s.sigma / (s.alpha * t.sigma)  # exp(-h)
        up = s.sigma * math.sqrt(1 - rho ** (2 * eta))
        share, c = s.alpha * (1 - rho ** (1 + eta)), 0.0  # of the estimate, extrapolated by c
        x = (s.sigma / t.sigma * rho**eta) * x
        if last is not None and math.isfinite(h) and math.isfinite(h_last):
            c = h / (2 * h_last)
            x = x.add_(last, alpha=-share * c)
        x = x.add_(denoised, alpha=share * (1 + c))
        if up > 0:
            x = x + up * noise(i)
        last, h_last = denoised, h
        if callback is not None:
            callback(i, denoised)
    return x


Estimate = tuple[float, Tensor]  # log(alpha / sigma), and the clean estimate there


def unipc(
    denoise: Denoise,
    x: Tensor,
    grid: Grid,
    *,
    noise: NoiseSource,
    callback: Callback | None = None,
    order: int = 2,
) -> Tensor:
    """UniPC (2302.04867, B_2) for the clean estimate: a predictor of `order`, 1 to 3, then a corrector.

    The corrector redoes a step with the estimate at its end, which the next step needs anyway: one estimate a
    step, and one order more than the predictor's. Steps whose width in log-SNR is infinite are of first order
    and not corrected.
    """
    if order not in (1, 2, 3):
        raise ValueError(f"order={order} is none of 1, 2, 3")
    known: list[Estimate] = []  # newest first
    step: tuple[Tensor, GridRow, Tensor, list[Estimate]] | None = None  # the last one, to be corrected
    for i, (t, s) in enumerate(pairwise(grid)):
        denoised, here = denoise(x, t), _half_log_snr(t)
        if step is not None:
            start, row, its, others = step
            x = _exponential_step(start, row, t, its, [*others, (here, denoised)])
        finite = t.alpha > 0 and s.sigma > 0
        others = known[: order - 1] if finite else []
        step = (x, t, denoised, others) if finite else None
        x = _exponential_step(x, t, s, denoised, others)
        if t.alpha > 0:
            known = [(here, denoised), *known[: order - 1]]
        if callback is not None:
            callback(i, denoised)
    return x


def _exponential_step(x: Tensor, t: GridRow, s: GridRow, denoised: Tensor, others: list[Estimate]) -> Tensor:
    """x at s from x at t, the clean estimate between them interpolated through `denoised` and `others`."""
    ratio = s.sigma / t.sigma
    mean = denoised
    if others:
        start = _half_log_snr(t)
        h = _half_log_snr(s) - start
        nodes = [(place - start) / h for place, _ in others]
        for node, weight, (_, other) in zip(nodes, _weights(nodes, h), others, strict=True):
            mean = mean + (weight / node) * (other - denoised)
    return ratio * x + (s.alpha - t.alpha * ratio) * mean


def _weights(nodes: list[float], h: float) -> list[float]:
    """w with sum_k w_k nodes_k^(j - 1) = j! phi_(j + 1)(-h) / phi_1(-h), phi_k of exponential integrators.

    A single weight is 1/2, its limit for small steps, as published.
    """
    if len(nodes) == 1:
        return [0.5]
    phi = first = math.expm1(-h) / -h
    moments = []
    for j in range(1, len(nodes) + 1):
        phi = (phi - 1 / math.factorial(j)) / -h
        moments.append(math.factorial(j) * phi / first)
    weights = []
    for k, node in enumerate(nodes):
        basis = [1.0]  # Lagrange's polynomial, 1 at this node and 0 at the others; lowest power first
        for other in (*nodes[:k], *nodes[k + 1 :]):
            pairs = zip([0.0, *basis], [*basis, 0.0], strict=True)
            basis = [(shifted - other * same) / (node - other) for shifted, same in pairs]
        weights.append(sum(c * moment for c, moment in zip(basis, moments, strict=True)))
    return weights


def plms(
    denoise: Denoise, x: Tensor, grid: Grid, *, noise: NoiseSource, callback: Callback | None = None
) -> Tensor:
    """PLMS (2202.09778, without Runge-Kutta steps): Adams and Bashforth's weights on four noise estimates.

    The first step is improved Euler, of two estimates. The weights are those of even grids, in time or in
    log-SNR: others are refused, and so is alpha = 0. `callback` gets the clean estimate that the weighted
    noise implies.
    """
    _refuse_for_plms(grid)
    past: list[Tensor] = []  # noise estimates, newest first
    for i, (t, s) in enumerate(pairwise(grid)):
        past = [_noise_estimate(x, denoise(x, t), t), *past[:3]]
        weights = ADAMS_BASHFORTH[len(past) - 1]
        eps = sum((w * e for w, e in zip(weights[1:], past[1:], strict=True)), weights[0] * past[0])
        if i == 0 and s.sigma > 0:
            ahead = (s.alpha / t.alpha) * (x - t.sigma * eps) + s.sigma * eps
            eps = (eps + _noise_estimate(ahead, denoise(ahead, s), s)) / 2
        clean = (x - t.sigma * eps) / t.alpha
        x = s.alpha * clean + s.sigma * eps
        if callback is not None:
            callback(i, clean)
    return x


def _refuse_for_plms(grid: Grid) -> None:
    if grid[0].alpha == 0:
        raise InputError("sampler=plms", "the grid begins at alpha = 0", "choose sampler=unipc or dpmpp_2m")
    noisy = [row for row in grid if row.sigma > 0]
    times, levels = [row.model_time for row in noisy], [_half_log_snr(row) for row in noisy]
    whole = all(time.is_integer() for time in times)  # indices of a table, rounded
    if not _is_even(times, 1.0 if whole else 0.0) and not _is_even(levels, 0.0):
        steps = sorted(a - b for a, b in pairwise(times))
        what = f"needs an even grid, and has time steps from {steps[0]:g} to {steps[-1]:g}"
        raise InputError("sampler=plms", what, "choose spacing=uniform, leading, trailing or log_snr")


def _is_even(values: list[float], slack: float) -> bool:
    """Whether the values lie within `slack`, and rounding, of a straight line through the ends."""
    span = values[-1] - values[0]
    line = (values[0] + span * k / max(len(values) - 1, 1) for k in range(len(values)))
    bound = slack + 1e-6 * abs(span)
    return all(abs(value - straight) <= bound for value, straight in zip(values, line, strict=True))


def _noise_estimate(x: Tensor, denoised: Tensor, row: GridRow) -> Tensor:
    return (x - row.alpha * denoised) / row.sigma


def _half_log_snr(row: GridRow) -> float:
    """log(alpha / sigma), infinite at the ends of a process."""
    if row.alpha == 0 or row.sigma == 0:
        return -math.inf if row.alpha == 0 else math.inf
    return math.log(row.alpha / row.sigma)
