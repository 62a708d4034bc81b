"""The two training steps: golden traces, keys, weights, and what the log records."""

import json
from pathlib import Path

import pytest
import torch

import train
from ldm.autoencoder.losses import ReconstructionLoss
from ldm.checkpoints import native
from ldm.diffusion.denoiser import LogitNormal, MinSNR, Simple, Uniform
from ldm.diffusion.noise_scheduler import VariancePreserving
from ldm.random import keyed_normal, keyed_uniform
from ldm.training.autoencoder_module import AutoencoderModule
from ldm.training.diffusion_module import VALIDATION_TIMES, LatentDiffusionModule
from ldm.training.ema import EMA
from ldm.training.module import MOST_KEPT, Sums
from ldm.training.optim import Constant
from ldm.types import Batch

GOLDEN = Path(__file__).parent / "golden_trace.json"


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.01)


def batch_of(start, size, image_size=16):
    """Deterministic pictures and captions that belong to the places start.. of a run."""
    n = torch.arange(start, start + size)
    grid = torch.arange(image_size)
    image = (
        n[:, None, None, None] * 37 + grid[:, None] * 5 + grid + 80 * torch.arange(3)[:, None, None]
    ) % 256
    return Batch(
        n=n,
        weight=torch.ones(size),
        image=image.to(torch.uint8),
        caption=[f"picture number {k % 7}" for k in n.tolist()],
    )


def diffusion(networks, dtype=torch.float32, **options):
    autoencoder, conditioner, backbone = networks(dtype)
    settings = {"weighting": MinSNR(5.0), "time_distribution": Uniform(), "drop": 0.25, "seed": 3}
    scheduler = VariancePreserving(prediction_type="v_prediction")
    module = LatentDiffusionModule(
        autoencoder,
        conditioner,
        backbone,
        scheduler,
        optimizer=adamw,
        lr_schedule=Constant(),
        **settings | options,
    )
    return module.to(dtype)


def stage1(networks, dtype=torch.float32):
    loss = ReconstructionLoss(l1=1.0, l2=0.5, gradient=0.1, kl=1e-4)
    module = AutoencoderModule(networks(dtype)[0], loss, adamw, Constant(), seed=3, latent_samples=32)
    return module.to(dtype)


