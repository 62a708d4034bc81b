"""Both kinds of autoencoder, a perceptual distance and a learnt variance, through both modules."""

from functools import partial

import pytest
import torch
from torch import nn

import ldm
import train
from ldm.autoencoder.losses import ReconstructionLoss
from ldm.autoencoder.perceptual import FeatureDistance
from ldm.autoencoder.vq import AutoencoderVQ, EMAVectorQuantizer, VectorQuantizer
from ldm.checkpoints import native
from ldm.training.autoencoder_module import AutoencoderModule
from ldm.training.diffusion_module import LatentDiffusionModule
from ldm.training.ema import EMA
from ldm.training.optim import Constant
from ldm.types import Batch

SMALL = {"block_out_channels": [8, 8, 8], "layers_per_block": 1, "norm_groups": 4, "mid_attention": False}


def adam(parameters):
    return torch.optim.Adam(parameters, lr=1e-2)


def batch_of(size=4):
    image = torch.randint(0, 256, (size, 3, 16, 16), generator=torch.Generator().manual_seed(0))
    return Batch(
        torch.arange(size), torch.ones(size), image=image.to(torch.uint8), caption=["a picture"] * size
    )


def vq_autoencoder(quantizer=VectorQuantizer):
    torch.manual_seed(0)
    return AutoencoderVQ(partial(quantizer, num_codes=16), latent_channels=4, **SMALL)


def stage1(autoencoder, **options):
    loss = options.pop("loss", ReconstructionLoss())
    return AutoencoderModule(autoencoder, loss, adam, Constant(), seed=3, **options)


@pytest.mark.parametrize("quantizer", [VectorQuantizer, EMAVectorQuantizer])
def test_a_codebook_trains_and_its_latents_are_measured(quantizer):
    module = stage1(vq_autoencoder(quantizer))
    optimizer = module.configure_optimizers()
    before = module.autoencoder.quantize.embedding.weight.clone()
    for step in range(3):
        optimizer.zero_grad()
        module.training_step(batch_of(), step).backward()
        optimizer.step()
        module.ema.update(step)
    assert not torch.equal(module.autoencoder.quantize.embedding.weight, before)
    assert {"train/codebook", "train/usage", "train/perplexity", "train/l1"} <= module.take_recorded().keys()
    trained = {"autoencoder.quantize.embedding.weight"} & set(module.ema.names)
    assert bool(trained) == (quantizer is VectorQuantizer), "running means are an average already"
    assert "autoencoder.quantize.embedding.weight" in module.state_dict()

    module.ema = EMA(module, 0.0)
    assert module.measure_latents([batch_of()]) == 4
    z = module.autoencoder.encode(batch_of().image / 127.5 - 1)
    torch.testing.assert_close(z.mean((0, 2, 3)), torch.zeros(4), rtol=0, atol=1e-4)
    torch.testing.assert_close(z.std((0, 2, 3), correction=0), torch.ones(4), rtol=1e-3, atol=0)


def test_stage_2_trains_on_latents_before_they_are_quantised(networks):
    _, conditioner, backbone = networks(torch.float32)
    from ldm.diffusion.denoiser import Simple, Uniform
    from ldm.diffusion.noise_scheduler import VariancePreserving

    autoencoder = vq_autoencoder()
    module = LatentDiffusionModule(
        autoencoder, conditioner, backbone, VariancePreserving(prediction_type="v_prediction"),
        weighting=Simple(), time_distribution=Uniform(), optimizer=adam, lr_schedule=Constant(),
    )  # fmt: skip
    batch = batch_of()
    expected = autoencoder.encode(batch.image / 127.5 - 1)
    torch.testing.assert_close(module.latents(batch, "posterior"), expected)
    moments = autoencoder.moments(batch.image / 127.5 - 1)
    cached = Batch(batch.n, batch.weight, moments=moments, caption=batch.caption)
    torch.testing.assert_close(module.training_step(cached, 0), module.training_step(batch, 0))


def test_the_perceptual_network_is_frozen_beside_the_module(networks):
    network = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
    distance = FeatureDistance(network, ["2"], [0.0] * 3, [1.0] * 3)
    autoencoder = networks(torch.float64)[0]
    plain, module = (stage1(autoencoder, perceptual=given).double() for given in (None, distance))
    assert module.state_dict().keys() == plain.state_dict().keys()
    module.train()
    assert not network.training
    batch = batch_of()
    loss, without = module.training_step(batch, 0), plain.training_step(batch, 0)
    recorded = module.take_recorded()
    torch.testing.assert_close(
        float((loss - without).detach()), recorded["train/perceptual"], rtol=1e-5, atol=0
    )
    loss.backward()
    assert all(p.grad is None for p in network.parameters())
    assert all(p.grad is not None for p in autoencoder.parameters())


def test_the_learnt_log_variance_is_trained_saved_and_averaged(networks):
    module = stage1(networks(torch.float32)[0], loss=ReconstructionLoss(learn_log_variance=True))
    optimizer = module.configure_optimizers()
    module.training_step(batch_of(), 0).backward()
    optimizer.step()
    module.ema.update(0)
    assert float(module.loss.log_variance.detach()) == pytest.approx(-0.01, rel=1e-3), "R is below 1"
    assert "loss.log_variance" in module.state_dict()
    assert "loss.log_variance" in module.ema.state_dict()
    assert "train/log_variance" in module.take_recorded()


@pytest.mark.slow
def test_a_codebook_of_running_means_travels_from_training_to_loading(tmp_path):
    """By the recipe of the quickstart, with an EMA codebook and a perceptual loss switched on by name."""
    shape = ["autoencoder.block_out_channels=[8,8,8]", "++autoencoder.norm_groups=4"]
    size = ["autoencoder.attention_levels=null", "autoencoder.quantizer.num_codes=32", *shape]
    data = ["data.num_objects=2", f"data.cache_dir={tmp_path}/data", f"run_root={tmp_path}"]
    pytest.importorskip("efficientnet_lite_pytorch")
    argv = ["experiment=quickstart_autoencoder", "debug=fast", "autoencoder=vq_f8", "perceptual=packaged"]
    assert train.command([*argv, *size, *data]) == 0
    (folder,) = (tmp_path / "debug_fast").glob("**/step-000000002")
    saved = native.load_tensors(folder, "model")
    assert not any("perceptual" in name for name in saved)
    autoencoder = ldm.load(folder).autoencoder
    assert int(autoencoder.quantize.updates) == 2
    for name in ("embedding.weight", "counts", "sums"):
        loaded = autoencoder.quantize.state_dict()[name]
        assert torch.equal(loaded, saved[f"autoencoder.quantize.{name}"])
        assert loaded.std() > 0
    assert "train/perceptual" in next((tmp_path / "debug_fast").glob("**/metrics.csv")).read_text()
