"""When a callback acts: after every k-th completed optimizer step, whatever the accumulation.

What a callback writes it writes under `spared`: no disk stops a step.
"""

from __future__ import annotations

from typing import Any, cast

import lightning.pytorch as pl

from ldm.checkpoints.files import spared
from ldm.training.module import TrainingModule

__all__ = ["StepCallback", "spared"]


class StepCallback(pl.Callback):
    """Calls `on_step(trainer, module, step)` once per completed optimizer step; step counts from 1."""

    def __init__(self, every: int = 1) -> None:
        if every < 1:
            raise ValueError(f"every={every} must be a number of optimizer steps from 1")
        self.every = every
        self._last_step = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._last_step = trainer.global_step  # on_fit_start would be too early: a run is resumed there

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step != self._last_step:
            self._last_step = trainer.global_step
            self.on_step(trainer, cast(TrainingModule, pl_module), trainer.global_step)

    def on_step(self, trainer: pl.Trainer, module: TrainingModule, step: int) -> None:
        """Override."""
