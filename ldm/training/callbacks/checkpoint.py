"""Save and restore the whole run: weights, EMA, optimizer, place in the data. Resume is bit for bit on a CPU.

Our own work rather than Lightning's: its checkpoints are pickles, are not atomic across file systems, and
keep only rank 0's loader. A signal (Ctrl-C, TERM) only sets a flag; the save happens at the end of the step.
"""

from __future__ import annotations

import logging
import signal
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as pl
import torch

from ldm.checkpoints import native
from ldm.checkpoints.optimizer import flatten_optimizer, restore_optimizer
from ldm.errors import InputError
from ldm.training.callbacks.base import StepCallback
from ldm.training.module import TrainingModule

AGREE = 10  # optimizer steps after which the ranks ask each other for signals

log = logging.getLogger(__name__)


class Checkpoints(StepCallback):
    """A checkpoint every `every` optimizer steps and at the end, the newest `keep_last` kept.

    `folder`: where they go. `config`: resolved config as YAML, stored in each. `networks`: frozen networks
    trained here, name -> {"sha256", "path"}. `resume`: checkpoint directory to start from. `init`: checkpoint
    whose weights (EMA where there is one) a new run starts from.
    """

    def __init__(
        self,
        folder: Path,
        every: int,
        keep_last: int = 2,
        config: str = "",
        networks: dict[str, Any] | None = None,
        resume: Path | None = None,
        init: Path | None = None,
    ) -> None:
        super().__init__(every)
        self.folder, self.keep_last = folder, keep_last
        self.config, self.networks, self.resume, self.init = config, networks or {}, resume, init
        self.interrupted: int | None = None  # number of the signal that ended the run
        self._saved_step = -1
        self._seconds, self._started = 0.0, time.perf_counter()
        self._origin = (
            0,
            0,
        )  # (step, samples) from which this process counts: the batch size may have changed

    @property
    def seconds(self) -> float:
        """Time spent training up to now, over all restarts, less what was lost."""
        return self._seconds + time.perf_counter() - self._started

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        module = cast(TrainingModule, pl_module)
        if trainer.is_global_zero:
            native.clean(self.folder)
        if self.resume is not None:
            self.restore(trainer, module, self.resume)
        elif self.init is not None:
            load_weights(module, self.init)
        self._started = time.perf_counter()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Signals: over Lightning's handlers, set just before; it puts back those from before the fit."""
        super().on_train_start(trainer, pl_module)
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, self._flag)

    def _flag(self, number: int, frame: Any) -> None:
        if self.interrupted is not None and number == signal.SIGINT:
            raise SystemExit(128 + number)  # the second Ctrl-C does not wait for the step
        self.interrupted = number

    def on_step(self, trainer: pl.Trainer, module: TrainingModule, step: int) -> None:
        stop = self._stops(trainer, step)
        if step % self.every == 0 or step == trainer.max_steps or stop:
            self.save(trainer, module)
        if stop:
            log.info("signal %d: saved step %d, the same command goes on from here", self.interrupted, step)
            trainer.should_stop = True

    def _stops(self, trainer: pl.Trainer, step: int) -> bool:
        """Whether a signal came: to any of the ranks, so that all of them stop after the same step."""
        if trainer.world_size > 1:
            if step % AGREE and step != trainer.max_steps:
                return False
            number = torch.tensor(self.interrupted or 0, device=trainer.strategy.root_device)
            torch.distributed.all_reduce(number, torch.distributed.ReduceOp.MAX)
            self.interrupted = int(number) or None
        return self.interrupted is not None

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """No rank goes on before the last checkpoint is whole: the next stage reads it."""
        trainer.strategy.barrier()

    def save(self, trainer: pl.Trainer, module: TrainingModule) -> None:
        """Write the checkpoint of the current step, unless it is there already; on rank 0."""
        step = trainer.global_step
        if step == self._saved_step:
            return
        self._saved_step, recorded = step, module.recorded_sums()
        if not trainer.is_global_zero:
            return
        assert module.ema is not None
        datamodule: Any = getattr(trainer, "datamodule", None)
        tensors, settings = flatten_optimizer(trainer.optimizers[0], names_of(module))
        batch = datamodule.global_batch_size if datamodule is not None else 0
        images = self._origin[1] + (step - self._origin[0]) * batch
        state: dict[str, Any] = {"step": step, "images": images}
        state |= {"seconds": self.seconds, "networks": self.networks, "optimizer": settings}
        state["recorded"] = recorded
        if hasattr(module, "latents_measured"):
            state["latents_measured"] = module.latents_measured
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        if scaler is not None:
            state["scaler"] = scaler.state_dict()
        extra_tensors, state["extra"] = module.extra_state()
        own = {"model": module.state_dict(), "ema": module.ema.state_dict(), "optimizer": tensors}
        native.save(
            self.folder,
            step,
            own | extra_tensors,
            {
                "state.json": state,
                "data.json": datamodule.state(images) if datamodule is not None else {},
                "config.yaml": self.config,
            },
        )
        native.prune(self.folder, self.keep_last)

    def restore(self, trainer: pl.Trainer, module: TrainingModule, path: Path) -> None:
        """Take up the run at `path`: every rank reads the same files."""
        state = native.load_document(path, "state.json")
        load_strict(module, native.load_tensors(path, "model"), str(path))
        assert module.ema is not None
        module.ema.load_state_dict(native.load_tensors(path, "ema"))
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        if scaler is not None and "scaler" in state:
            scaler.load_state_dict(state["scaler"])
        if hasattr(module, "latents_measured"):
            ends = state["step"] >= trainer.max_steps  # else the weights move on from what was measured
            cast(Any, module).latents_measured = state.get("latents_measured", 0) if ends else 0
        self._origin = (state["step"], state["images"])
        restore_optimizer(
            trainer.optimizers[0],
            names_of(module),
            native.load_tensors(path, "optimizer"),
            state["optimizer"],
        )
        module.load_extra_state(partial(native.load_tensors, path), state.get("extra", {}))
        for name, entry in state["networks"].items():
            mine = self.networks.get(name, {}).get("sha256")
            if mine is not None and mine != entry["sha256"]:
                raise InputError(
                    f"{name}_from",
                    f"this network has sha256 {mine[:12]}, the run was trained with {entry['sha256'][:12]}",
                    "use the network that the run started with, or a new run_name",
                )
        if trainer.is_global_zero:
            pairs = {
                name: torch.tensor(pair, device=module.device) for name, pair in state["recorded"].items()
            }
            module.recorded = {name: (pair[0], pair[1]) for name, pair in pairs.items()}
        # Lightning derives global_step from this counter; everything else of its loop state is ours or keyed.
        loop = trainer.fit_loop.epoch_loop
        loop.automatic_optimization.optim_progress.optimizer.step.total.completed = state["step"]
        self._saved_step, self._seconds = state["step"], state["seconds"]
        datamodule: Any = getattr(trainer, "datamodule", None)
        if datamodule is not None:
            data = native.load_document(path, "data.json")
            datamodule.check_state(data)
            datamodule.resume_at(data["samples"])
        log.info("resumed from %s: step %s", path, state["step"])


