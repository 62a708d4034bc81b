"""The linear path: an orthonormal basis, exact at full length, and what the network adds to it."""

import pytest
import torch

from ldm.autoencoder.residual import LOG_VARIANCE, ResidualAutoencoderKL, cosine_basis

SMALL = {"block_out_channels": [8, 16], "layers_per_block": 1, "norm_groups": 4, "mid_attention": False}


def pictures(size=16):
    """Smooth pictures [2 3 size size] in [-1, 1]."""
    line = torch.linspace(-1, 1, size)
    ramps = [line[:, None] * line * s for s in (0.9, -0.5, 0.3)]
    return torch.stack([torch.stack(ramps), torch.stack(ramps[::-1])])


@pytest.mark.parametrize(("size", "count"), [(2, 12), (4, 10), (8, 48)])
def test_the_basis_is_orthonormal_and_begins_with_the_mean(size, count):
    basis = cosine_basis(size, count).flatten(1)
    torch.testing.assert_close(basis @ basis.T, torch.eye(count), atol=1e-5, rtol=0)
    torch.testing.assert_close(basis[0], torch.full((3 * size**2,), (3 * size**2) ** -0.5))


def test_with_all_terms_the_start_is_lossless():
    autoencoder = ResidualAutoencoderKL(latent_channels=48, patch_size=2, **SMALL)
    assert autoencoder.factor == 4
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    torch.testing.assert_close(autoencoder.decode(autoencoder.encode(images)), images, atol=1e-5, rtol=0)
    assert autoencoder.moments(images).shape == (2, 96, 4, 4)
    assert autoencoder.moments(images)[:, 48:].unique().tolist() == [LOG_VARIANCE]


def test_few_terms_keep_the_smooth_part_and_training_adds_the_rest():
    torch.manual_seed(0)
    autoencoder = ResidualAutoencoderKL(latent_channels=8, patch_size=2, **SMALL)
    images = pictures()
    optimizer = torch.optim.Adam(autoencoder.parameters(), lr=3e-3)
    losses = []
    for _ in range(40):
        loss = (autoencoder(images)[0] - images).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] < 0.15 * images.square().mean()
    assert losses[-1] < 0.5 * losses[0]
    network = [p for name, p in autoencoder.named_parameters() if not name.startswith("linear")]
    assert all(p.grad is not None for p in network)


def test_wrong_sizes_are_refused_with_both_numbers():
    with pytest.raises(ValueError, match="latent_channels=49, but a patch has 48 values"):
        ResidualAutoencoderKL(latent_channels=49, patch_size=2, **SMALL)
    with pytest.raises(ValueError, match="image size 10 is not a multiple of the autoencoder's factor 4"):
        ResidualAutoencoderKL(latent_channels=8, patch_size=2, **SMALL).encode(torch.zeros(1, 3, 10, 8))
