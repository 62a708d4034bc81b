"""RUN/heartbeat.json, which tells people and programs elsewhere that the run lives; and the run's events."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from typing import Any

import lightning.pytorch as pl

from ldm.checkpoints.files import replace
from ldm.checkpoints.run import RunDirectory, Stage
from ldm.training.callbacks.base import StepCallback, spared

FILE = "heartbeat.json"


class Heartbeat(StepCallback):
    """Writes the file every `seconds`, on rank 0, in a thread: it goes on while a step is long.

    {"time": seconds since 1970, "host", "pid", "job": SLURM_JOB_ID or null, "step": the newest, "max_steps",
    "stage", "ended": whether this is the last one}. Also notes start, resume, exception and end in run.json.
    """

    def __init__(self, run: RunDirectory, stage: Stage, seconds: float = 30.0) -> None:
        super().__init__()
        if seconds <= 0:
            raise ValueError(f"seconds={seconds} must be above 0")
        self.run, self.stage, self.seconds = run, stage, seconds
        self._thread: threading.Thread | None = None
        self._ended = threading.Event()

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if trainer.is_global_zero:
            self._ended.clear()
            self._thread = threading.Thread(target=self._beat, args=(trainer,), name="heartbeat", daemon=True)
            self._thread.start()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        step = trainer.global_step
        self.run.event("resume" if step else "start", step, self._place())

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.global_step >= trainer.max_steps:
            self.run.event("finished", trainer.global_step, self._place())

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        self.run.event("exception", trainer.global_step, f"{type(exception).__name__}: {exception}"[:500])
        self.teardown(trainer, pl_module, "fit")

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if self._thread is not None:
            self._ended.set()
            self._thread.join(self.seconds)  # a disk that hangs does not keep the run
            self._thread = None

    def _place(self) -> str:
        return " ".join(filter(None, [self.stage.name, f"on {socket.gethostname()}, pid {os.getpid()}"]))

    def _beat(self, trainer: pl.Trainer) -> None:
        path = self.run.path / FILE
        while True:
            ended = self._ended.is_set()
            beat: dict[str, Any] = {"time": time.time(), "host": socket.gethostname(), "pid": os.getpid()}
            beat |= {"job": os.environ.get("SLURM_JOB_ID"), "step": trainer.global_step}
            beat |= {"max_steps": trainer.max_steps, "stage": self.stage.name, "ended": ended}
            with spared(f"{path}"):
                replace(path, json.dumps(beat) + "\n")
            if ended:
                return
            self._ended.wait(self.seconds)
