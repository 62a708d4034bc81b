"""Stage 1 with a discriminator: weights by hand, steps, accumulation, ranks, resume, and sharper edges."""

import signal
from functools import partial
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader

import train
from ldm.autoencoder.discriminator import PatchDiscriminator, hinge_discriminator, hinge_generator
from ldm.autoencoder.losses import ReconstructionLoss
from ldm.autoencoder.residual import ResidualAutoencoderKL
from ldm.checkpoints import native
from ldm.config import compose, plain
from ldm.data.emoji import EmojiSet
from ldm.data.loader import as_is
from ldm.errors import InputError
from ldm.evaluation.reconstruction import evaluate_reconstruction
from ldm.training.adversarial_module import AdversarialAutoencoderModule
from ldm.training.assembly import build_module
from ldm.training.autoencoder_module import AutoencoderModule
from ldm.training.module import TrainingModule
from ldm.training.optim import Constant
from ldm.training.summary import memory
from ldm.types import Batch

SMALL = [f"discriminator.{setting}" for setting in ("width=8", "layers=1", "norm_groups=4")]
GAN = ["module=autoencoder_gan", "module.latent_samples=12", "discriminator=patchgan", *SMALL]
KINDS = ("model", "ema", "optimizer", "discriminator", "discriminator_optimizer")


def adam(parameters, lr=1e-3):
    return torch.optim.Adam(parameters, lr=lr, betas=(0.5, 0.9))


def adversarial(autoencoder, **options):
    torch.manual_seed(1)
    judge = PatchDiscriminator(width=8, layers=1, norm_groups=4)
    settings = {
        "discriminator": judge,
        "discriminator_optimizer": adam,
        "start": 0,
        "latent_samples": 8,
        "seed": 3,
        "lr_schedule": Constant(),
        "optimizer": adam,
    }
    return AdversarialAutoencoderModule(
        autoencoder,
        ReconstructionLoss(l1=1.0, kl=1e-4),
        discriminator_loss=hinge_discriminator,
        generator_loss=hinge_generator,
        **settings | options,
    )


@pytest.fixture
def batch():
    image = torch.randint(0, 256, (4, 3, 16, 16), generator=torch.Generator().manual_seed(0))
    return Batch(n=torch.arange(4), weight=torch.tensor([1.0, 1, 0, 1]), image=image.to(torch.uint8))


@pytest.fixture
def trainer():
    """What a training step asks of it."""
    return SimpleNamespace(global_step=0, accumulate_grad_batches=1, gradient_clip_val=None)


def test_loss_gradients_and_adaptive_weight_by_hand(networks, batch, trainer):
    module = adversarial(networks()[0], weight=0.7).double()
    module.trainer = trainer
    judge, last = module.discriminator, module.autoencoder.decoder.conv_out.weight
    images, reconstruction, plain = module.reconstruct_and_judge(batch)
    fake = -(judge(reconstruction).flatten(1).mean(1) * batch.weight).mean()
    norms = [torch.autograd.grad(part, last, retain_graph=True)[0].norm() for part in (plain, fake)]
    factor = norms[0] / (norms[1] + 1e-4)
    assert 0.01 < factor < 1e4
    logits = [judge(x).flatten(1) for x in (images, reconstruction.detach())]
    hinge = (1 - logits[0]).relu().mean(1) + (1 + logits[1]).relu().mean(1)
    wanted = torch.autograd.grad((hinge / 2 * batch.weight).mean(), list(judge.parameters()))

    loss = module.training_step(batch, 0)
    torch.testing.assert_close(loss, plain + 0.7 * factor * fake, rtol=1e-6, atol=0)
    for parameter, gradient in zip(judge.parameters(), wanted, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-9, atol=1e-12)
    loss.backward()
    for parameter, gradient in zip(judge.parameters(), wanted, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-9, atol=1e-12)
    assert {"train/adversarial", "train/adaptive_weight", "train/discriminator"} <= set(module.recorded)


