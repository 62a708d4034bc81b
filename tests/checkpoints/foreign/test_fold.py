"""The latent shift and scale, folded into an autoencoder: pictures and latents stay what they are."""

import pytest
import torch

from ldm.checkpoints.foreign.fold import folded, one_scale, statistics
from ldm.checkpoints.lazy import LazyTensor
from ldm.config import build
from ldm.errors import InputError

SHIFT, SCALE, FACTOR = [0.5, -1.0, 0.25, 2.0], [0.3, 0.2, 0.5, 0.11], 0.18215
KL = {
    "_target_": "ldm.autoencoder.kl.AutoencoderKL",
    "latent_channels": 4,
    "block_out_channels": [8, 8],
    "layers_per_block": 1,
    "norm_groups": 4,
}
VQ = KL | {
    "_target_": "ldm.autoencoder.vq.AutoencoderVQ",
    "quantizer": {"_target_": "ldm.autoencoder.vq.VectorQuantizer", "_partial_": True, "num_codes": 16},
}


def made(section, shift, scale):
    torch.manual_seed(0)
    network = build({**section, "latent_shift": shift, "latent_scale": scale})
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return network.double().eval()


def lazies(network):
    return {name: LazyTensor.of(value) for name, value in network.state_dict().items()}


def refolded(network, section, factor=FACTOR):
    """A network of the folded tensors, that has but one scale."""
    tensors = folded(lazies(network), section, factor)
    other = made(section | {"use_quant_conv": True}, 0.0, factor)
    values = {name: value.read() for name, value in tensors.items()}
    other.load_state_dict(values | {n: getattr(other, n) for n in ("latent_shift", "latent_scale")})
    return other


@pytest.mark.parametrize("quant_conv", [True, False])
def test_folded_statistics_change_no_latents_and_no_pictures(quant_conv):
    section = KL | {"use_quant_conv": quant_conv}
    network = made(section, SHIFT, SCALE)
    other = refolded(network, section)
    images, latents, noise = (torch.randn(2, c, s, s).double() for c, s in ((3, 8), (4, 4), (4, 4)))
    with torch.no_grad():
        torch.testing.assert_close(
            other.encode(images, noise), network.encode(images, noise), rtol=1e-12, atol=0
        )
        torch.testing.assert_close(other.encode(images), network.encode(images), rtol=1e-12, atol=0)
        torch.testing.assert_close(other.decode(latents), network.decode(latents), rtol=1e-12, atol=1e-14)


def test_a_codebook_moves_with_one_scale():
    network = made(VQ, SHIFT, 0.7)
    other = refolded(network, VQ, 1.0)
    images = torch.randn(2, 3, 8, 8).double()
    z = 0.2 * torch.randn(2, 4, 4, 4).double()  # as the codes are
    latents = (z - torch.tensor(SHIFT).view(-1, 1, 1)) * 0.7
    with torch.no_grad():
        torch.testing.assert_close(other.encode(images), network.encode(images), rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(other.decode(latents), network.decode(latents), rtol=1e-12, atol=1e-14)
        codes = network.quantize.indices(network._unscaled(latents))
    assert len(codes.unique()) > 2


def test_a_codebook_refuses_scales_of_channels():
    with pytest.raises(InputError, match="differs by channel"):
        folded(lazies(made(VQ, 0.0, SCALE)), VQ, 1.0)


@pytest.mark.parametrize("scale", [0.0, float("nan"), float("inf"), -1.0])
def test_a_scale_that_destroys_the_autoencoder_is_refused(scale):
    network = made(KL, 0.0, scale).float()
    with pytest.raises(InputError, match="autoencoder: its latent_shift and latent_scale leave no finite"):
        [value.read() for value in folded(lazies(network), KL, FACTOR).values()]


def test_what_is_the_familys_stays_bit_for_bit():
    network = made(KL, 0.0, FACTOR).float()
    tensors = folded(lazies(network), KL, FACTOR)
    assert tensors.keys() == network.state_dict().keys() - {"latent_shift", "latent_scale"}
    assert all(torch.equal(value.read(), network.state_dict()[name]) for name, value in tensors.items())


def test_statistics_come_from_the_tensors_or_else_the_config():
    network = lazies(made(KL, SHIFT, SCALE).float())
    shift, scale = statistics(network, KL | {"latent_scale": 9.0})
    torch.testing.assert_close(torch.stack([shift, scale]), torch.tensor([SHIFT, SCALE]))
    del network["latent_shift"], network["latent_scale"]
    shift, scale = statistics(network, KL | {"latent_scale": 0.5})
    assert (shift.tolist(), scale.tolist()) == ([0.0] * 4, [0.5] * 4)
    assert one_scale(shift, scale) == 0.5
    assert [one_scale(shift + 1, scale), one_scale(shift, torch.tensor(SCALE))] == [None, None]
