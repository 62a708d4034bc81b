"""What the diffusion tests share: every YAML of the two groups, built, and networks that are closed forms.

Seeds are fixed where numbers are drawn; everything is float64 unless a test says otherwise.
"""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import hydra
import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor

from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.noise_scheduler import EDM, RectifiedFlow, VariancePreserving
from ldm.types import Conditioning, Grid, GridRow

CONFIGS = Path(__file__).parents[2] / "configs"
NOISE_SCHEDULERS = sorted(p.stem for p in (CONFIGS / "noise_scheduler").glob("*.yaml"))
SAMPLERS = sorted(p.stem for p in (CONFIGS / "sampler").glob("*.yaml"))
NOTHING = Conditioning()


def built(group: str, name: str, **overrides):
    """The object of configs/<group>/<name>.yaml."""
    return hydra.utils.instantiate(OmegaConf.load(CONFIGS / group / f"{name}.yaml"), **overrides)


class Mixture:
    """Latents whose elements are independent draws of a mixture of normals: everything is known of them."""

    weights = torch.tensor([0.3, 0.5, 0.2], dtype=torch.float64)
    means = torch.tensor([-1.1, 0.2, 1.6], dtype=torch.float64)
    stds = torch.tensor([0.4, 0.3, 0.5], dtype=torch.float64)

    def _parts(self, x: Tensor, alpha: float, sigma: float) -> tuple[Tensor, Tensor]:
        """Standard scores of x under each noisy component, and their standard deviations."""
        std = (alpha**2 * self.stds**2 + sigma**2).sqrt()
        return (x[..., None] - alpha * self.means) / std, std

    def clean(self, x: Tensor, row: GridRow) -> Tensor:
        """E[latents | x], the best denoiser there is."""
        score, std = self._parts(x, row.alpha, row.sigma)
        share = torch.softmax(self.weights.log() - std.log() - score**2 / 2, -1)
        return (share * (self.means + row.alpha * self.stds**2 / std * score)).sum(-1)

    def cdf(self, x: Tensor, row: GridRow) -> Tensor:
        score, _ = self._parts(x, row.alpha, row.sigma)
        return (self.weights * torch.special.ndtr(score)).sum(-1)

    def flow(self, x: Tensor, start: GridRow, end: GridRow) -> Tensor:
        """Exact solution of the probability flow: in one dimension it keeps quantiles; by bisection."""
        target = self.cdf(x, start)
        low, high = torch.full_like(x, -1e3), torch.full_like(x, 1e3)
        for _ in range(90):
            middle = (low + high) / 2
            below = self.cdf(middle, end) < target
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return (low + high) / 2


@cache
def quantiles(count: int) -> tuple[Tensor, Tensor]:
    """Standard normal noise on its quantiles, and the clean latents its exact flow ends in, [count 1]."""
    noise = torch.special.ndtri((torch.arange(count, dtype=torch.float64) + 0.5) / count).view(-1, 1)
    return noise, Mixture().flow(noise, GridRow(0, 0.0, 1.0), GridRow(0, 1.0, 0.0))


class Oracle:
    """A backbone whose output F says the mixture's exact clean estimate, at the row it was last shown."""

    in_channels = out_channels = 1

    def __init__(self, noise_scheduler, mixture: Mixture) -> None:
        self.noise_scheduler, self.mixture, self.calls = noise_scheduler, mixture, 0
        self.denoiser = Denoiser(self, noise_scheduler)

    def __call__(self, x: Tensor, time: Tensor, conditioning: Conditioning) -> Tensor:
        assert time.shape == (len(x),)
        self.calls += 1
        row = self.row
        x = x / self.noise_scheduler.input_scale_of(row.sigma)
        return self.noise_scheduler.output_from_clean(x, self.mixture.clean(x, row), row.alpha, row.sigma)

    def denoise(self, x: Tensor, row: GridRow) -> Tensor:
        self.row = row
        return self.denoiser.at_row(x, row, NOTHING)


class Smooth:
    """An arbitrary smooth network, no denoiser of anything."""

    in_channels = out_channels = 4

    def __call__(self, x: Tensor, time: Tensor, conditioning: Conditioning) -> Tensor:
        phase = time.view(-1, *[1] * (x.ndim - 1)) / 400
        return torch.tanh(0.8 * x + 0.3 * x.roll(1, -1) + torch.sin(phase)) + 0.1 * torch.cos(phase) * x


def interior(noise_scheduler, num_steps: int, ends: tuple[float, float] = (-4.0, 4.0)) -> Grid:
    """num_steps + 1 rows even in log-SNR, away from the ends of the process."""
    t = noise_scheduler.time_of(torch.linspace(*ends, num_steps + 1, dtype=torch.float64))
    columns = noise_scheduler.model_time(t), noise_scheduler.alpha(t), noise_scheduler.sigma(t)
    return [GridRow(*row) for row in torch.stack(columns, 1).tolist()]


def no_noise(i: int) -> Tensor:
    raise AssertionError(f"noise of step {i} is not needed")


def in_ratio(grid: Grid) -> Grid:
    """The same grid in sigma / alpha: rows (1, sigma / alpha)."""
    return [GridRow(row.model_time, 1.0, row.sigma / row.alpha) for row in grid]


def in_ratio_denoise(denoise, grid: Grid):
    """`denoise` of `grid`, for states x / alpha at rows (1, sigma / alpha)."""
    original = {row.sigma / row.alpha: row for row in grid}
    return lambda x, row: denoise(x * original[row.sigma].alpha, original[row.sigma])


VARIANTS = [
    VariancePreserving(),
    VariancePreserving(schedule="linear", beta_start=1e-4, beta_end=0.02),
    VariancePreserving(schedule="cosine"),
    VariancePreserving(num_train_timesteps=37),
    VariancePreserving(zero_terminal_snr=True, prediction_type="v_prediction"),
    EDM(),
    EDM(sigma_data=0.5, sigma_max=80.0),
    RectifiedFlow(),
    RectifiedFlow(shift=3.0),
    RectifiedFlow(shift=0.1),
]


def gaussian(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def order(errors: list[float]) -> float:
    """Observed order of convergence over the last halving of the step."""
    return math.log2(errors[-2] / errors[-1])


@pytest.fixture(params=NOISE_SCHEDULERS)
def noise_scheduler(request):
    """Every YAML of the group."""
    return built("noise_scheduler", request.param)


@pytest.fixture(params=SAMPLERS)
def sampler(request):
    """Every YAML of the group."""
    return built("sampler", request.param)


@pytest.fixture(params=VARIANTS, ids=lambda v: f"{type(v).__name__}-{v.first.sigma:.4g}-{v.least:.4g}")
def process(request):
    """Every process, at its extremes."""
    return request.param


@pytest.fixture
def lab():
    """The functions and classes of this file."""
    return SimpleNamespace(**globals())
