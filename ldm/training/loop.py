"""The loop over batches: Lightning's, without what each step pays for and nothing here uses.

Lightning's own asks in each step for metrics, a profiler, schedules and validation, and calls every hook of
every callback, whether it has one or not: on a CPU more time than a small network takes. Strategies,
precision, accumulation and the hooks that exist are as ever; a module or callback that has one of `UNCALLED`
is refused. `python -m benchmarks.cpu --only C4` shows it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.plugins.precision import MixedPrecision, Precision
from lightning.pytorch.profilers import PassThroughProfiler
from lightning.pytorch.strategies import DDPStrategy, Strategy
from lightning.pytorch.strategies.parallel import ParallelStrategy
from torch import Tensor

from ldm.errors import InputError
from ldm.training.graphed import GraphedStep
from ldm.training.prefetch import Prefetch
from ldm.training.working_weights import WorkingWeights

UNCALLED = (  # hooks of Lightning that this loop does without
    *("backward", "lr_scheduler_step", "optimizer_zero_grad", "on_before_zero_grad"),
    *("transfer_batch_to_device", "on_before_batch_transfer", "on_after_batch_transfer"),
)
OF_CALLBACKS = ("on_before_backward", "on_after_backward")  # and of callbacks alone it calls these


def install(trainer: Any, module: pl.LightningModule) -> None:
    """Let `trainer` use this loop, unless a profiler wants to hear of all that Lightning does."""
    if isinstance(trainer.profiler, PassThroughProfiler):
        _require(module, pl.LightningModule, (*UNCALLED, *OF_CALLBACKS))
        for callback in trainer.callbacks:
            _require(callback, pl.Callback, UNCALLED)
        old = trainer.fit_loop.epoch_loop
        trainer.fit_loop.epoch_loop = StepLoop(trainer, old.min_steps, old.max_steps)
        trainer.callbacks = [Together(trainer.callbacks)]
        if _is_plain(trainer):
            vars(trainer.strategy)["optimizer_step"] = _stepper(trainer)


def _require(one: Any, base: type, hooks: Sequence[str]) -> None:
    """Raise an InputError if `one` has a hook that would never be called."""
    own = [name for name in hooks if getattr(type(one), name, None) is not getattr(base, name, None)]
    if own:
        fix = "do it in training_step or on_train_batch_start"
        raise InputError(type(one).__name__, f"{own[0]} is not called by ldm's loop", fix)


def _is_plain(trainer: Any) -> bool:
    """Whether nothing but the optimizer is in its step: no scaler of fp16, no strategy's own doing."""
    strategy, precision = trainer.strategy, trainer.precision_plugin
    usual = (Strategy.optimizer_step, DDPStrategy.optimizer_step)  # DDP's averages models, if told to
    asked = getattr(strategy, "_model_averager", None) or getattr(precision, "scaler", None)
    whole = (Precision.optimizer_step, MixedPrecision.optimizer_step)
    return not asked and type(strategy).optimizer_step in usual and type(precision).optimizer_step in whole


def _stepper(trainer: Any) -> Callable[..., Any]:
    """What strategy and precision do at a step, without closures in closures and questions to all hooks."""

    def optimizer_step(optimizer: Any, closure: Callable[[], Any], model: Any = None) -> Any:
        closure()
        (callbacks,), module = trainer.callbacks, trainer.lightning_module
        callbacks.on_before_optimizer_step(trainer, module, optimizer)
        module.on_before_optimizer_step(optimizer)
        module.configure_gradient_clipping(
            optimizer, trainer.gradient_clip_val, trainer.gradient_clip_algorithm
        )
        return optimizer.step()

    return optimizer_step


class Together(pl.Callback):
    """Callbacks as one, that has of each the hooks that it has, in their order."""

    def __init__(self, callbacks: Sequence[pl.Callback]) -> None:
        self.callbacks = list(callbacks)
        for name in dir(pl.Callback):
            if not name.startswith("on_") and name not in ("setup", "teardown"):
                continue
            inherited = getattr(pl.Callback, name)
            own = [getattr(c, name) for c in self.callbacks if getattr(type(c), name) is not inherited]
            if own:
                setattr(self, name, own[0] if len(own) == 1 else _each(own))


