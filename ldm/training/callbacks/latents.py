"""At the last step of stage 1: measure the latent shift and scale, so that the last checkpoint has them."""

from __future__ import annotations

import logging
import math

import lightning.pytorch as pl

from ldm.training.autoencoder_module import AutoencoderModule
from ldm.training.callbacks.base import StepCallback
from ldm.training.module import TrainingModule

log = logging.getLogger(__name__)


class LatentStatistics(StepCallback):
    """Does nothing in other stages."""

    def on_step(self, trainer: pl.Trainer, module: TrainingModule, step: int) -> None:
        if step != trainer.max_steps or not isinstance(module, AutoencoderModule):
            return
        datamodule = trainer.datamodule  # type: ignore[attr-defined]
        micro = trainer.accumulate_grad_batches  # batches no larger than those of training
        count = math.ceil(module.latent_samples / datamodule.global_batch_size) * micro
        stream = datamodule.stream(trainer.global_rank, trainer.world_size, start=0, accumulate=micro)
        batches = (batch.to(module.device) for _, batch in zip(range(count), stream, strict=False))
        log.info("latent shift and scale measured over %d pictures", module.measure_latents(batches))
