"""The log of a run: one row of metrics.csv every so many optimizer steps.

The numbers are summed on the device and read here, once per row: no other step waits for the device.
"""

from __future__ import annotations

import csv
import os
import time
from pathlib import Path

import lightning.pytorch as pl

from ldm.training.callbacks.base import StepCallback
from ldm.training.module import TrainingModule


class MetricsLog(StepCallback):
    """Rows are long-form (step, name, value), so that resuming and new names never break the file."""

    def __init__(self, path: Path, every: int = 50) -> None:
        super().__init__(every)
        self.path = path
        self.latest: dict[str, float] = {}
        self._clock = (0.0, 0)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._clock = (time.perf_counter(), trainer.global_step)
        if trainer.is_global_zero:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            rows = self._read()
            kept = [row for row in rows if int(row[0]) <= trainer.global_step]  # a killed run logged ahead
            new = self.path.with_name(f"{self.path.name}.new")
            with new.open("w", newline="") as file:
                csv.writer(file).writerows([["step", "name", "value"], *kept])
            os.replace(new, self.path)

    def _read(self) -> list[list[str]]:
        if not self.path.exists():
            return []
        with self.path.open(newline="") as file:
            return [row for row in csv.reader(file) if len(row) == 3 and row[0].isdigit()]

    def on_step(self, trainer: pl.Trainer, module: TrainingModule, step: int) -> None:
        if step % self.every == 0:
            values = module.take_recorded()
            now = time.perf_counter()
            batch = getattr(trainer.datamodule, "global_batch_size", 0)  # type: ignore[attr-defined]
            values["perf/images_per_sec"] = (step - self._clock[1]) * batch / (now - self._clock[0])
            values["train/lr"] = trainer.optimizers[0].param_groups[0]["lr"]
            self._clock = (now, step)
            self.write(trainer, step, values)

    def summary(self) -> str:
        """The newest validation figure in a few words, else the newest loss."""
        latest = self.latest or {name: float(value) for _, name, value in self._read()}
        shown = {
            "validation/psnr": "PSNR {:.1f} dB",
            "validation/loss": "validation loss {:.4f}",
            "train/loss": "loss {:.4f}",
        }
        return next((text.format(latest[name]) for name, text in shown.items() if name in latest), "")

    def write(self, trainer: pl.Trainer, step: int, values: dict[str, float]) -> None:
        """Append `values` to the file, on rank 0."""
        self.latest |= values
        if trainer.is_global_zero:
            with self.path.open("a", newline="") as file:
                csv.writer(file).writerows([step, name, f"{value:.7g}"] for name, value in values.items())
