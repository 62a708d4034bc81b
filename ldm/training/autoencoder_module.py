"""Stage 1: train the autoencoder, then measure the shift and scale of its latents.

Reconstruction + KL: Rombach et al., "High-resolution image synthesis with latent diffusion models", 2022.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ldm.evaluation.reconstruction import WINDOW, ssim
from ldm.random import keyed_normal
from ldm.training.module import LRSchedule, TrainingModule, to_unit
from ldm.types import Batch


class AutoencoderModule(TrainingModule):
    """Trains `autoencoder`, whose forward gives (reconstruction, terms), under
    `loss(reconstruction, images, terms, perceptual) -> ([b], means to log)`.

    `perceptual(reconstruction, images) -> [b]` is kept frozen beside the module: in no checkpoint.
    """

    def __init__(
        self,
        autoencoder: Any,
        loss: Callable[..., tuple[Tensor, dict[str, Tensor]]],
        optimizer: Callable[..., torch.optim.Optimizer],
        lr_schedule: LRSchedule,
        ema_decay: float = 0.999,
        latent_samples: int = 10_000,
        seed: int = 0,
        perceptual: nn.Module | None = None,
        ema_lengths: Sequence[float] = (),
    ) -> None:
        super().__init__(optimizer, lr_schedule, ema_decay, seed, ema_lengths)
        self.autoencoder, self.loss = autoencoder, loss
        if perceptual is not None:
            self.keep_frozen("perceptual", perceptual)
        self.latent_samples = latent_samples
        self.latents_measured = 0  # pictures that the latent shift and scale come from; 0: not yet

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return self.reconstruct_and_judge(batch)[2]

    def reconstruct_and_judge(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Images [b 3 H W], their reconstruction, and the loss but for an adversarial part."""
        assert batch.image is not None
        images = to_unit(batch.image, self.dtype)
        side = [size // self.autoencoder.factor for size in images.shape[2:]]
        noise = keyed_normal(self.seed, batch.n, "posterior", (self.autoencoder.latent_channels, *side))
        reconstruction, terms = self.autoencoder(images, noise.to(images), batch.weight)
        losses, means = self.loss(reconstruction, images, terms, self.frozen.get("perceptual"))
        for name, value in means.items():
            self.record(f"train/{name}", value)  # a mean over the batch, damaged samples included
        return images, reconstruction, (losses * batch.weight).mean()

    def reconstruct(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The pictures and the decoded modes of their posteriors, clamped, all [b 3 h w] in [-1, 1]."""
        assert batch.image is not None
        images = to_unit(batch.image, self.dtype)
        decoded: Tensor = self.autoencoder.decode(self.autoencoder.encode(images))
        return images, decoded.to(images).clamp(-1, 1)  # bf16 has too few levels to score

    def score(self, images: Tensor, decoded: Tensor, weight: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """PSNR in dB and SSIM against the pictures on the scale of 0..255: sums and counts over pictures."""
        error = (decoded - images).float().mul(127.5).square().flatten(1).mean(1)
        scores = {"psnr": 10 * torch.log10(255**2 / error.clamp_min(1e-10))}
        if min(images.shape[2:]) >= WINDOW:
            scores["ssim"] = ssim(127.5 * (images + 1), 127.5 * (decoded + 1))
        return {f"validation/{name}": ((x * weight).sum(), weight.sum()) for name, x in scores.items()}

    def validation_terms(self, batch: Batch) -> dict[str, tuple[Tensor, Tensor]]:
        return self.score(*self.reconstruct(batch), batch.weight)

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
                shape = (self.autoencoder.latent_channels, *moments.shape[2:])
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
