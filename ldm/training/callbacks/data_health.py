"""What the data gave the run: counts it for the digest, logs what was masked, stops where it is too much."""

from __future__ import annotations

import signal
from typing import Any

import lightning.pytorch as pl

from ldm.data.health import Health
from ldm.errors import InputError
from ldm.training import children
from ldm.training.callbacks.base import StepCallback
from ldm.training.callbacks.metrics import MetricsLog
from ldm.training.module import TrainingModule


class DataHealth(StepCallback):
    """Rows `data/masked/REASON` and `data/shards_given_up` of `metrics`, at its steps, once there are any.

    Goes before `Checkpoints` in the list of callbacks, which stores what is counted here.
    """

    def __init__(self, metrics: MetricsLog) -> None:
        super().__init__(metrics.every)
        self.metrics = metrics
        self._origin = (0, 0)  # (step, samples) from which this process counts

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._origin = (trainer.global_step, datamodule_of(trainer).start)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        health_of(trainer).add(batch)
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_step(self, trainer: pl.Trainer, module: TrainingModule, step: int) -> None:
        if step % self.every == 0:
            health, size = health_of(trainer), datamodule_of(trainer).global_batch_size
            health.agree(self._origin[1] + (step - self._origin[0]) * size, module.device)
            row = {f"data/masked/{reason}": float(count) for reason, count in health.take_row().items()}
            if health.quarantine:
                row["data/shards_given_up"] = float(len(health.quarantine))
            self.metrics.write(trainer, step, row)

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """After an error of this rank alone the others would wait for it: rank 0 ends those it started."""
        shared = isinstance(exception, InputError) and not exception.every_rank  # all ranks raise it
        if isinstance(exception, Exception) and not shared:
            children.remember(trainer.strategy.launcher)
            children.signal_children(signal.SIGKILL)


def datamodule_of(trainer: pl.Trainer) -> Any:
    return trainer.datamodule  # type: ignore[attr-defined]


def health_of(trainer: pl.Trainer) -> Health:
    health: Health = datamodule_of(trainer).health
    return health
