"""At the last step of stage 1: measure the latent shift and scale, so that the last checkpoint has them."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator
from itertools import islice

import lightning.pytorch as pl

from ldm.training.autoencoder_module import AutoencoderModule
from ldm.training.callbacks.base import StepCallback
from ldm.training.module import TrainingModule
from ldm.types import Batch

log = logging.getLogger(__name__)


class LatentStatistics(StepCallback):
    """Does nothing in other stages."""

    def on_step(self, trainer: pl.Trainer, module: TrainingModule, step: int) -> None:
        if not isinstance(module, AutoencoderModule) or step != trainer.max_steps:
            return
        datamodule = trainer.datamodule  # type: ignore[attr-defined]
        micro = trainer.accumulate_grad_batches  # batches no larger than those of training
        count = math.ceil(module.latent_samples / datamodule.global_batch_size) * micro
        stream = datamodule.stream(trainer.global_rank, trainer.world_size, start=0, accumulate=micro)
        module.alive("measurement of the latents", long=True)
        pictures = module.measure_latents(batches(module, islice(stream, count)))
        log.info("latent shift and scale measured over %d pictures", pictures)


def batches(module: TrainingModule, stream: Iterable[Batch]) -> Iterator[Batch]:
    """On the device, each a sign of life."""
    for batch in stream:
        yield batch.to(module.device)
        module.alive("measurement of the latents")