def trace(module, steps=20):
    """Losses of plain optimizer steps, batch after batch of the run."""
    optimizer = module.configure_optimizers()
    losses = []
    for step in range(steps):
        loss = module.training_step(batch_of(4 * step, 4), step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("stage", ["autoencoder", "diffusion"])
def test_golden_trace_of_20_steps(stage, networks):
    """A refactoring leaves these numbers alone; a change of the mathematics says so by changing the file."""
    make = stage1 if stage == "autoencoder" else diffusion
    losses = trace(make(networks, torch.float64))
    assert losses == pytest.approx(json.loads(GOLDEN.read_text())[stage], rel=1e-9)


def test_the_loss_of_a_sample_depends_on_its_place_in_the_run_alone(networks):
    module = diffusion(networks, torch.float64)
    whole = batch_of(0, 6)
    parts = [batch_of(0, 2), batch_of(2, 4)]
    expected = sum(module.training_step(part, 0) * len(part) for part in parts) / 6
    torch.testing.assert_close(module.training_step(whole, 0), expected, rtol=1e-12, atol=0)
    assert module.training_step(batch_of(6, 6), 0) != module.training_step(whole, 0)


def test_weight_zero_takes_a_sample_out_and_keeps_the_denominator(networks):
    module = diffusion(networks, torch.float64)
    batch = batch_of(0, 4)
    half = module.training_step(batch_of(0, 2), 0) * 2 / 4
    batch = Batch(n=batch.n, weight=torch.tensor([1.0, 1, 0, 0]), image=batch.image, caption=batch.caption)
    torch.testing.assert_close(module.training_step(batch, 0), half, rtol=1e-12, atol=0)


@pytest.mark.parametrize("drop", [0.0, 0.3, 1.0])
def test_captions_are_dropped_to_null_at_the_stated_rate(drop, networks):
    module = diffusion(networks, drop=drop).train()
    batch = batch_of(0, 1000)
    null = module.conditioner.null(module.conditioner(batch_of(0, 1))).context
    dropped = (module.condition(batch).context == null).flatten(1).all(1).double().mean()
    assert dropped == pytest.approx(drop, abs=0.05)
    module.eval()
    assert not (module.condition(batch).context == null).flatten(1).all(1).any()


def test_the_loss_is_recorded_by_noise_level(networks):
    module = diffusion(networks, weighting=Simple(), time_distribution=LogitNormal())
    module.training_step(batch_of(0, 64), 0)
    sums = {name: each.pair().tolist() for name, each in module.recorded.items()}
    total, count = sums["train/loss"]
    levels = [sums[f"train/loss_t{k}"] for k in range(4)]
    assert count == 64
    assert sum(c for _, c in levels) == 64
    assert sum(c for _, c in levels[1:3]) > 32, "logit-normal times lie in the middle"
    assert sum(t for t, _ in levels) == pytest.approx(total, rel=1e-5)
    means = module.take_recorded()
    assert means["train/loss"] == pytest.approx(total / 64)
    assert module.take_recorded() == {}


def test_validation_uses_fixed_pairs_that_training_never_sees(networks):
    module = diffusion(networks, torch.float64).eval()
    batch = batch_of(0, 2 * VALIDATION_TIMES)
    first, again = (module.validation_terms(batch)["validation/loss"][0] for _ in range(2))
    assert torch.equal(first, again)
    parts = [batch_of(0, VALIDATION_TIMES), batch_of(VALIDATION_TIMES, VALIDATION_TIMES)]
    split = sum(module.validation_terms(part)["validation/loss"][0] for part in parts)
    torch.testing.assert_close(split, first, rtol=1e-12, atol=0)
    module.seed += 1
    assert module.validation_terms(batch)["validation/loss"][0] != first


def test_the_frozen_autoencoder_is_not_in_the_module(networks):
    module = diffusion(networks)
    assert {name.split(".")[0] for name in module.state_dict()} == {"backbone", "conditioner"}
    module.train()
    assert not module.frozen["autoencoder"].training
    module.double()
    assert all(p.dtype == torch.float64 for p in module.frozen["autoencoder"].parameters())
    module.training_step(batch_of(0, 2), 0).backward()
    assert all(p.grad is None for p in module.frozen["autoencoder"].parameters())
    assert all(p.grad is not None for p in module.parameters())


def test_cached_moments_give_the_loss_of_their_pictures(networks):
    module = diffusion(networks, torch.float64)
    batch = batch_of(0, 4)
    moments = module.frozen["autoencoder"].moments(batch.image.double() / 127.5 - 1)
    cached = Batch(n=batch.n, weight=batch.weight, moments=moments, caption=batch.caption)
    torch.testing.assert_close(module.training_step(cached, 0), module.training_step(batch, 0))


@pytest.mark.parametrize(("at_once", "calls"), [(None, [5]), (2, [2, 2, 1]), (8, [5])])
def test_the_frozen_autoencoder_takes_as_many_pictures_as_it_is_told(at_once, calls, networks, monkeypatch):
    whole, module = diffusion(networks), diffusion(networks, encode_batch=at_once)
    autoencoder, seen = module.frozen["autoencoder"], []
    encode = autoencoder.moments
    monkeypatch.setattr(autoencoder, "moments", lambda images: seen.append(len(images)) or encode(images))
    batch = batch_of(0, 5)
    torch.testing.assert_close(module.latents(batch, "posterior"), whole.latents(batch, "posterior"))
    assert seen == calls
    with pytest.raises(ValueError, match="encode_batch=0 is below 1"):
        diffusion(networks, encode_batch=0)


def test_offset_noise_is_in_training_alone_and_in_state_and_target_alike(networks):
    plain, module = diffusion(networks, torch.float64), diffusion(networks, torch.float64, offset_noise=0.3)
    batch = batch_of(0, 6)
    latents = module.latents(batch, "posterior")
    noise = keyed_normal(3, batch.n, "noise", latents.shape[1:]).to(latents)
    offset = keyed_normal(3, batch.n, "offset", (latents.shape[1], 1, 1)).to(latents)
    time = module.noise_scheduler.time_at(keyed_uniform(3, batch.n, "time"))
    conditioning = module.condition(batch)
    expected = module.denoiser.loss(latents, noise + 0.3 * offset, time, conditioning).mean()
    torch.testing.assert_close(module.training_step(batch, 0), expected)
    assert (module.training_step(batch, 0) / plain.training_step(batch, 0) - 1).abs() > 0.01
    for each in (plain, module):
        each.eval()
    assert torch.equal(*(each.validation_terms(batch)["validation/loss"][0] for each in (plain, module)))
    with pytest.raises(ValueError, match="offset_noise=-0.1 is below 0"):
        diffusion(networks, offset_noise=-0.1)


def test_measured_latents_have_unit_variance(networks):
    module = stage1(networks)
    module.ema = EMA(module, 0.9)
    assert module.measure_latents(batch_of(8 * k, 8) for k in range(4)) == 32
    images = batch_of(0, 32).image.float() / 127.5 - 1
    latents = module.autoencoder.encode(images, torch.randn(32, 4, 4, 4))
    assert latents.mean((0, 2, 3)).abs().max() < 0.1
    torch.testing.assert_close(latents.std((0, 2, 3)), torch.ones(4), rtol=0.1, atol=0)
    assert module.autoencoder.latent_scale.unique().numel() == 4, "one scale a channel"


@pytest.mark.parametrize("precision", ["bf16-mixed", "32-true", "64-true"])
def test_a_fused_optimizer_is_clipped_in_every_precision(precision, recipe, tmp_path):
    common = recipe(2, "x", "lr_schedule.warmup=0", "optimizer.fused=true", "trainer.max_steps=2")
    assert train.command([*common, f"trainer.precision={precision}"]) == 0
    newest = native.resolve(tmp_path / "x")
    assert native.load_document(newest, "state.json")["step"] == 2


def test_a_weighting_that_is_zero_where_sampling_starts_is_refused(networks):
    scheduler = VariancePreserving(prediction_type="v_prediction", zero_terminal_snr=True)
    rest = {"weighting": Simple(), "time_distribution": Uniform(), "lr_schedule": Constant()}
    parts = networks()
    with pytest.raises(ValueError, match="weighting Simple is 0 at the noisiest time"):
        LatentDiffusionModule(*parts, scheduler, optimizer=adamw, **rest)


def test_sums_of_many_numbers_are_kept_in_few():
    values = [torch.tensor(float(i), dtype=torch.bfloat16 if i % 2 else torch.float32) for i in range(600)]
    sums = Sums()
    for i, value in enumerate(values):
        sums.add(value, torch.tensor(2.0) if i % 3 else 1.5)
    assert len(sums.totals) < MOST_KEPT
    exact = [sum(float(v) for v in values), sum(2.0 if i % 3 else 1.5 for i in range(600))]
    assert sums.pair().tolist() == exact
    assert sums.pair().tolist() == exact
    many = Sums()
    for part in (values[:300], values[300:]):
        many.extend(part, [torch.tensor(2.0)] * len(part), 0.5)
    assert len(many.totals) == 1
    assert many.pair().tolist() == [exact[0], 1201.0]