def names_of(module: TrainingModule) -> dict[torch.nn.Parameter, str]:
    return {p: name for name, p in module.named_parameters() if p.requires_grad}


def load_strict(module: torch.nn.Module, tensors: dict[str, torch.Tensor], where: str) -> None:
    """Load all of `module`, or say in one line which names or shapes disagree; `where` they come from."""
    own = module.state_dict()
    missing, extra = sorted(set(own) - set(tensors)), sorted(set(tensors) - set(own))
    shapes = [k for k in own if k in tensors and own[k].shape != tensors[k].shape]
    if missing or extra:
        raise InputError(
            where,
            f"{len(missing)} tensors missing ({missing[:2]}), {len(extra)} unknown ({extra[:2]})",
            "use the config that it was trained with",
        )
    if shapes:
        k = shapes[0]
        raise InputError(
            where,
            f"{k} has shape {list(tensors[k].shape)}, the config says {list(own[k].shape)}",
            "use the config that it was trained with",
        )
    module.load_state_dict(tensors)


def weights_of(path: Path) -> dict[str, torch.Tensor]:
    """Tensors of the module at `path`, with the EMA in the place of what it averages."""
    tensors = native.load_tensors(path, "model")
    if (path / "ema.safetensors").exists():
        tensors |= native.load_tensors(path, "ema")
    return tensors


def load_weights(module: TrainingModule, path: Path) -> None:
    """Weights only, from the EMA where there is one; the new run starts at step 0."""
    load_strict(module, weights_of(path), str(path))
    assert module.ema is not None
    with torch.no_grad():
        for average, parameter in zip(module.ema.average, module.ema.parameters, strict=True):
            average.copy_(parameter)
    log.info("weights from %s", path)
