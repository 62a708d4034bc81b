"""One line that shows a run: stage, bar, optimizer steps, images a second, time left, loss."""

from __future__ import annotations

import time

import lightning.pytorch as pl
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from ldm.training.callbacks.base import StepCallback, spared
from ldm.training.callbacks.metrics import MetricsLog
from ldm.training.module import TrainingModule

REDRAWN = 0.1  # seconds between two looks of the bar


class ProgressBar(StepCallback):
    """A bar on a terminal; in a file a plain line every `every` steps. Rank 0 only."""

    def __init__(self, stage: str, metrics: MetricsLog, every: int = 200) -> None:
        super().__init__()
        self.stage, self.metrics, self.every = stage, metrics, every
        self.console = Console(stderr=True)
        self._bar: Progress | None = None
        self._shown = 0.0  # when the bar was last told
        self._began, self._first = 0.0, 0  # time and step at which this process began to train

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._began, self._first = time.perf_counter(), trainer.global_step
        if trainer.is_global_zero and self.console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=None),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[figures]}"),
                console=self.console,
                transient=True,
            )
            self._task = self._bar.add_task(
                self.stage, total=trainer.max_steps, completed=trainer.global_step, figures=""
            )
            self._bar.start()

    def on_step(self, trainer: pl.Trainer, module: TrainingModule, step: int) -> None:
        if not trainer.is_global_zero:
            return
        if self._bar is not None:
            now, last = time.perf_counter(), step == trainer.max_steps
            if last or now - self._shown >= REDRAWN:
                self._shown = now
                self._bar.update(self._task, completed=step, figures=self.figures())
        elif step % self.every == 0 or step == trainer.max_steps:
            left = (trainer.max_steps - step) * (time.perf_counter() - self._began) / (step - self._first)
            minutes, seconds = divmod(round(left), 60)
            done = f"{self.stage}  step {step}/{trainer.max_steps}  left {minutes}:{seconds:02d}"
            with spared("the terminal"):  # its session may be gone
                self.console.file.write(f"{done}  {self.figures()}\n")  # print would break lines at 80
                self.console.file.flush()

    def figures(self) -> str:
        """The newest row of the log in a few words."""
        latest = self.metrics.latest
        rate = latest.get("perf/images_per_sec")
        words = [f"{rate:.0f} images/s"] if rate else []
        shown = {
            "train/loss": "loss {:.4f}",
            "validation/loss": "validation {:.4f}",
            "validation/psnr": "PSNR {:.1f} dB",
        }
        return "  ".join(
            words + [text.format(latest[name]) for name, text in shown.items() if name in latest]
        )

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        self.teardown(trainer, pl_module, "fit")  # Lightning skips it, and what went wrong needs the terminal

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
