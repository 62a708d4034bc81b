from functools import partial

import pytest
import torch

from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.inversion import invert
from ldm.diffusion.noise_scheduler import EDM, RectifiedFlow, VariancePreserving
from ldm.diffusion.samplers import ddim, prior, truncate
from ldm.types import GridRow

COUNT = 64  # latents on quantiles of the mixture


def round_trip(lab, denoise, latents, grid, refinements=0):
    """Mean error of latents that were inverted and drawn again."""
    noise = invert(denoise, latents, grid, refinements)
    again = ddim(denoise, prior(noise, grid), grid, noise=lab.no_noise)
    return (again - latents).abs().mean().item()


def test_inverted_and_drawn_again_with_the_exact_denoiser(lab, noise_scheduler):
    oracle = lab.Oracle(noise_scheduler, lab.Mixture())
    _, latents = lab.quantiles(COUNT)
    for spacing in ("karras", "log_snr"):
        grids = [noise_scheduler.grid(num_steps, spacing) for num_steps in (10, 20, 40, 80)]
        errors = [round_trip(lab, oracle.denoise, latents, grid) for grid in grids]
        assert errors == sorted(errors, reverse=True)
        assert errors[-1] < errors[1] / 8  # second order
        assert errors[-1] < 0.01  # of latents of unit variance
        refined = [round_trip(lab, oracle.denoise, latents, grids[1], k) for k in (0, 2, 8)]
        assert refined[2] < refined[0] / 100
        assert refined[1] < refined[0] / 3


def test_the_noise_is_that_of_the_exact_flow(lab, noise_scheduler):
    """What a first row with alpha > 0 keeps of the latents is part of its state."""
    oracle = lab.Oracle(noise_scheduler, lab.Mixture())
    _, latents = lab.quantiles(COUNT)
    errors = []
    for num_steps in (20, 80, 320):
        grid = noise_scheduler.grid(num_steps, "log_snr")
        exact = oracle.mixture.flow(latents, GridRow(0, 1.0, 0.0), grid[0]) / grid[0].sigma
        errors.append((invert(oracle.denoise, latents, grid) - exact).abs().mean().item())
    assert errors[2] < errors[1] / 3
    assert errors[1] < errors[0] / 2
    assert errors[2] < 0.015


@pytest.mark.parametrize(
    "process",
    [VariancePreserving(), VariancePreserving(prediction_type="v_prediction"), EDM(), RectifiedFlow()],
    ids=["epsilon", "v", "edm", "flow"],
)
def test_inverted_and_drawn_again_with_a_network_that_knows_nothing(lab, process):
    generator = torch.Generator().manual_seed(5)
    first, last = (
        torch.randn(shape, generator=generator, dtype=torch.float64) / 8
        for shape in ((8, 4, 3, 3), (4, 8, 3, 3))
    )

    def backbone(x, time, conditioning):
        hidden = torch.conv2d(x, first, padding=1) + torch.sin(time / 300).view(-1, 1, 1, 1)
        return torch.conv2d(torch.tanh(hidden), last, padding=1)

    denoise = partial(Denoiser(backbone, process).at_row, conditioning=lab.NOTHING)
    latents = lab.gaussian((2, 4, 6, 6))
    grids = [process.grid(num_steps, "log_snr") for num_steps in (25, 50, 100)]
    errors = [round_trip(lab, denoise, latents, grid) for grid in grids]
    assert errors[2] < errors[1] < errors[0]
    assert errors[2] < 0.05
    assert round_trip(lab, denoise, latents, grids[0], 5) < errors[0] / 10


def test_calls_and_partial_inversion(lab):
    """A grid that begins later is inverted as far as that."""
    oracle = lab.Oracle(VariancePreserving(), lab.Mixture())
    _, latents = lab.quantiles(COUNT)
    grid = truncate(oracle.noise_scheduler.grid(40, "log_snr"), 0.5)
    noise = invert(oracle.denoise, latents, grid, refinements=2)
    assert oracle.calls == 20 * 3
    again = ddim(oracle.denoise, prior(noise, grid), grid, noise=lab.no_noise)
    assert (again - latents).abs().max() < 1e-3


def test_what_cannot_be_inverted_is_refused(lab):
    grid = RectifiedFlow().grid(1, "uniform")
    with pytest.raises(ValueError, match="one step from alpha = 0"):
        invert(lambda x, row: x, torch.zeros(1, 1), grid)
    with pytest.raises(ValueError, match="refinements=-1"):
        invert(lambda x, row: x, torch.zeros(1, 1), grid, refinements=-1)
