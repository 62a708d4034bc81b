"""A backbone under a noise scheduler: its clean estimate, its loss, and what one run chooses of the loss.

Weightings (noise_scheduler, t [b]) -> [b] return the weight of the squared error in the space of the
network's output F, where the loss is taken; time distributions (noise_scheduler, u [b]) -> [b] map uniform
numbers in (0, 1) to the positions, clean to noisy, that the scheduler's time_at takes. b batch, c channels,
h w latent size.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ldm.diffusion.process import Level, Process
from ldm.types import Backbone, Conditioning, GridRow, Weighting


class Simple:
    """Every error of the noise counts the same: w_eps = 1 (2006.11239)."""

    def __call__(self, noise_scheduler: Process, t: Tensor) -> Tensor:
        return noise_scheduler.weight_of_noise(t)


class Unweighted:
    """Every error of the network's output counts the same: w_F = 1; for the edm pair it is the paper's
    weight.
    """

    def __call__(self, noise_scheduler: Process, t: Tensor) -> Tensor:
        return torch.ones_like(noise_scheduler.sigma(t))


class MinSNR:
    """w_clean = min(SNR, gamma) (2303.09556), with a floor for the noisiest levels.

    Where SNR < 1, w_F is at least `floor`: for v_prediction the published weight SNR / (SNR + 1) is 0 at a
    zero terminal SNR, and the level that every picture starts from would never be trained. epsilon is
    untouched.
    """

    def __init__(self, gamma: float = 5.0, floor: float = 0.01) -> None:
        if gamma <= 0 or floor < 0:
            raise ValueError(f"gamma={gamma} is not above 0, or floor={floor} below 0")
        self.gamma, self.floor = gamma, floor

    def __call__(self, noise_scheduler: Process, t: Tensor) -> Tensor:
        snr = noise_scheduler.log_snr(t).exp()
        weight = snr.clamp(max=self.gamma) * noise_scheduler.weight_of_clean(t)
        return torch.where(snr < 1, weight.clamp(min=self.floor), weight)


class P2:
    """w_eps = (k + SNR)^-gamma (2204.00227): less for the levels that only clean up."""

    def __init__(self, gamma: float = 1.0, k: float = 1.0) -> None:
        if gamma < 0 or k <= 0:
            raise ValueError(f"k={k} is not above 0, or gamma={gamma} below 0")
        self.gamma, self.k = gamma, k

    def __call__(self, noise_scheduler: Process, t: Tensor) -> Tensor:
        snr = noise_scheduler.log_snr(t).exp()
        return (self.k + snr) ** -self.gamma * noise_scheduler.weight_of_noise(t)


class Debiased:
    """w_eps = 1 / sqrt(SNR) (2310.08442), in F space the geometric mean of the other two spaces' weights."""

    def __call__(self, noise_scheduler: Process, t: Tensor) -> Tensor:
        return (noise_scheduler.weight_of_noise(t) * noise_scheduler.weight_of_clean(t)).sqrt()


class Uniform:
    """Every position equally often."""

    def __call__(self, noise_scheduler: Process, u: Tensor) -> Tensor:
        return u


class LogitNormal:
    """Positions whose logit is normal (2403.03206): few at the ends; a positive mean favours noise."""

    def __init__(self, mean: float = 0.0, std: float = 1.0) -> None:
        if std <= 0:
            raise ValueError(f"std={std} is not above 0")
        self.mean, self.std = mean, std

    def __call__(self, noise_scheduler: Process, u: Tensor) -> Tensor:
        return torch.sigmoid(self.mean + self.std * torch.special.ndtri(u))


class LogNormal:
    """Levels whose ln(sigma / alpha) is normal (2206.00364), for any process.

    The mean is that paper's -1.2, for latents of unit variance in place of 1/4: -1.2 + ln 2. A table takes
    its nearest index, its last where the level lies beyond; an EDM process goes on beyond its grids.
    """

    def __init__(self, mean: float = -1.2 + math.log(2), std: float = 1.2) -> None:
        if std <= 0:
            raise ValueError(f"std={std} is not above 0")
        self.mean, self.std = mean, std

    def __call__(self, noise_scheduler: Process, u: Tensor) -> Tensor:
        log_ratio = self.mean + self.std * torch.special.ndtri(u)
        return noise_scheduler.position_of(noise_scheduler.time_of(-2 * log_ratio))


class Denoiser:
    """A backbone under a noise scheduler; it owns neither and has no state.

    Levels come as a tensor of times [b] (training) or as a grid row of floats (sampling: nothing is asked of
    the device). Latents should be float32 or better; a backbone may answer in less, the arithmetic here stays
    in theirs.
    """

    def __init__(
        self, backbone: Backbone, noise_scheduler: Process, weighting: Weighting | None = None
    ) -> None:
        self.backbone, self.noise_scheduler = backbone, noise_scheduler
        self.weighting = Simple() if weighting is None else weighting

    def __call__(self, noisy_latents: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """Estimate of the clean latents at times t."""
        alpha, sigma = self._levels(t, noisy_latents)
        output = self._output(noisy_latents, sigma, self.noise_scheduler.model_time(t), conditioning)
        return self.noise_scheduler.clean_from_output(noisy_latents, output, alpha, sigma)

    def output_at(self, x: Tensor, row: GridRow, conditioning: Conditioning) -> Tensor:
        """The network's own output F at one level of a grid."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        time = torch.full((len(x),), row.model_time, dtype=dtype, device=x.device)
        return self._output(x, row.sigma, time, conditioning)

    def at_row(self, x: Tensor, row: GridRow, conditioning: Conditioning) -> Tensor:
        """Estimate of the clean latents at one level of a grid."""
        output = self.output_at(x, row, conditioning)
        return self.noise_scheduler.clean_from_output(x, output, row.alpha, row.sigma)

    def errors(self, latents: Tensor, noise: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """Mean squared error of F over c, h, w, without weight, [b]."""
        alpha, sigma = self._levels(t, latents)
        a, b = self.noise_scheduler.pair(alpha, sigma)
        noisy_latents = alpha * latents + sigma * noise
        output = self._output(noisy_latents, sigma, self.noise_scheduler.model_time(t), conditioning)
        error = output - (a * latents + b * noise)
        total = error.square().sum(tuple(range(1, error.ndim)))  # flattening channels last would be a copy
        return total / error[0].numel()

    def weight(self, t: Tensor) -> Tensor:
        """What `loss` multiplies `errors` by, [b]."""
        return self.weighting(self.noise_scheduler, t)

    def loss(self, latents: Tensor, noise: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """Weighted mean squared error, [b]."""
        return self.weight(t) * self.errors(latents, noise, t, conditioning)

    def _levels(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        shape = (-1, *[1] * (like.ndim - 1))
        return self.noise_scheduler.alpha(t).view(shape), self.noise_scheduler.sigma(t).view(shape)

    def _output(self, x: Tensor, sigma: Level, time: Tensor, conditioning: Conditioning) -> Tensor:
        scale = self.noise_scheduler.input_scale_of(sigma)
        scaled = x if isinstance(scale, float) and scale == 1 else x * scale
        return self.backbone(scaled, time, conditioning).to(x.dtype)
