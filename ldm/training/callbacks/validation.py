"""Validation with the EMA weights, every so many optimizer steps.

Not Lightning's loop: that counts batches since the start of the process, so a resumed run would validate at
other steps than an uninterrupted one.
"""

from __future__ import annotations

import lightning.pytorch as pl
import torch

from ldm.training.callbacks.base import StepCallback
from ldm.training.callbacks.metrics import MetricsLog
from ldm.training.module import TrainingModule


class Validation(StepCallback):
    """Writes the means of `module.validation_terms` to `metrics`, every `every` steps."""

    def __init__(self, metrics: MetricsLog, every: int) -> None:
        super().__init__(every)
        self.metrics = metrics

    def on_step(self, trainer: pl.Trainer, module: TrainingModule, step: int) -> None:
        if step % self.every == 0:
            self.metrics.write(trainer, step, validate(trainer, module))


@torch.no_grad()
def validate(trainer: pl.Trainer, module: TrainingModule) -> dict[str, float]:
    """Means over the validation data of all ranks, by name; {} without validation data."""
    loader = trainer.datamodule.val_dataloader()  # type: ignore[attr-defined]
    assert module.ema is not None
    training = module.training
    module.eval()
    recorded, module.recorded = module.recorded, {}
    with module.ema.swapped(), trainer.precision_plugin.forward_context():
        for batch in loader:
            for name, (total, count) in module.validation_terms(batch.to(module.device)).items():
                module.record(name, total, count)
    means = module.take_recorded()
    module.recorded = recorded
    module.train(training)
    return means