def test_the_discriminators_gradient_is_clipped_too(networks, trainer):
    module = adversarial(networks()[0], discriminator_optimizer=partial(torch.optim.SGD, lr=1.0))
    module.trainer = trainer
    trainer.gradient_clip_val = 0.5
    module.configure_optimizers()
    before = [p.detach().clone() for p in module.discriminator.parameters()]
    for p in module.discriminator.parameters():
        p.grad = torch.full_like(p, 3.0)
    module._step_discriminator(0.1)
    moved = [a - p.detach() for a, p in zip(before, module.discriminator.parameters(), strict=True)]
    norm = torch.cat([m.flatten() for m in moved]).norm()
    torch.testing.assert_close(norm, torch.tensor(0.05), rtol=1e-3, atol=0)
    assert all(p.grad is None for p in module.discriminator.parameters())


def test_the_discriminator_moves_with_the_module_and_is_no_part_of_it(networks):
    module = adversarial(networks()[0])
    assert not any("discriminator" in name for name, _ in module.named_parameters())
    assert not any("discriminator" in name for name in module.state_dict())
    module.double()
    assert {p.dtype for p in module.discriminator.parameters()} == {torch.float64}
    module.to(memory_format=torch.channels_last)
    kernel = next(p for p in module.discriminator.parameters() if p.ndim == 4)
    assert kernel.is_contiguous(memory_format=torch.channels_last)


def test_what_is_refused(networks):
    with pytest.raises(ValueError, match="start=-1"):
        adversarial(networks()[0], start=-1)
    with pytest.raises(ValueError, match="discriminator=null"):
        adversarial(networks()[0], discriminator=None)
    module = adversarial(networks()[0])
    module.autoencoder.decoder.conv_out.requires_grad_(False)
    with pytest.raises(InputError, match=r"^parameter_groups: freezes decoder.conv_out"):
        module.configure_optimizers()
    scaled = SimpleNamespace(precision_plugin=SimpleNamespace(scaler=object()))
    module.trainer = scaled
    with pytest.raises(InputError, match=r"^trainer.precision: 16-mixed .*; use bf16-mixed or 32-true$"):
        module.on_fit_start()


def test_before_the_start_it_is_the_plain_module(recipe, tmp_path):
    assert train.command(recipe(1, "plain")) == 0
    assert train.command(recipe(1, "late", *GAN, "module.start=100")) == 0
    a, b = (native.resolve(tmp_path / name) for name in ("plain", "late"))
    for kind in ("model", "ema", "optimizer"):
        assert (a / f"{kind}.safetensors").read_bytes() == (b / f"{kind}.safetensors").read_bytes()


def test_steps_are_those_of_the_autoencoder(recipe, rows, tmp_path):
    argv = recipe(1, "run", *GAN, "module.start=3", "callbacks.metrics.every=1")
    assert train.command(argv) == 0
    path = native.resolve(tmp_path / "run")
    assert native.load_document(path, "state.json")["step"] == 7
    moments = native.load_tensors(path, "discriminator_optimizer")
    assert {int(value) for name, value in moments.items() if name.endswith(".step")} == {4}
    found = [int(row[0]) for row in rows(tmp_path / "run") if row[1] == "train/adversarial"]
    assert found == [4, 5, 6, 7]
    tensors = [native.load_tensors(path, kind) for kind in KINDS]
    saved = sum(v.numel() * v.element_size() for kind in tensors for v in kind.values())
    size = memory(build_module(plain(compose("train", argv)), device="meta"))
    assert size["checkpoint"] == saved, "which the summary knew"


def close(a, b):
    for kind in KINDS:
        found, expected = (native.load_tensors(path, kind) for path in (a, b))
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-8, atol=1e-11)


@pytest.mark.slow
def test_accumulation_changes_nothing_but_rounding(recipe, tmp_path):
    """But for the adaptive weight, which each micro-batch has of its own."""
    more = [*GAN, "module.start=2", "module.adaptive=false", "trainer.precision=64-true"]
    assert train.command(recipe(1, "one", *more)) == 0
    assert train.command(recipe(1, "two", *more, "trainer.accumulate_grad_batches=2")) == 0
    close(*(native.resolve(tmp_path / name) for name in ("two", "one")))


