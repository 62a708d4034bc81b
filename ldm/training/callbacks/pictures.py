"""Fixed prompts, fixed noise, EMA weights: the same grid every so many steps, to see the training."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from PIL import Image
from torch import Tensor

from ldm.diffusion.guidance import guided
from ldm.errors import InputError
from ldm.pictures import contact_sheet, to_pil, to_uint8
from ldm.random import keyed_normal
from ldm.training.callbacks.base import StepCallback, spared
from ldm.training.callbacks.metrics import MetricsLog, Picture
from ldm.training.module import TrainingModule, to_unit
from ldm.types import Batch, Conditioning, Sampler

SEED = 0  # of the noise of all pictures of text
ERROR_GAIN = 4  # of the errors that are shown; 1 would be the difference of the values themselves


def save(sheet: Image.Image, path: Path) -> None:
    """Write a sheet; a disk that takes none costs the sheet alone."""
    with spared(f"{path.parent}"):
        path.parent.mkdir(parents=True, exist_ok=True)
        new = path.with_name(f"{path.name}.new")
        sheet.save(new, format="PNG")
        os.replace(new, path)


def give_rows(module: TrainingModule) -> None:
    """What ranks that draw nothing do meanwhile: give rank 0 their rows of sharded averages."""
    assert module.ema is not None
    if module.ema.sharded:
        with module.ema.swapped():
            pass


class TextPictures(StepCallback):
    """Samples `prompts` into folder/step-000001200.png on rank 0; others wait at their next all-reduce."""

    def __init__(
        self,
        folder: Path,
        every: int,
        prompts: Sequence[str],
        image_size: int,
        sampler: Sampler,
        num_steps: int = 30,
        spacing: str = "trailing",
        guidance_scale: float = 3.0,
        guidance_rescale: float = 0.0,
        metrics: MetricsLog | None = None,
    ) -> None:
        super().__init__(every)
        self.metrics = metrics
        self.folder, self.prompts, self.image_size = folder, list(prompts), image_size
        self.sampler, self.num_steps, self.spacing = sampler, num_steps, spacing
        self.guidance_scale, self.guidance_rescale = guidance_scale, guidance_rescale

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        if self.prompts:
            self.rehearse(trainer, pl_module)

    @torch.no_grad()
    def rehearse(self, trainer: pl.Trainer, module: Any) -> None:
        """What prompts, conditioner or sampler refuse, they refuse before the first step, on every rank."""
        nothing = torch.zeros(1, 1, 1, 1)
        try:
            grid = module.noise_scheduler.grid(self.num_steps, self.spacing)
            self.sampler(lambda x, row: nothing, nothing, grid, noise=lambda i: nothing)
            with trainer.precision_plugin.forward_context():
                self.conditionings(module)
        except ValueError as error:
            fix = "give other prompts or another sampler, or none: callbacks.pictures.prompts=[]"
            raise InputError("callbacks.pictures", str(error), fix) from None

    def conditionings(self, module: Any) -> tuple[Conditioning, Conditioning]:
        """That of the prompts, and the one without them."""
        conditioner = module.frozen.get("conditioner") or module.conditioner
        n = torch.arange(len(self.prompts), device=module.device)
        size = torch.full((len(n), 2), self.image_size, device=module.device)
        batch = Batch(n, torch.ones(len(n), device=module.device), caption=self.prompts)
        batch = replace(batch, original_size=size, crop=torch.zeros_like(size), target_size=size)
        conditioning = conditioner(batch)
        return conditioning, conditioner.null(conditioning)

    def on_step(self, trainer: pl.Trainer, module: TrainingModule, step: int) -> None:
        if step % self.every or not self.prompts:
            return
        module.alive("pictures", long=True)  # the other ranks wait for them
        if not trainer.is_global_zero:
            give_rows(module)
        else:
            images = self.sample(trainer, module)
            save(contact_sheet(images, self.prompts), self.folder / f"step-{step:09d}.png")
            if self.metrics is not None:
                pairs = zip(self.prompts, images, strict=True)
                self.metrics.show([Picture(prompt, SEED, image) for prompt, image in pairs])

    @torch.no_grad()
    def sample(self, trainer: pl.Trainer, module: Any) -> list[Image.Image]:
        """Pictures of the prompts from the EMA weights."""
        autoencoder = module.frozen["autoencoder"]
        size = self.image_size // autoencoder.factor
        n = torch.arange(len(self.prompts), device=module.device)
        shape = (autoencoder.latent_channels, size, size)
        grid = module.noise_scheduler.grid(self.num_steps, self.spacing)

        def noise(i: int) -> Tensor:
            return keyed_normal(SEED, n, f"step-{i}", shape).to(module.dtype)

        training = module.training
        module.eval()
        with module.ema.swapped(), trainer.precision_plugin.forward_context():
            conditioning, null = self.conditionings(module)
            scale, rescale = self.guidance_scale, self.guidance_rescale
            denoise = guided(module.denoiser, conditioning, null, scale, rescale)

            def lively(i: int, denoised: Tensor) -> None:
                module.alive("pictures")

            x = keyed_normal(SEED, n, "noise", shape).to(module.dtype) * grid[0].sigma
            images = autoencoder.decode(self.sampler(denoise, x, grid, noise=noise, callback=lively))
        module.train(training)
        return to_pil(to_uint8(images))


class ReconstructionPictures(StepCallback):
    """Held-out pictures, their reconstructions by the EMA weights and the absolute errors, one below another.

    Into folder/step-000001200.png; errors are amplified ERROR_GAIN times, black is none.
    """

    def __init__(
        self, folder: Path, every: int, num_images: int = 8, metrics: MetricsLog | None = None
    ) -> None:
        super().__init__(every)
        self.folder, self.num_images, self.metrics = folder, num_images, metrics

    @torch.no_grad()
    def on_step(self, trainer: pl.Trainer, module: TrainingModule, step: int) -> None:
        if step % self.every:
            return
        module.alive("pictures", long=True)  # the other ranks wait for them
        if not trainer.is_global_zero:
            return give_rows(module)
        batch = next(iter(trainer.datamodule.val_dataloader()), None)  # type: ignore[attr-defined]
        if batch is None:
            return give_rows(module)
        autoencoder: Any = module.autoencoder
        assert module.ema is not None
        images = to_unit(batch.image[: self.num_images].to(module.device), module.dtype)
        with module.ema.swapped(), trainer.precision_plugin.forward_context():
            decoded = autoencoder.decode(autoencoder.encode(images))
        decoded = decoded.clamp(-1, 1)
        error = (decoded - images).abs() * ERROR_GAIN - 1
        rows = [to_pil(to_uint8(row)) for row in (images, decoded, error)]
        prompts = list(batch.caption or [""] * len(images))[: len(images)]
        captions = [[name] * len(images) for name in ("reconstruction", f"error x {ERROR_GAIN}")]
        sheet = contact_sheet(sum(rows, []), sum(captions, prompts), columns=len(images))
        save(sheet, self.folder / f"step-{step:09d}.png")
        if self.metrics is not None:
            columns = to_pil(to_uint8(torch.cat([images, decoded, error], dim=2)))
            pairs = zip(prompts, columns, strict=True)
            self.metrics.show([Picture(prompt, module.seed, column) for prompt, column in pairs])
