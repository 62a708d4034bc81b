"""Tiles: exact where they can be, blended where they cannot, for either kind of autoencoder."""

from __future__ import annotations

from fractions import Fraction
from functools import partial

import pytest
import torch

from ldm.autoencoder.kl import AutoencoderKL
from ldm.autoencoder.residual import ResidualAutoencoderKL
from ldm.autoencoder.tiling import spans, tiled, tiled_decode, tiled_encode
from ldm.autoencoder.vq import AutoencoderVQ, VectorQuantizer

SMALL = {"block_out_channels": (8, 16, 16), "layers_per_block": 1, "norm_groups": 4}


@pytest.mark.parametrize(("size", "tile", "overlap"), [(100, 32, 8), (33, 32, 16), (64, 32, 0), (7, 32, 8)])
@pytest.mark.parametrize("scale", [Fraction(4), Fraction(1), Fraction(1, 4)])
def test_weights_of_the_tiles_add_up_to_one(size: int, tile: int, overlap: int, scale: Fraction) -> None:
    if scale < 1:
        size, tile, overlap = 4 * size, 4 * tile, 4 * overlap
    total = torch.zeros(int(size * scale), dtype=torch.float64)
    covered = set()
    for source, target, weight in spans(size, tile, overlap, scale):
        covered |= set(range(*source.indices(size)))
        assert len(range(*source.indices(size))) == min(size, tile)
        total[target] += weight
    assert covered == set(range(size))
    torch.testing.assert_close(total, torch.ones_like(total))


def test_the_blend_is_linear() -> None:
    (_, _, first), (_, target, second) = spans(24, 16, 8, Fraction(1))
    torch.testing.assert_close(first[8:], 1 - (torch.arange(8).double() + 0.5) / 8)
    torch.testing.assert_close(second[:8], (torch.arange(8).double() + 0.5) / 8)
    assert target == slice(8, 24)


@pytest.mark.parametrize(("height", "width"), [(64, 64), (40, 104), (72, 20)])
def test_a_local_map_is_not_changed_by_tiles(height: int, width: int) -> None:
    """The linear path alone looks at one cell at a time, so that its tiles are those of the whole."""
    torch.manual_seed(0)
    net = ResidualAutoencoderKL(
        latent_channels=48, patch_size=2, block_out_channels=[8, 16], layers_per_block=1, norm_groups=4
    )
    images, noise = torch.rand(2, 3, height, width), torch.randn(2, 48, height // 4, width // 4)
    with torch.no_grad():
        latents = tiled_encode(net, images, tile=32, overlap=8, noise=noise)
        torch.testing.assert_close(latents, net.encode(images, noise), rtol=0, atol=1e-5)
        decoded = tiled_decode(net, latents, tile=32, overlap=8)
        torch.testing.assert_close(decoded, net.decode(latents), rtol=0, atol=1e-5)
        assert net.decode(latents).std() > 0.1


KINDS = {
    "kl": partial(AutoencoderKL, **SMALL),
    "vq": partial(AutoencoderVQ, partial(VectorQuantizer, num_codes=64), **SMALL),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_picture_that_fits_one_tile_gives_the_same_bits(kind: str) -> None:
    torch.manual_seed(0)
    net, images = KINDS[kind](), torch.rand(1, 3, 32, 24)
    with torch.no_grad():
        latents = tiled_encode(net, images, tile=32, overlap=16)
        assert torch.equal(latents, net.encode(images))
        assert torch.equal(tiled_decode(net, latents, tile=32, overlap=16), net.decode(latents))


def test_seams_on_a_smooth_picture() -> None:
    """Where tiles differ in tone by d, as group norms make them, a step at a seam is d / overlap, not d."""
    ramp = torch.arange(40.0).expand(1, 1, 24, 40)  # slope 1: tiles 12 apart differ by 12 once centred
    centred = partial(tiled, lambda x: x - x.mean((2, 3), keepdim=True), ramp, scale=Fraction(1))
    blended, cut = centred(tile=16, overlap=4), centred(tile=16, overlap=0)
    steps = blended.diff(dim=3)
    torch.testing.assert_close(steps[..., 12:15], torch.full((1, 1, 24, 3), 1 - 12 / 4), rtol=0, atol=1e-5)
    torch.testing.assert_close(steps[..., 4:11], torch.ones(1, 1, 24, 7), rtol=0, atol=1e-5)
    assert float((steps - 1).abs().max()) <= 12 / 4 + 1e-5
    assert float(cut.diff(dim=3)[0, 0, 0, 15]) == pytest.approx(1 - 16)


def test_half_precision_is_blended_in_float32() -> None:
    values = torch.full((1, 1, 4, 4097), 1000.0, dtype=torch.float16)
    result = tiled(lambda x: x, values, 48, 24, Fraction(1))
    assert result.dtype == torch.float16
    assert torch.equal(result, values)


def test_sizes_that_do_not_fit_are_refused() -> None:
    net = AutoencoderKL(**SMALL)
    with pytest.raises(ValueError, match="tile 30.*4"):
        tiled_encode(net, torch.zeros(1, 3, 64, 64), tile=30, overlap=8)
    with pytest.raises(ValueError, match="image size 66.*4"):
        tiled_encode(net, torch.zeros(1, 3, 64, 66), tile=32, overlap=8)
    with pytest.raises(ValueError, match="overlap 2.*4"):
        tiled_decode(net, torch.zeros(1, 4, 64, 66), tile=32, overlap=2)
    with pytest.raises(ValueError, match="overlap 5.*tile 8"):
        tiled_decode(net, torch.zeros(1, 4, 64, 66), tile=32, overlap=20)