@pytest.mark.slow
def test_resume_in_mid_schedule_is_bit_identical(recipe, monkeypatch, assert_same_run, tmp_path):
    more = [*GAN, "module.start=3"]
    assert train.command(recipe(1, "whole", *more)) == 0
    original, stops = TrainingModule.optimizer_step, [2, 5]

    def optimizer_step(self, *args, **kwargs):
        if stops and self.trainer.global_step == stops[0] - 1:
            stops.pop(0)
            signal.raise_signal(signal.SIGINT)
        original(self, *args, **kwargs)

    monkeypatch.setattr(TrainingModule, "optimizer_step", optimizer_step)
    for code in (130, 130, 0):
        assert train.command(recipe(1, "parts", *more)) == code
    assert_same_run(tmp_path / "parts", tmp_path / "whole")
    a, b = (native.resolve(tmp_path / name) for name in ("parts", "whole"))
    for kind in KINDS:
        assert (a / f"{kind}.safetensors").read_bytes() == (b / f"{kind}.safetensors").read_bytes(), kind


def test_a_run_without_a_discriminator_is_no_state_to_resume(recipe, refused, tmp_path):
    assert train.command(recipe(1, "plain", "trainer.max_steps=3")) == 0
    line = refused(recipe(1, "gan", *GAN, f"resume={tmp_path}/plain"))
    what, fix = "the checkpoint was trained without a discriminator", "init_from= takes weights alone"
    assert line == f"resume: {what}; {fix}"
    assert train.command(recipe(1, "gan2", *GAN, f"init_from={tmp_path}/plain", "trainer.max_steps=3")) == 0


@pytest.mark.slow
def test_two_ranks_are_one_process_with_their_batches(recipe, process, tmp_path):
    """With the adaptive weight, by the gradients of both ranks, and a layer that DDP must not wait for."""
    frozen = "parameter_groups=[{match: 'encoder.conv_in', train: false}]"
    more = [*GAN, "module.start=2", "trainer.precision=64-true", "data.global_batch_size=8", frozen]
    assert train.command(recipe(1, "one", *more)) == 0
    pair = process(recipe(1, "pair", *more, "trainer.devices=2", "trainer.strategy=ddp"))
    output, _ = pair.communicate(timeout=300)
    assert pair.returncode == 0, output
    close(*(native.resolve(tmp_path / name) for name in ("pair", "one")))


def autoencoder():
    torch.manual_seed(0)
    sizes = {"patch_size": 4, "layers_per_block": 1, "norm_groups": 8, "mid_attention": False}
    return ResidualAutoencoderKL(3, [32, 32], **sizes)


def fit(module, batches):
    """Plain steps."""
    trainer = pl.Trainer(
        max_steps=len(batches),
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        gradient_clip_val=1.0,
    )
    trainer.fit(module, DataLoader(batches, batch_size=None, collate_fn=as_is))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:.*num_workers.*")
def test_a_discriminator_sharpens_what_l1_blurs():
    """16 emoji of 32 px at f8: 1.3 times the edge energy of as many steps of L1 alone, and nearly its PSNR.

    Measured: 0.63 of the pictures' edge energy against 0.40, both at 23.4 dB.
    """
    emoji = EmojiSet(image_size=32, num_objects=16)
    pictures = torch.stack([torch.from_numpy(emoji.picture(i, i % 8).copy()) for i in range(16)])
    images = pictures.permute(0, 3, 1, 2).contiguous()
    halves = images.split(8)
    batches = [
        Batch(n=8 * step + torch.arange(8), weight=torch.ones(8), image=halves[step % 2])
        for step in range(300)
    ]
    fast = partial(adam, lr=2e-3)
    first = AutoencoderModule(autoencoder(), ReconstructionLoss(l1=1.0), adam, Constant(), seed=3)
    fit(first, batches[:100])
    scores = {}
    for name in ("l1", "gan"):
        network = autoencoder()
        network.load_state_dict(first.autoencoder.state_dict())
        if name == "l1":
            module = AutoencoderModule(network, ReconstructionLoss(l1=1.0), adam, Constant(), seed=4)
        else:
            judge = PatchDiscriminator(width=16, layers=2, norm_groups=4)
            module = adversarial(network, discriminator=judge, discriminator_optimizer=fast, weight=0.5)
        fit(module, batches[100:])
        scores[name] = evaluate_reconstruction(network, images)
    assert scores["l1"].edge_energy < 0.6
    assert scores["gan"].edge_energy > 1.3 * scores["l1"].edge_energy, scores
    assert scores["gan"].edge_energy < 1.1
    assert scores["gan"].psnr > scores["l1"].psnr - 1.5, scores
