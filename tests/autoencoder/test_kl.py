"""The KL autoencoder by itself: its laws, its sizes, what it refuses. Against a peer: test_kl_parity.py."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from ldm.autoencoder.kl import AutoencoderKL, kl, posterior

CONFIGS = Path(__file__).parents[2] / "configs" / "autoencoder"
TINY = {"block_out_channels": (8, 16), "layers_per_block": 1, "norm_groups": 4}


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def tiny(**options) -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(**{**TINY, **options}).double()


@pytest.mark.parametrize(
    ("name", "parameters", "rounding", "factor"),
    [
        ("kl_f4", 55.31e6, 0.005e6, 4),
        ("kl_f8", 83_653_863, 0, 8),
        ("kl_f16", 69.61e6, 0.005e6, 16),
        ("kl_f32", 103.88e6, 0.005e6, 32),
        ("tiny", 242_327, 0, 4),
    ],
)
def test_published_sizes(name: str, parameters: float, rounding: float, factor: int) -> None:
    options = OmegaConf.to_container(OmegaConf.load(CONFIGS / f"{name}.yaml"))
    module, _, network = options.pop("_target_").rpartition(".")
    with torch.device("meta"):
        net = getattr(importlib.import_module(module), network)(**options)
    assert abs(sum(parameter.numel() for parameter in net.parameters()) - parameters) <= rounding
    assert net.factor == factor
    assert net.latent_channels == options["latent_channels"]


def test_every_config_is_counted() -> None:
    assert {path.stem for path in CONFIGS.glob("kl_*.yaml")} == {"kl_f4", "kl_f8", "kl_f16", "kl_f32"}


def test_posterior_clamps_log_variance_only() -> None:
    moments = torch.tensor([-100.0, 100.0, -100.0, 100.0]).reshape(1, 4, 1, 1)
    mean, log_variance = posterior(moments)
    assert mean.flatten().tolist() == [-100.0, 100.0]
    assert log_variance.flatten().tolist() == [-30.0, 20.0]


def test_posterior_is_float32_at_least() -> None:
    assert posterior(torch.zeros(1, 2, 1, 1, dtype=torch.bfloat16))[0].dtype == torch.float32
    assert posterior(torch.zeros(1, 2, 1, 1, dtype=torch.float64))[0].dtype == torch.float64


def test_kl_against_torch_distributions() -> None:
    moments = normal(3, 8, 2, 5)
    mean, log_variance = moments.chunk(2, dim=1)
    ours = torch.distributions.Normal(mean, (0.5 * log_variance).exp())
    unit = torch.distributions.Normal(torch.zeros_like(mean), torch.ones_like(mean))
    expected = torch.distributions.kl_divergence(ours, unit).sum(dim=(1, 2, 3))
    torch.testing.assert_close(kl(moments), expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(kl(torch.zeros(2, 4, 3, 3)), torch.zeros(2))


def test_latents_are_shifted_and_scaled_samples() -> None:
    net = tiny(latent_channels=2, latent_shift=[1.0, -2.0], latent_scale=[0.5, 4.0])
    moments, noise = normal(3, 4, 2, 2), normal(3, 2, 2, 2, seed=1)
    mean, log_variance = moments.chunk(2, dim=1)
    z = mean + (0.5 * log_variance).exp() * noise
    expected = torch.stack([(z[:, 0] - 1.0) * 0.5, (z[:, 1] + 2.0) * 4.0], dim=1)
    torch.testing.assert_close(net.latents(moments, noise), expected, rtol=1e-12, atol=1e-12)
    mode = torch.stack([(mean[:, 0] - 1.0) * 0.5, (mean[:, 1] + 2.0) * 4.0], dim=1)
    torch.testing.assert_close(net.latents(moments), mode, rtol=1e-12, atol=1e-12)


def test_encode_and_decode_undo_shift_and_scale() -> None:
    net = tiny(latent_shift=0.7, latent_scale=0.18215)
    images, noise = normal(2, 3, 8, 8), normal(2, 4, 4, 4, seed=1)
    reconstruction, terms = net(images, noise)
    latents = net.encode(images, noise)
    torch.testing.assert_close(latents, net.latents(net.moments(images), noise))
    assert terms.keys() == {"kl"}
    assert torch.equal(terms["kl"], kl(net.moments(images)))
    torch.testing.assert_close(net.decode(latents), reconstruction, rtol=1e-6, atol=1e-7)
    assert reconstruction.shape == images.shape
    with pytest.raises(AssertionError):
        torch.testing.assert_close(net.decode(net.encode(images)), reconstruction, rtol=1e-6, atol=1e-7)


def test_measured_statistics_give_unit_variance() -> None:
    net = tiny(latent_scale=3.0)
    images, noise = normal(16, 3, 8, 8), normal(16, 4, 4, 4, seed=1)
    with torch.no_grad():
        z = net.encode(images, noise) / 3.0
        std, mean = torch.std_mean(z, dim=(0, 2, 3))
        decoded = net.decode(3.0 * z)
        net.set_latent_statistics(mean, std)
        std, mean = torch.std_mean(net.encode(images, noise), dim=(0, 2, 3))
        torch.testing.assert_close(mean, torch.zeros_like(mean), rtol=0, atol=1e-6)
        torch.testing.assert_close(std, torch.ones_like(std), rtol=1e-6, atol=0)
        torch.testing.assert_close(net.decode(net.encode(images, noise)), decoded, rtol=1e-6, atol=1e-7)


def test_statistics_travel_in_the_state_dict() -> None:
    net = tiny()
    net.set_latent_statistics(torch.arange(4.0), torch.full((4,), 2.0))
    other = tiny()
    other.load_state_dict(net.state_dict())
    assert other.latent_shift.tolist() == [0.0, 1.0, 2.0, 3.0]
    assert other.latent_scale.tolist() == [0.5] * 4


@pytest.mark.parametrize("prefix", ["", "autoencoder."])
def test_state_dicts_without_statistics_keep_ours(prefix: str) -> None:
    net = tiny(latent_shift=0.25, latent_scale=0.18215)
    foreign = {prefix + k: v for k, v in tiny().state_dict().items() if not k.startswith("latent_")}
    holder = torch.nn.ModuleDict({"autoencoder": net}) if prefix else net
    given = set(foreign)
    holder.load_state_dict(foreign, strict=True)
    assert set(foreign) == given
    assert net.latent_shift.tolist() == [0.25] * 4
    torch.testing.assert_close(net.latent_scale, torch.full((4,), 0.18215, dtype=torch.float64))


def test_rows_of_a_batch_are_independent() -> None:
    net = tiny()
    images = normal(3, 3, 8, 8)
    reconstruction, terms = net(images)
    for i in range(3):
        alone, its_terms = net(images[i : i + 1])
        torch.testing.assert_close(alone, reconstruction[i : i + 1], rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(its_terms["kl"], terms["kl"][i : i + 1], rtol=1e-9, atol=1e-12)


def test_channels_last_in_channels_last_out() -> None:
    net = tiny().to(memory_format=torch.channels_last)
    images = normal(2, 3, 16, 16)
    images = images.to(memory_format=torch.channels_last)
    reconstruction, _ = net(images)
    assert reconstruction.is_contiguous(memory_format=torch.channels_last)
    assert net.moments(images).is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(reconstruction, tiny()(images)[0], rtol=1e-9, atol=1e-12)


def test_bfloat16_autocast() -> None:
    net = tiny().float()
    images = normal(2, 3, 16, 16).float()
    exact = net.encode(images)
    with torch.autocast("cpu", torch.bfloat16):
        latents = net.encode(images)
        decoded = net.decode(latents)
    assert latents.dtype == torch.float32
    assert decoded.isfinite().all()
    assert (latents - exact).std() < 0.03 * exact.std()


def test_forward_never_asks_for_a_value() -> None:
    with torch.device("meta"):
        net = AutoencoderKL(**TINY)
        images = torch.empty(2, 3, 8, 8)
        assert net(images, torch.empty(2, 4, 4, 4))[0].shape == images.shape
        assert net.decode(net.encode(images)).shape == images.shape


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attention_levels": (True,)}, "1.*2"),
        ({"norm_groups": 5}, "8.*5"),
        ({"latent_scale": (1.0, 1.0)}, "2.*4"),
        ({"latent_shift": (0.0,)}, "1.*4"),
    ],
)
def test_impossible_networks_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny(**options)


def test_inputs_that_do_not_fit_are_refused() -> None:
    net = tiny(block_out_channels=(8, 8, 8))
    with pytest.raises(ValueError, match="10.*4"):
        net.moments(normal(1, 3, 8, 10))
    with pytest.raises(ValueError, match=r"\[4, 2, 2\].*\[1, 4, 2, 2\]"):
        net.encode(normal(1, 3, 8, 8), normal(4, 2, 2))
    with pytest.raises(ValueError, match=r"std.*\[3\].*4"):
        net.set_latent_statistics(torch.zeros(4), torch.ones(3))
    with pytest.raises(ValueError, match=r"positive.*0\.0"):
        net.set_latent_statistics(torch.zeros(4), torch.tensor([1.0, 1.0, 0.0, 1.0]))
