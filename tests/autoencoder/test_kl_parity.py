"""The KL autoencoder against diffusers' AutoencoderKL: same names, same numbers, same gradients."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

from ldm.autoencoder.kl import AutoencoderKL

diffusers = pytest.importorskip("diffusers")


def peer_options(levels: str, **options) -> dict:
    """`levels`: one letter a level, x with attention, o without."""
    return {
        "down_block_types": tuple(
            "AttnDownEncoderBlock2D" if x == "x" else "DownEncoderBlock2D" for x in levels
        ),
        "up_block_types": tuple(
            "AttnUpDecoderBlock2D" if x == "x" else "UpDecoderBlock2D" for x in levels[::-1]
        ),
        **options,
    }


SHAPES = {
    "kl_f8": (
        {"block_out_channels": (16, 32, 64, 64), "norm_groups": 8},
        peer_options("oooo", block_out_channels=(16, 32, 64, 64), layers_per_block=2, norm_num_groups=8),
    ),
    "attention in a level": (
        {
            "block_out_channels": (16, 16, 32),
            "norm_groups": 8,
            "layers_per_block": 1,
            "latent_channels": 6,
            "attention_levels": (False, True, True),
        },
        peer_options(
            "oxx", block_out_channels=(16, 16, 32), layers_per_block=1, norm_num_groups=8, latent_channels=6
        ),
    ),
    "no quant_conv, no middle attention": (
        {"block_out_channels": (16, 32), "norm_groups": 8, "use_quant_conv": False, "mid_attention": False},
        peer_options(
            "oo",
            block_out_channels=(16, 32),
            layers_per_block=2,
            norm_num_groups=8,
            use_quant_conv=False,
            use_post_quant_conv=False,
            mid_block_add_attention=False,
        ),
    ),
}


def relative(a: Tensor, b: Tensor) -> float:
    return float(((a - b).abs().max() / b.abs().max()).detach())


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("name", SHAPES)
def test_forward_and_gradients(name: str) -> None:
    ours_options, theirs_options = SHAPES[name]
    theirs = diffusers.AutoencoderKL(**theirs_options).double()
    with torch.no_grad():
        for i, parameter in enumerate(theirs.parameters()):
            parameter.copy_(0.05 * normal(*parameter.shape, seed=i))
    ours = AutoencoderKL(**ours_options).double()
    ours.load_state_dict(theirs.state_dict(), strict=True)

    size = 2 * ours.factor
    results = []
    for net in (ours, theirs):
        images = normal(2, 3, size, size, seed=1).requires_grad_()
        noise = normal(2, ours.latent_channels, 2, 2, seed=2)
        if net is ours:
            moments = net.moments(images)
            z = net.latents(moments, noise)
            out = net.decode(z)
        else:
            distribution = net.encode(images).latent_dist
            moments = distribution.parameters
            z = distribution.mean + distribution.std * noise
            out = net.decode(z).sample
        assert moments.std() > 0.01
        assert out.std() > 0.01
        (out.square().sum() + moments.square().sum()).backward()
        gradients = {"images": images.grad, **{key: p.grad for key, p in net.named_parameters()}}
        results.append(({"moments": moments, "z": z, "out": out}, gradients))
    (values, gradients), (expected, expected_gradients) = results
    assert gradients.keys() == expected_gradients.keys()
    assert max(relative(values[key], expected[key]) for key in expected) <= 1e-6
    # A bias of the keys adds the same to all scores of a query, which the softmax takes out: no gradient.
    empty = {key for key in gradients if key.endswith("to_k.bias")}
    assert all(gradients[key].abs().max() < 1e-15 for key in empty)
    assert max(relative(gradients[key], expected_gradients[key]) for key in gradients.keys() - empty) <= 1e-6


def test_full_size_kl_f8_names_and_shapes() -> None:
    path = Path(__file__).parents[2] / "configs" / "autoencoder" / "kl_f8.yaml"
    options = OmegaConf.to_container(OmegaConf.load(path))
    del options["_target_"]
    with torch.device("meta"):
        ours: nn.Module = AutoencoderKL(**options)
        theirs = diffusers.AutoencoderKL(
            **peer_options("oooo", block_out_channels=(128, 256, 512, 512), layers_per_block=2)
        )
    names = {key: value.shape for key, value in ours.state_dict().items() if not key.startswith("latent_")}
    assert names == {key: value.shape for key, value in theirs.state_dict().items()}
    assert len(names) == 248
