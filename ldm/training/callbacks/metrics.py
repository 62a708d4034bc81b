"""The log of a run: one row of metrics.csv every so many optimizer steps.

The numbers are summed on the device and read here, once per row: no other step waits for the device.
Beside what the modules record: norms of the parameters and of the optimizer's step, images a second, and
how much of the time went into waiting for data.
"""

from __future__ import annotations

import csv
import io
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as pl
import torch
from PIL import Image
from torch import Tensor

from ldm.checkpoints.files import append_rows, replace
from ldm.training.callbacks.base import StepCallback, spared
from ldm.training.module import TrainingModule
from ldm.training.sharding import local, sharded, total_norm

COLUMNS = ["step", "name", "value"]


@dataclass(frozen=True)
class Picture:
    """What was drawn for `prompt` from `seed`, for the loggers."""

    prompt: str
    seed: int
    image: Image.Image


class MetricsLog(StepCallback):
    """Rows are long-form (step, name, value), so that resuming and new names never break the file.

    `norms`: also those of the parameters and of the step; the rows' steps then keep a copy of the parameters.
    """

    def __init__(self, path: Path, every: int = 50, norms: bool = True) -> None:
        super().__init__(every)
        self.path, self.norms = path, norms
        self.latest: dict[str, float] = {}
        self.closing = ""  # what another callback has to say in the place of `summary`
        self.history: dict[int, dict[str, float]] = {}  # rows of the processes before this one, by step
        self._row: dict[str, float] = {}
        self._pictures: list[Picture] = []
        self._clock, self._waited = (0.0, 0), 0.0  # (time, step) of the last row; seconds waited since
        self._before: list[Tensor] = []  # the parameters before a step that is logged

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._clock, self._waited = (time.perf_counter(), trainer.global_step), 0.0
        cast(TrainingModule, pl_module).batch_ended = self._clock[0]
        if trainer.is_global_zero:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            rows = self._read()
            kept = [row for row in rows if int(row[0]) <= trainer.global_step]  # a killed run logged ahead
            for step, name, value in kept:
                self.history.setdefault(int(step), {})[name] = float(value)
            text = io.StringIO(newline="")
            csv.writer(text).writerows([COLUMNS, *kept])
            replace(self.path, text.getvalue())

    def _read(self) -> list[list[str]]:
        if not self.path.exists():
            return []
        with self.path.open(newline="") as file:
            return [row for row in csv.reader(file) if len(row) == 3 and row[0].isdigit()]

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._waited += time.perf_counter() - cast(TrainingModule, pl_module).batch_ended

    @torch.no_grad()
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        if self.norms and (trainer.global_step + 1) % self.every == 0:
            self._before = [local(p).clone() for p in parameters_of(trainer.optimizers[0])]

    def on_step(self, trainer: pl.Trainer, module: TrainingModule, step: int) -> None:
        if step % self.every == 0:
            if self._before:
                self._record_norms(module, parameters_of(trainer.optimizers[0]))
            values = module.take_recorded()
            now = time.perf_counter()
            seconds, steps = now - self._clock[0], step - self._clock[1]
            batch = getattr(trainer.datamodule, "global_batch_size", 0)  # type: ignore[attr-defined]
            values["perf/images_per_sec"] = steps * batch / seconds
            values["perf/data_wait_percent"] = 100 * self._waited / seconds
            values["train/lr"] = trainer.optimizers[0].param_groups[0]["lr"]
            self._clock, self._waited = (now, step), 0.0
            self.write(trainer, step, values)

    def leave_out(self, seconds: float) -> None:
        """Take time out of the rate of the next row, in which nothing was trained."""
        self._clock = (self._clock[0] + seconds, self._clock[1])

    @torch.no_grad()
    def _record_norms(self, module: TrainingModule, parameters: list[Tensor]) -> None:
        torch._foreach_sub_(self._before, [local(p) for p in parameters])
        steps = [sharded(step, p) for step, p in zip(self._before, parameters, strict=True)]
        module.record("train/update_norm", total_norm(steps))
        module.record("train/param_norm", total_norm(parameters))
        self._before = []

    def summary(self) -> str:
        """The newest validation figure in a few words, else the newest loss."""
        if self.closing:
            return self.closing
        latest = self.latest or {name: float(value) for _, name, value in self._read()}
        shown = {
            "validation/psnr": "PSNR {:.1f} dB",
            "validation/loss": "validation loss {:.4f}",
            "train/loss": "loss {:.4f}",
        }
        return next((text.format(latest[name]) for name, text in shown.items() if name in latest), "")

    def write(self, trainer: pl.Trainer, step: int, values: dict[str, float]) -> None:
        """Append `values` to the file, on rank 0, and keep them for the loggers until the step is over."""
        self.latest |= values
        self._row |= values
        if trainer.is_global_zero and values:
            with spared(f"{self.path}"):
                rows = [(step, name, f"{value:.7g}") for name, value in values.items()]
                append_rows(self.path, COLUMNS, rows)

    def show(self, pictures: Sequence[Picture]) -> None:
        """Keep pictures of this step for the loggers."""
        self._pictures += pictures

    def take_row(self) -> tuple[dict[str, float], list[Picture]]:
        """What was written and shown since the last call."""
        row, pictures = self._row, self._pictures
        self._row, self._pictures = {}, []
        return row, pictures


def parameters_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """All that the optimizer steps."""
    return [p for group in optimizer.param_groups for p in group["params"]]
