"""PSNR and edge energy against closed forms; a perfect picture is finite; blur lowers the edges."""

import math

import pytest
import torch
from torch import nn

from ldm.evaluation.reconstruction import (
    edge_energy,
    evaluate_reconstruction,
    reconstruct,
    score_reconstructions,
    squared_errors,
    ssim,
)


def images(n=4, size=16, low=20, high=236):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(low, high, (n, 3, size, size), generator=generator, dtype=torch.uint8)


@pytest.mark.parametrize("levels", [1, 5, 20])
def test_psnr_of_a_constant_error(levels):
    score = score_reconstructions(images(), images() + levels)
    assert score.psnr == pytest.approx(20 * math.log10(255 / levels))
    assert score.psnr_pooled == pytest.approx(score.psnr)
    assert score.edge_energy == pytest.approx(1)


def test_mean_over_pictures_is_above_the_pooled_one():
    x, y = images(2), images(2)
    y[0] += 2
    y[1] += 20
    score = score_reconstructions(x, y)
    assert score.psnr == pytest.approx(
        10 * math.log10(255**2) - (10 * math.log10(4) + 10 * math.log10(400)) / 2
    )
    assert score.psnr_pooled == pytest.approx(10 * math.log10(255**2 / 202))
    assert score.pictures == 2


def test_perfect_is_finite_and_at_the_cap():
    score = score_reconstructions(images(), images())
    assert score.psnr == pytest.approx(10 * math.log10(255**2 * 12))
    assert score.edge_energy == 1


def test_edge_energy_closed_form_and_blur():
    x = torch.zeros(1, 3, 4, 4, dtype=torch.uint8)
    x[..., 2:] = 10  # one vertical edge: 3 channels, 4 rows, 10 squared
    assert edge_energy(x) == 3 * 4 * 100
    sharp = images()
    blurred = (
        nn.functional.avg_pool2d(sharp.float(), 3, 1, 1, count_include_pad=False).round().to(torch.uint8)
    )
    assert score_reconstructions(sharp, blurred).edge_energy < 0.3


def test_ssim_of_plain_pictures_is_their_luminance_term():
    x, y = (torch.full((1, 3, 12, 13), level) for level in (51, 204))
    expected = (2 * 0.2 * 0.8 + 0.01**2) / (0.2**2 + 0.8**2 + 0.01**2)
    assert ssim(x, y).item() == pytest.approx(expected, rel=1e-6)
    assert ssim(images(), images()).tolist() == pytest.approx([1] * 4)
    with pytest.raises(ValueError, match=r"pictures of \(10, 16\) pixels, the window has 11"):
        ssim(torch.zeros(1, 3, 10, 16), torch.zeros(1, 3, 10, 16))


@pytest.mark.parametrize("noise", [3, 60])
def test_ssim_is_that_of_torchmetrics(noise):
    torchmetrics = pytest.importorskip("torchmetrics.functional.image")
    x = images(3, 33)[..., :20]
    generator = torch.Generator().manual_seed(1)
    y = (x + noise * torch.randn(x.shape, generator=generator)).clamp(0, 255)
    ours = ssim(x, y)
    _, theirs = torchmetrics.structural_similarity_index_measure(
        y.double(), x.double(), sigma=1.5, data_range=255.0, reduction="none", return_full_image=True
    )
    inside = theirs[
        ..., 5:-5, 5:-5
    ]  # it reflects at the border; here as in the paper only whole windows count
    torch.testing.assert_close(ours, inside.flatten(1).mean(1).float())
    assert ours.max() < 0.9999


class Halves(nn.Module):
    """Stores images in [-1, 1] as they are, and gives back half of them; refuses to be in training mode."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.5))

    def encode(self, x, noise=None):
        assert not self.training
        assert noise is None
        assert not torch.is_grad_enabled()
        assert x.min() >= -1
        assert x.max() <= 1
        return x

    def decode(self, x):
        return x * self.scale


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_reconstruct_scales_batches_and_restores_the_mode(batch_size):
    autoencoder = Halves().train()
    y = reconstruct(autoencoder, images(5), batch_size)
    assert autoencoder.training
    expected = ((images(5).double() - 127.5) / 2 + 127.5).round()
    assert (y.double() - expected).abs().max() <= 1
    assert y.dtype == torch.uint8
    assert evaluate_reconstruction(autoencoder, images(5)).edge_energy == pytest.approx(0.25, abs=0.01)


def test_refusals():
    with pytest.raises(ValueError, match="originals"):
        squared_errors(images(2), images(3))
    with pytest.raises(ValueError, match="no edges"):
        score_reconstructions(
            torch.zeros(1, 3, 4, 4, dtype=torch.uint8), torch.zeros(1, 3, 4, 4, dtype=torch.uint8)
        )
