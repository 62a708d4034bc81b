"""Ends a process whose training stands still: its stacks go into RUN/stacks/, the exit code is 4.

A thread looks for signs of life. Where it cannot run, because C code holds the interpreter's lock, a timer of
faulthandler does its work, which needs no lock, but can only exit with code 1.
"""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import multiprocessing
import os
import signal
import socket
import statistics
import tempfile
import threading
import time
from collections import deque
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, cast

import lightning.pytorch as pl

from ldm.checkpoints.run import RunDirectory
from ldm.errors import HANG
from ldm.training import children
from ldm.training.callbacks.base import StepCallback, spared
from ldm.training.module import TrainingModule

STEPS = 64  # newest steps that the median is of
AGAIN = 8  # steps after which it is taken again
# Steps after long work before the shorter limit counts: other ranks, and the device, may lag behind.
CALM = 10
MARK = "most recent call first"  # in what faulthandler writes

log = logging.getLogger(__name__)


class StepWatchdog(StepCallback):
    """Exit 4 when no sign of life came for max(`at_least` s, `factor` x the median step of this process).

    Until `CALM` steps after the start, or after validation, pictures and saves (of which another rank may see
    nothing but a long step), it is `first` s. Goes before the callbacks that do such work. What the process
    cannot use, stopped or on a suspended machine, does not count; only faulthandler's timer goes on then, so
    one that was stopped for more than a limit ends when it goes on. SIGQUIT (Ctrl-\\) leaves the stacks too,
    before it ends the process.
    """

    def __init__(
        self,
        run: RunDirectory,
        factor: float = 10.0,
        at_least: float = 120.0,
        first: float = 1800.0,
    ) -> None:
        super().__init__()
        for name, value, bound in (("factor", factor, 1), ("at_least", at_least, 0), ("first", first, 0)):
            if value <= bound:
                raise ValueError(f"{name}={value} must be above {bound}")
        self.run = run
        self.factor, self.at_least, self.first = factor, at_least, first
        self.grace = min(30.0, at_least / 4)  # seconds that leaving may take
        self._look = min(1.0, at_least / 20)
        self._seconds: deque[float] = deque(maxlen=STEPS)
        self._usual, self._began = at_least, 0.0
        self._step, self._calm, self._long_works = 0, CALM, 0
        self._file: IO[str] | None = None
        self._thread: threading.Thread | None = None
        self._ended = threading.Event()

    # ---- when

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        children.remember(trainer.strategy.launcher)
        self._open(trainer)
        cast(TrainingModule, pl_module).alive("the start")
        self._ended.clear()
        self._thread = threading.Thread(
            target=self._watch, args=(trainer, pl_module), name="watchdog", daemon=True
        )
        self._thread.start()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        module = cast(TrainingModule, pl_module)
        module.alive("the first training batch")
        self._step, self._calm = trainer.global_step, trainer.global_step + CALM
        self._began, self._long_works = time.monotonic(), module.long_works

    def on_step(self, trainer: pl.Trainer, module: TrainingModule, step: int) -> None:
        module.alive("the end of a step")
        now = time.monotonic()
        self._seconds.append(now - self._began)
        if step % AGAIN == 0 or len(self._seconds) < AGAIN:
            self._usual = max(self.at_least, self.factor * statistics.median(self._seconds))
        self._began, self._step = now, step
        if module.long_works != self._long_works:
            self._calm, self._long_works = step + CALM, module.long_works

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        self._stop()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._stop()
        children.untie()

    def limit(self, module: TrainingModule) -> float:
        """Seconds without a sign of life that are too many now."""
        patient = self._step < self._calm or module.long_works != self._long_works
        return max(self._usual, self.first) if patient else self._usual

    # ---- the thread

    def _watch(self, trainer: pl.Trainer, module: TrainingModule) -> None:
        silent, sign, before = 0.0, module.alive_at, time.monotonic()
        while True:
            limit = self.limit(module)
            if silent > limit:
                if module.alive_at == sign:
                    self._end(trainer, module, silent, limit)
                silent = 0.0  # it came at the last moment
            descriptor = 2 if self._file is None else self._file.fileno()
            faulthandler.dump_traceback_later(limit - silent + self.grace, exit=True, file=descriptor)
            if self._ended.wait(self._look):
                return
            now = time.monotonic()
            passed, before = min(now - before, 10 * self._look), now  # more: the process was stopped
            newest = module.alive_at
            silent, sign = silent + passed if newest == sign else 0.0, newest

    def _end(self, trainer: pl.Trainer, module: TrainingModule, silent: float, limit: float) -> None:
        """Leave the stacks, take the processes that this one started along, exit. Does not return."""
        faulthandler.dump_traceback_later(3 * self.grace, exit=True, file=2)
        last = threading.Timer(2 * self.grace, os._exit, [HANG])  # if a disk holds up what follows
        last.daemon = True
        last.start()
        what = f"no sign of life for {silent:.0f} s (limit {limit:.0f})"
        what += f", at step {self._step}, in {module.doing}"
        self._write(f"\n{_who(trainer)}: {what}\n{_stacks()}")
        log.error("rank %d: %s; stacks are in %s", trainer.global_rank, what, self._path(trainer))
        self.run.event("hang", self._step, f"{what}; {self._path(trainer)}")
        if children.parent() is not None:
            time.sleep(self.grace)  # it ends this process itself, unless it is stopped:
            children.kill_parent()
        if children.signal_children(signal.SIGQUIT):  # they leave their stacks
            children.wait(min(2.0, self.grace / 2))  # no longer: Lightning kills this process when it sees it
            children.signal_children(signal.SIGKILL)
        for worker in multiprocessing.active_children():
            worker.kill()
        os._exit(HANG)

    def _stop(self) -> None:
        if self._thread is not None:
            self._ended.set()
            self._thread.join()
            faulthandler.cancel_dump_traceback_later()
            self._thread = None
            self._close()

    # ---- the file

    def _path(self, trainer: pl.Trainer) -> Path:
        return self.run.path / "stacks" / f"rank-{trainer.global_rank:05d}.txt"

    def _open(self, trainer: pl.Trainer) -> None:
        """There from the start: where faulthandler is needed nothing can be opened any more."""
        path = self._path(trainer)
        with spared(f"{path}"):
            path.parent.mkdir(parents=True, exist_ok=True)
            old = path.read_text(encoding="utf-8") if path.exists() else ""
            self._file = path.open("a", encoding="utf-8")
            if MARK not in old:
                self._file.truncate(0)
            self._write(f"{_who(trainer)}: started; nothing follows unless it stood still\n")
            faulthandler.register(signal.SIGQUIT, file=self._file.fileno(), all_threads=True, chain=True)

    def _write(self, text: str) -> None:
        if self._file is not None:
            with spared(self._file.name):
                self._file.write(text)
                self._file.flush()

    def _close(self) -> None:
        """Leaves the file only if there are stacks in it."""
        if self._file is None:
            return
        faulthandler.unregister(signal.SIGQUIT)
        path, self._file = Path(self._file.name), self._file.close()
        with spared(f"{path}"):
            if MARK not in path.read_text(encoding="utf-8"):
                path.unlink()
                with contextlib.suppress(OSError):  # not empty, or another rank was quicker
                    path.parent.rmdir()


def _who(trainer: pl.Trainer) -> str:
    now = datetime.now(UTC).isoformat(timespec="seconds")
    rank = f"rank {trainer.global_rank} of {trainer.world_size}"
    return f"{now} {rank} on {socket.gethostname()}, pid {os.getpid()}, step {trainer.global_step}"


def _stacks() -> str:
    """Of all threads. By way of a file of its own: the run's disk may be what everybody waits for."""
    with tempfile.TemporaryFile() as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        return file.read().decode(errors="replace")
