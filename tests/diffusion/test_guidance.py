import math

import pytest
import torch

from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.guidance import guided
from ldm.types import Conditioning

BATCH = 3


class Conditional:
    """A network that listens to its pooled conditioning and counts its rows."""

    in_channels = out_channels = 4

    def __init__(self):
        self.rows = []

    def __call__(self, x, time, conditioning):
        self.rows.append(len(x))
        told = conditioning.pooled.view(-1, 1, 1, 1)
        return torch.sin(x * (1 + told) + time.view(-1, 1, 1, 1) / 300) + told


@pytest.fixture
def setting(lab, noise_scheduler):
    conditioning = Conditioning(pooled=lab.gaussian((BATCH, 1), 1))
    null = Conditioning(pooled=torch.zeros(BATCH, 1, dtype=torch.float64))
    denoiser = Denoiser(Conditional(), noise_scheduler)
    return (
        denoiser,
        conditioning,
        null,
        lab.gaussian((BATCH, 4, 3, 3), 2),
        noise_scheduler.grid(5, "log_snr")[2],
    )


def test_scale_1_is_the_conditional_estimate_in_one_forward(setting):
    denoiser, conditioning, _, x, row = setting
    expected = denoiser.at_row(x, row, conditioning)
    denoiser.backbone.rows.clear()
    assert torch.equal(guided(denoiser, conditioning, None, 1.0, rescale=0.7)(x, row), expected)
    assert denoiser.backbone.rows == [BATCH]


@pytest.mark.parametrize("scale", [0.0, 0.5, 3.0, 7.5])
def test_guidance_is_linear_in_the_scale(setting, scale):
    denoiser, conditioning, null, x, row = setting
    conditional, unconditional = denoiser.at_row(x, row, conditioning), denoiser.at_row(x, row, null)
    denoiser.backbone.rows.clear()
    expected = unconditional + scale * (conditional - unconditional)
    torch.testing.assert_close(
        guided(denoiser, conditioning, null, scale)(x, row), expected, rtol=1e-9, atol=1e-9
    )
    assert denoiser.backbone.rows == [2 * BATCH]


def output_std(denoiser, x, clean, row):
    output = denoiser.noise_scheduler.output_from_clean(x, clean, row.alpha, row.sigma)
    return output, output.std(dim=(1, 2, 3))


def test_rescale_1_restores_the_standard_deviation_of_the_output(setting):
    denoiser, conditioning, null, x, row = setting
    _, expected = output_std(denoiser, x, denoiser.at_row(x, row, conditioning), row)
    plain, before = output_std(denoiser, x, guided(denoiser, conditioning, null, 6.0)(x, row), row)
    full, after = output_std(denoiser, x, guided(denoiser, conditioning, null, 6.0, rescale=1.0)(x, row), row)
    torch.testing.assert_close(after, expected, rtol=1e-7, atol=0)
    assert ((before / expected - 1).abs() > 0.1).all()
    half, _ = output_std(denoiser, x, guided(denoiser, conditioning, null, 6.0, rescale=0.3)(x, row), row)
    torch.testing.assert_close(half, 0.3 * full + 0.7 * plain, rtol=1e-7, atol=1e-9)


def test_rescale_of_a_network_that_says_zero_is_finite(lab):
    from ldm.diffusion.noise_scheduler import RectifiedFlow

    denoiser = Denoiser(lambda x, time, conditioning: torch.zeros_like(x), RectifiedFlow())
    x, row = lab.gaussian((2, 4, 3, 3)), denoiser.noise_scheduler.grid(4, "uniform")[1]
    null = Conditioning(pooled=torch.zeros(2, 1))
    assert guided(denoiser, null, null, 5.0, rescale=0.7)(x, row).isfinite().all()


def test_outside_its_interval_the_conditional_network_is_asked_alone(lab, setting, noise_scheduler):
    denoiser, conditioning, null, x, _ = setting
    grid = noise_scheduler.grid(6, "log_snr")[:-1]
    ratios = [row.sigma / row.alpha if row.alpha > 0 else math.inf for row in grid]
    low, high = ratios[4], ratios[2]
    denoise = guided(denoiser, conditioning, null, 3.0, interval=(low, high))
    everywhere = guided(denoiser, conditioning, null, 3.0)
    for row, ratio in zip(grid, ratios, strict=True):
        denoiser.backbone.rows.clear()
        actual, inside = denoise(x, row), low < ratio <= high
        assert denoiser.backbone.rows == [2 * BATCH if inside else BATCH]
        expected = everywhere(x, row) if inside else denoiser.at_row(x, row, conditioning)
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    assert [low < ratio <= high for ratio in ratios] == [False, False, True, True, False, False]


def test_what_cannot_be_done_is_refused(setting):
    denoiser, conditioning, null, *_ = setting
    with pytest.raises(ValueError, match="scale=2.0 needs a null conditioning"):
        guided(denoiser, conditioning, None, 2.0)
    with pytest.raises(ValueError, match="rescale=1.5 is not within 0 and 1"):
        guided(denoiser, conditioning, null, 2.0, rescale=1.5)
    for interval in ((2.0, 1.0), (-1.0, 1.0), (1.0, 1.0)):
        with pytest.raises(ValueError, match="interval=.* is not 0 <= low < high"):
            guided(denoiser, conditioning, null, 2.0, interval=interval)
