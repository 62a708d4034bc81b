"""Stage 1: train the autoencoder, then measure the shift and scale of its latents.

Reconstruction + KL: Rombach et al., "High-resolution image synthesis with latent diffusion models", 2022.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from ldm.random import keyed_normal
from ldm.training.module import LRSchedule, TrainingModule, to_unit
from ldm.types import Batch


class AutoencoderModule(TrainingModule):
    """Trains `autoencoder` under `loss(reconstruction, images, moments) -> ([b], terms)`."""

    def __init__(
        self,
        autoencoder: Any,
        loss: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, dict[str, Tensor]]],
        optimizer: Callable[..., torch.optim.Optimizer],
        lr_schedule: LRSchedule,
        ema_decay: float = 0.999,
        latent_samples: int = 10_000,
        seed: int = 0,
    ) -> None:
        super().__init__(optimizer, lr_schedule, ema_decay, seed)
        self.autoencoder, self.loss = autoencoder, loss
        self.latent_samples = latent_samples
        self.latents_measured = 0  # pictures that the latent shift and scale come from; 0: not yet

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        assert batch.image is not None
        images = to_unit(batch.image, self.dtype)
        side = [size // self.autoencoder.factor for size in images.shape[2:]]
        noise = keyed_normal(self.seed, batch.n, "posterior", (self.autoencoder.latent_channels, *side))
        reconstruction, moments = self.autoencoder(images, noise.to(images))
        losses, terms = self.loss(reconstruction, images, moments)
        for name, value in terms.items():
            self.record(f"train/{name}", value)  # a mean over the batch, damaged samples included
        return (losses * batch.weight).mean()

    def validation_terms(self, batch: Batch) -> dict[str, tuple[Tensor, Tensor]]:
        """PSNR in dB of the decoded mode against the picture, both as 8-bit values, mean over pictures."""
        assert batch.image is not None
        images = to_unit(batch.image, self.dtype)
        reconstruction = self.autoencoder.decode(self.autoencoder.encode(images))
        error = (reconstruction.clamp(-1, 1) - images).float().mul(127.5).square().flatten(1).mean(1)
        psnr = 10 * torch.log10(255**2 / error.clamp_min(1e-10))
        return {"validation/psnr": ((psnr * batch.weight).sum(), batch.weight.sum())}

    @torch.no_grad()
    def measure_latents(self, batches: Iterable[Batch]) -> int:
        """Set the latent shift and scale from posterior samples of the EMA weights; all ranks get the same.

        Sums are float64 and added over ranks; each rank passes its part of `latent_samples` pictures.
        Returns the number of pictures measured.
        """
        assert self.ema is not None
        sums = torch.zeros(3, self.autoencoder.latent_channels, dtype=torch.float64, device=self.device)
        pictures = torch.zeros((), dtype=torch.float64, device=self.device)
        self.autoencoder.set_latent_statistics(torch.zeros_like(sums[0]), torch.ones_like(sums[0]))
        with self.ema.swapped():
            for batch in batches:
                assert batch.image is not None
                moments = self.autoencoder.moments(to_unit(batch.image, self.dtype))
                shape = (moments.shape[1] // 2, *moments.shape[2:])
                noise = keyed_normal(self.seed, batch.n, "latents", shape).to(moments)
                z = self.autoencoder.latents(moments, noise).double() * batch.weight.view(-1, 1, 1, 1)
                count = batch.weight.sum().double() * z.shape[2] * z.shape[3]
                sums += torch.stack([z.sum((0, 2, 3)), z.square().sum((0, 2, 3)), count.expand(z.shape[1])])
                pictures += batch.weight.sum()
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(sums)
            torch.distributed.all_reduce(pictures)
        mean = sums[0] / sums[2]
        std = (sums[1] / sums[2] - mean.square()).clamp_min(1e-12).sqrt()
        self.autoencoder.set_latent_statistics(mean, std)
        self.latents_measured = int(pictures)
        return self.latents_measured
