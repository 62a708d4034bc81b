"""Ends training early, on all ranks after the same step: after a signal, or when step after step fails.

A signal only sets a flag: a handler that did more could wait for ever for ranks that are elsewhere. Every
few steps the ranks ask each other, and hear the answer some steps later: no step waits for another rank or
for the device. Lightning's own handlers, which broadcast where they are called, are not installed.
"""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable, Sequence
from typing import Any, cast

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch import distributed as dist

from ldm.errors import REQUEUE
from ldm.training.callbacks.base import StepCallback
from ldm.training.module import TrainingModule

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)

log = logging.getLogger(__name__)


class Guard(StepCallback):
    """Goes before `Checkpoints` in the list of callbacks, which saves when a signal ends the run.

    `every`, `lag`: the ranks ask each other after so many optimizer steps, and hear so many steps later; one
    process on a CPU knows at once. `rollback_after`: steps in a row whose gradient was not finite, after
    which the run goes back to its last checkpoint (None: never), at most `rollbacks` times to the same one.
    """

    def __init__(
        self, every: int = 4, lag: int = 2, rollback_after: int | None = 10, rollbacks: int = 3
    ) -> None:
        super().__init__(every)
        if lag < 0:
            raise ValueError(f"lag={lag} must be a number of optimizer steps from 0")
        self.lag, self.rollback_after, self.rollbacks = lag, rollback_after, rollbacks
        self.signal: int | None = None  # that ends the run, agreed on by all ranks
        self.rollback = False  # likewise
        self.failed = 0  # checkpoints in a row that were not written, on the rank with the most
        self.failures: Callable[[], int] = lambda: 0  # of this rank
        self._flagged = 0  # the number of the newest signal that this process got
        self._question: Question | None = None
        self._handlers: dict[int, Any] = {}  # those from before the training

    @property
    def exit_code(self) -> int:
        """Of a run that a signal ended, after it was saved: to be started again, but for Ctrl-C."""
        assert self.signal is not None
        return 128 + self.signal if self.signal == signal.SIGINT else REQUEUE

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        vars(cast(Any, trainer)._signal_connector)["register_signal_handlers"] = lambda: None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        if threading.current_thread() is threading.main_thread():
            self._handlers = {number: signal.signal(number, self._flag) for number in SIGNALS}

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """A signal that came after the last question: another stage, or attempt, would not know of it."""
        module, shared = cast(TrainingModule, pl_module), trainer.world_size > 1
        self._hear()
        numbers = [self._flagged, self.failures()]
        self._question = Question(trainer.global_step, numbers, module.bad_in_a_row, module.device, shared)
        self._hear()

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        self.teardown(trainer, pl_module, "fit")  # Lightning skips it then

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        while self._handlers:
            signal.signal(*self._handlers.popitem())

    def _flag(self, number: int, frame: Any) -> None:
        if self._flagged and number == signal.SIGINT:
            raise SystemExit(128 + number)  # the second Ctrl-C does not wait for the step
        self._flagged = number

    def on_step(self, trainer: pl.Trainer, module: TrainingModule, step: int) -> None:
        shared, last = trainer.world_size > 1, step == trainer.max_steps
        if module.on_host and not shared:
            self._learn(self._flagged, self.failures(), int(module.bad_in_a_row))
        else:
            if last or (step % self.every == 0 and self._question is None):
                self._hear()
                numbers = [self._flagged, self.failures()]
                self._question = Question(step, numbers, module.bad_in_a_row, module.device, shared)
            if last or (self._question is not None and step >= self._question.step + self.lag):
                self._hear()
        trainer.should_stop = trainer.should_stop or self.signal is not None or self.rollback

    def _hear(self) -> None:
        if self._question is None:
            return
        question, self._question = self._question, None
        self._learn(*question.answer())

    def _learn(self, number: int, failed: int, bad: int) -> None:
        self.failed = failed
        self.signal = self.signal or number or None
        if self.rollback_after is not None and bad >= self.rollback_after and not self.rollback:
            self.rollback = True
            log.warning("the gradient was not finite %d steps in a row: back to the last checkpoint", bad)


class Question:
    """The largest of each number among all ranks, asked at a step: no wait until `answer`."""

    def __init__(
        self, step: int, numbers: Sequence[int], bad_in_a_row: Tensor, device: torch.device, shared: bool
    ) -> None:
        self.step = step
        asked = torch.stack([*(torch.full_like(bad_in_a_row, n) for n in numbers), bad_in_a_row])
        self._work = dist.all_reduce(asked, dist.ReduceOp.MAX, async_op=True) if shared else None
        self._values, self._event = asked, None
        if device.type == "cuda":
            if self._work is not None:
                self._work.wait()  # the stream waits, not this process
            self._values = torch.empty_like(asked, device="cpu", pin_memory=True)
            self._values.copy_(asked, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def answer(self) -> list[int]:
        """Waits for what is not there yet."""
        if self._event is not None:
            self._event.synchronize()
        elif self._work is not None:
            self._work.wait()
        return [int(value) for value in self._values.numpy()]
