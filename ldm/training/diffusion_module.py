"""Stage 2: train the denoiser, and with it a trainable text tower, on latents of a frozen autoencoder.

Reads as the step goes: encode, condition, drop, noise, loss. Every random number is a function of
(seed, n, purpose), so it is the same whatever rank, batch or restart it is drawn in (but for dropout inside
layers: `TrainingModule.on_train_batch_start`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ldm.diffusion.denoiser import Denoiser
from ldm.random import keyed_normal, keyed_uniform
from ldm.training.module import LRSchedule, TrainingModule, to_unit
from ldm.types import Batch, Conditioning, TimeDistribution, Weighting

NOISE_LEVELS = 4  # quarters of the time axis that the loss is logged for
VALIDATION_TIMES = 8  # equidistant times that validation pictures take in turn


def check_widths(autoencoder: Any, conditioner: Any, backbone: Any) -> None:
    """Raise a ValueError unless the backbone takes and gives what the other two networks give and take."""
    channels, joined = autoencoder.latent_channels, conditioner.concat_channels
    for name, more in (("in_channels", joined), ("out_channels", 0)):
        if getattr(backbone, name) != channels + more:
            also = f" and the conditioner joins {more} to them: {channels + more}" if more else ""
            what = f"latents have {channels} channels{also}"
            raise ValueError(f"backbone.{name}={getattr(backbone, name)}, but {what}")
    for name in ("context_dim", "pooled_dim", "num_classes"):
        taken, given = (getattr(network, name, None) for network in (backbone, conditioner))
        if taken != given:
            raise ValueError(f"backbone.{name}={taken}, but conditioner.{name}={given}")


class LatentDiffusionModule(TrainingModule):
    """`batch.weight` 0 takes a sample out of the loss; the denominator stays the batch size."""

    def __init__(
        self,
        autoencoder: Any,
        conditioner: Any,
        backbone: Any,
        noise_scheduler: Any,
        weighting: Weighting,
        time_distribution: TimeDistribution,
        optimizer: Callable[..., torch.optim.Optimizer],
        lr_schedule: LRSchedule,
        drop: float = 0.1,
        ema_decay: float = 0.9999,
        seed: int = 0,
        offset_noise: float = 0.0,
        ema_lengths: Sequence[float] = (),
        encode_batch: int | None = None,
    ) -> None:
        super().__init__(optimizer, lr_schedule, ema_decay, seed, ema_lengths)
        if not 0 <= drop <= 1:
            raise ValueError(f"drop={drop} must be in [0, 1]")
        if offset_noise < 0:
            raise ValueError(f"offset_noise={offset_noise} is below 0")
        if encode_batch is not None and encode_batch < 1:
            raise ValueError(f"encode_batch={encode_batch} is below 1; null encodes the whole batch at once")
        conditioner.use_autoencoder(autoencoder)
        check_widths(autoencoder, conditioner, backbone)
        self.backbone, self.noise_scheduler = backbone, noise_scheduler
        self.keep_frozen("autoencoder", autoencoder)
        if any(p.requires_grad for p in conditioner.parameters()):
            self.conditioner = conditioner
        else:
            self.keep_frozen("conditioner", conditioner)
        self.denoiser = Denoiser(backbone, noise_scheduler, weighting)
        self.time_distribution, self.drop, self.offset_noise = time_distribution, drop, offset_noise
        self.encode_batch = encode_batch
        noisiest = noise_scheduler.time_at(torch.tensor([1 - 2.0**-20]))
        if float(weighting(noise_scheduler, noisiest)) == 0:
            raise ValueError(
                f"weighting {type(weighting).__name__} is 0 at the noisiest time, where sampling starts: "
                "Unweighted or MinSNR trains there"
            )

    @property
    def tokenizer(self) -> Callable[[Sequence[str]], Tensor] | None:
        tokenizer: Callable[[Sequence[str]], Tensor] | None = self._conditioner.tokenizer
        return tokenizer

    @property
    def _conditioner(self) -> Any:
        return self.frozen.get("conditioner") or self.conditioner

    def latents(self, batch: Batch, purpose: str) -> Tensor:
        """Posterior samples of the frozen autoencoder, of the picture or of its cached moments."""
        with torch.no_grad():
            autoencoder: Any = self.frozen["autoencoder"]
            moments = batch.moments
            if moments is None:
                assert batch.image is not None
                parts = batch.image.split(self.encode_batch or len(batch))
                moments = torch.cat([autoencoder.moments(to_unit(part, self.dtype)) for part in parts])
            else:
                moments = moments.to(self.dtype)  # they may be stored in half precision
            shape = (autoencoder.latent_channels, *moments.shape[2:])
            return autoencoder.latents(moments, keyed_normal(self.seed, batch.n, purpose, shape).to(moments))

    def condition(self, batch: Batch) -> Conditioning:
        """Conditioning of the batch, with the null conditioning in a keyed choice of rows."""
        conditioner = self._conditioner
        conditioning: Conditioning = conditioner(batch)
        if self.training and self.drop > 0:
            keep = keyed_uniform(self.seed, batch.n, "drop") >= self.drop
            conditioning = conditioning.where(keep, conditioner.null(conditioning))
        return conditioning

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        latents = self.latents(batch, "posterior")
        conditioning = self.condition(batch)
        noise = keyed_normal(self.seed, batch.n, "noise", latents.shape[1:]).to(latents)
        if self.offset_noise > 0:  # of one value a channel, so that brightness is learnt too
            offset = keyed_normal(self.seed, batch.n, "offset", (latents.shape[1], 1, 1))
            noise = noise + self.offset_noise * offset.to(latents)
        u = keyed_uniform(self.seed, batch.n, "time")
        position = self.time_distribution(self.noise_scheduler, u)
        losses = self.denoiser.loss(latents, noise, self.noise_scheduler.time_at(position), conditioning)
        self._record_by_level(losses, position, batch.weight)
        return (losses * batch.weight).mean()

    def _record_by_level(self, losses: Tensor, position: Tensor, weight: Tensor) -> None:
        losses = losses.detach() * weight
        self.record("train/loss", losses.sum(), weight.sum())
        level = (position * NOISE_LEVELS).long().clamp(0, NOISE_LEVELS - 1)
        one_hot = level[:, None] == torch.arange(NOISE_LEVELS, device=level.device)  # torch's own may wait
        rows = one_hot.to(losses) * weight.to(losses)[:, None]
        totals, counts = losses @ rows, rows.sum(0)
        for k in range(NOISE_LEVELS):
            self.record(f"train/loss_t{k}", totals[k], counts[k])

    def validation_terms(self, batch: Batch) -> dict[str, tuple[Tensor, Tensor]]:
        """Loss on (time, noise) pairs that belong to the picture: equal in every pass, run and world size."""
        batch = replace(batch, n=batch.n + (1 << 62))  # away from the keys of training
        latents = self.latents(batch, "posterior")
        noise = keyed_normal(self.seed, batch.n, "noise", latents.shape[1:]).to(latents)
        position = ((batch.n % VALIDATION_TIMES).to(latents.dtype) + 0.5) / VALIDATION_TIMES
        time = self.noise_scheduler.time_at(position)
        losses = self.denoiser.loss(latents, noise, time, self.condition(batch))
        return {"validation/loss": ((losses * batch.weight).sum(), batch.weight.sum())}