def _each(hooks: Sequence[Callable[..., Any]]) -> Callable[..., None]:
    def call(*args: Any, **kwargs: Any) -> None:
        for hook in hooks:
            hook(*args, **kwargs)

    return call


class StepLoop(_TrainingEpochLoop):
    """An endless stream of batches and one optimizer, whose steps Lightning counts."""

    prefetch: Prefetch | None = None
    working: WorkingWeights | None = None  # in bf16, where speed.bf16_weights asks for them
    graphed: GraphedStep | None = None  # forward and backward pass, where speed.cuda_graph asks for it

    @property
    def global_step(self) -> int:
        return self.automatic_optimization.optim_progress.optimizer.step.total.completed

    def advance(self, data_fetcher: Any) -> None:
        trainer, module, progress = self.trainer, self.trainer.lightning_module, self.batch_progress
        (callbacks,) = trainer.callbacks  # type: ignore[attr-defined]
        batch, _, _ = next(data_fetcher)
        progress.is_last_batch = data_fetcher.done
        index = progress.current.ready
        batch = self._on_device(batch, data_fetcher)
        progress.increment_ready()
        callbacks.on_train_batch_start(trainer, module, batch, index)
        module.on_train_batch_start(batch, index)
        progress.increment_started()
        outputs = self._train(batch, index)
        progress.increment_processed()
        callbacks.on_train_batch_end(trainer, module, outputs, batch, index)
        module.on_train_batch_end(outputs, batch, index)
        progress.increment_completed()

    def _on_device(self, batch: Any, data_fetcher: Any) -> Any:
        """The batch where the step computes; a GPU gets the next one meanwhile."""
        device = self.trainer.strategy.root_device
        if device.type != "cuda" and self.prefetch is None:
            return batch if device.type == "cpu" else batch.to(device)
        if self.prefetch is None:
            self.prefetch = Prefetch(device)
        batch = self.prefetch.take(batch)
        if waiting := getattr(data_fetcher, "batches", None):
            self.prefetch.start(waiting[0][0])
        return batch

    def on_advance_end(self, data_fetcher: Any) -> None:
        """Nothing: `Validation` validates, the module knows its schedule."""

    def _train(self, batch: Any, index: int) -> dict[str, Tensor]:
        """Forward and backward pass, and after the last micro-batch the optimizer's step."""
        trainer, module, strategy = self.trainer, self.trainer.lightning_module, self.trainer.strategy
        micro, optimizer = trainer.accumulate_grad_batches, trainer.optimizers[0]
        (callbacks,) = trainer.callbacks  # type: ignore[attr-defined]
        outputs: dict[str, Tensor] = {}

        def closure() -> Tensor:
            if self.graphed is not None:
                outputs["loss"] = self.graphed(batch)
                return outputs["loss"]
            first = index % micro == 0
            with nullcontext() if self.working is None else self.working.used(first):
                loss: Any = strategy.training_step(batch, index)
                loss = loss / micro if micro > 1 else loss
                outputs["loss"] = loss.detach()
                if first:
                    optimizer.zero_grad()
                scaler = getattr(trainer.precision_plugin, "scaler", None)
                loss = scaler.scale(loss) if scaler is not None else loss
                callbacks.on_before_backward(trainer, module, loss)
                loss.backward()
            callbacks.on_after_backward(trainer, module)
            return outputs["loss"]

        if (index + 1) % micro:
            with _unsynchronised(strategy):
                closure()
        else:
            steps = self.automatic_optimization.optim_progress.optimizer.step
            steps.increment_ready()
            module.optimizer_step(trainer.current_epoch, index, optimizer, closure)
            steps.increment_completed()
        return outputs


def _unsynchronised(strategy: Any) -> AbstractContextManager[None]:
    """The ranks' gradients are averaged with the last micro-batch's alone."""
    return strategy.block_backward_sync() if isinstance(strategy, ParallelStrategy) else nullcontext()
