"""Save and restore the whole run: weights, EMA, optimizer, place in the data. Resume is bit for bit on a CPU.

Our own work rather than Lightning's: its checkpoints are pickles, are not atomic across file systems, and
keep only rank 0's loader. After a signal `Guard` says at which step all ranks save, and end.
"""

from __future__ import annotations

import errno
import json
import logging
import secrets
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from ldm.checkpoints import native
from ldm.checkpoints.lazy import LazyTensor
from ldm.checkpoints.optimizer import flatten_optimizer
from ldm.checkpoints.pieces import files_of, open_pieces, shares
from ldm.checkpoints.run import RunDirectory
from ldm.checkpoints.writer import Part, Writer
from ldm.data.plan import Window, merged
from ldm.errors import InputError
from ldm.training.callbacks.base import StepCallback
from ldm.training.callbacks.guard import Guard
from ldm.training.callbacks.metrics import MetricsLog
from ldm.training.module import TrainingModule
from ldm.training.sharding import load_local, load_local_optimizer, local_state

SOON = 5.0  # seconds after which ranks that wait for a disk ask each other again

log = logging.getLogger(__name__)


class Checkpoints(StepCallback):
    """A checkpoint every `every` optimizer steps and at the end; training goes on while it is written.

    Kept are the newest `keep_last`, those of a multiple of `keep_every` steps, and the best (`keep_best`:
    fields of `native.Best`; the metrics are the newest at the time of the save). Of ranks that all have the
    same, up to `writers` write a share each; sharded ranks write what they have. After `give_up` in a row
    that could not be written the run ends.
    `folder`: where they go. `config`: resolved config as YAML, stored in each. `networks`: frozen networks
    that the run stores, name -> {"sha256", "path"}. `resume`: checkpoint directory to start from. None is
    written while steps fail (`guard`): a run goes back to the weights from before.
    """

    def __init__(
        self,
        folder: Path,
        every: int,
        guard: Guard,
        keep_last: int = 3,
        keep_every: int | None = None,
        keep_best: Mapping[str, Any] | None = None,
        writers: int = 8,
        give_up: int = 3,
        config: str = "",
        networks: dict[str, Any] | None = None,
        resume: Path | None = None,
        metrics: MetricsLog | None = None,
        run: RunDirectory | None = None,
    ) -> None:
        super().__init__(every)
        if keep_last < 1 or writers < 1:
            raise ValueError(f"keep_last={keep_last} and writers={writers} must be at least 1")
        self.folder, self.guard, self.writers, self.give_up = folder, guard, writers, give_up
        self.config, self.networks, self.resume = config, networks or {}, resume
        self.metrics, self.run = metrics, run
        best = native.Best(**keep_best) if keep_best is not None else None
        self.writer = Writer(lambda: native.prune(folder, keep_last, keep_every, best))
        guard.failures = lambda: self.writer.failures
        self.writer.stopped = lambda: guard.failed > max(self._known, self.writer.failures)
        self.skip: list[Window] = []  # places of the data to leap over, beside those of the checkpoint
        self._token = 0  # of the folder that is being written: the same on all ranks
        self._saved_step, self._failed, self._known = -1, 0, 0  # failures in a row; those at the last save
        self._idle = True  # no rank writes
        self._seconds, self._started = 0.0, time.perf_counter()
        self._origin = (0, 0)  # (step, samples) that this process counts from: the batch size may change

    @property
    def seconds(self) -> float:
        """Time spent training up to now, over all restarts, less what was lost."""
        return self._seconds + time.perf_counter() - self._started

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        module = cast(TrainingModule, pl_module)
        if trainer.is_global_zero:
            native.clean(self.folder, alone=True)
        self._token = trainer.strategy.broadcast(secrets.randbits(40))
        state = native.load_state(self.resume) if self.resume is not None else {"step": -1}
        same_step(state["step"], self.folder, trainer)
        if self.resume is not None:
            self.restore(trainer, module, self.resume, state)
        datamodule: Any = getattr(trainer, "datamodule", None)
        if self.skip and datamodule is not None:
            datamodule.skip = merged([*datamodule.skip, *self.skip])
        self._started = time.perf_counter()

    def on_step(self, trainer: pl.Trainer, module: TrainingModule, step: int) -> None:
        number = self.guard.signal
        last = step == trainer.max_steps and not self.guard.rollback
        if self.guard.failed != self._failed:
            self._failed = self.guard.failed
            self._tell(trainer, step)
        if self._failed >= self.give_up:
            self._end()
        if number is not None or last or (step % self.every == 0 and int(module.bad_in_a_row) == 0):
            module.alive("a checkpoint", long=True)
            self.save(trainer, module)
        if number is not None or last:  # the next start or the next stage reads it
            written = self._settled(trainer, module)
            if not written:
                self._saved_step = -1
                self.save(trainer, module)
                written = self._settled(trainer, module)
            if number is not None:
                what = "saved" if written else "could not save"
                log.info("signal %d: %s step %d, the same command goes on from there", number, what, step)
            elif not written:
                self._end()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._settled(trainer, cast(TrainingModule, pl_module))  # before a rollback looks for the newest

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        alone = trainer.world_size > 1 and not isinstance(exception, InputError)  # the others may be gone
        self.writer.wait(timeout=20.0 if alone else self.writer.patience)

    def _settled(self, trainer: pl.Trainer, module: TrainingModule) -> bool:
        """Wait, all ranks alike, until none of them writes; whether what they wrote last is whole.

        They ask each other every few seconds, as a collective that waited for a slow disk would time out. A
        disk that does not answer for `writer.patience` seconds has failed, and that is counted.
        """
        end = time.monotonic() + self.writer.patience
        while True:
            module.alive("the disk", long=True)
            self.writer.wait(timeout=SOON)
            late = time.monotonic() > end
            facts = torch.tensor([self.writer.busy, late, self.writer.failures], device=module.device)
            if trainer.world_size > 1:
                torch.distributed.all_reduce(facts, torch.distributed.ReduceOp.MAX)
            busy, late, failures = facts.tolist()
            if busy and late:
                what = OSError(errno.ETIMEDOUT, "the disk does not answer")
                self.writer.lose(self.folder, trainer.global_step, what)
            if late or not busy:
                self._idle = not busy
                return not (busy or failures)

    def _tell(self, trainer: pl.Trainer, step: int) -> None:
        """Of checkpoints in a row that were not written: a row of the log, and an event of the run."""
        if self.metrics is not None:
            self.metrics.write(trainer, step, {"run/checkpoints_failed": float(self._failed)})
        if self.run is not None and self._failed:
            self.run.event("save_failed", step, self.writer.problem or "another rank")

    def _end(self) -> None:
        what = self.writer.problem or "another rank could not write its part of a checkpoint"
        fix = "free some space: the same command goes on from the checkpoint before"
        raise InputError(f"{self.folder}", what, fix)

    def save(self, trainer: pl.Trainer, module: TrainingModule) -> None:
        """Begin to write the checkpoint of the current step, unless it is there already; on all ranks."""
        step = trainer.global_step
        if step == self._saved_step:
            return
        self._settled(trainer, module)
        if not self._idle:
            return
        self._known = self.guard.failed
        self._token += 1
        self._saved_step, recorded = step, module.recorded_sums()
        datamodule: Any = getattr(trainer, "datamodule", None)
        batch = datamodule.global_batch_size if datamodule is not None else 0
        images = self._origin[1] + (step - self._origin[0]) * batch
        if datamodule is not None:
            datamodule.health.agree(images, module.device)
        assert module.ema is not None
        tensors, settings = flatten_optimizer(trainer.optimizers[0], names_of(module))
        extra_tensors, extra = module.extra_state()
        own = {"model": module.state_dict(), "ema": module.ema.state_dict(), "optimizer": tensors}
        documents: dict[str, Any] = {}
        if trainer.is_global_zero:
            state: dict[str, Any] = {"step": step, "images": images, "seconds": self.seconds}
            state |= {"networks": self.networks, "optimizer": settings, "recorded": recorded, "extra": extra}
            state["metrics"] = dict(self.metrics.latest) if self.metrics is not None else {}
            if hasattr(module, "latents_measured"):
                state["latents_measured"] = module.latents_measured
            scaler = getattr(trainer.precision_plugin, "scaler", None)
            if scaler is not None:
                state["scaler"] = scaler.state_dict()
            data = datamodule.state(images) if datamodule is not None else {}
            documents = {"state.json": as_text(state), "data.json": as_text(data), "config.yaml": self.config}
        rank, ranks = trainer.global_rank, trainer.world_size
        mine, ranks = share(own | extra_tensors, rank, ranks, self.writers)
        if rank < ranks:
            self.writer.submit(Part(self.folder, step, mine, documents, rank, ranks, self._token))

    def restore(self, trainer: pl.Trainer, module: TrainingModule, path: Path, state: dict[str, Any]) -> None:
        """Take up the run at `path`: every rank reads the same files, and takes what it needs of them."""
        load_strict(module, open_pieces(path, "model"), str(path))
        assert module.ema is not None
        module.ema.load_state_dict(read(path, "ema"))
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        if scaler is not None and "scaler" in state:
            scaler.load_state_dict(state["scaler"])
        if hasattr(module, "latents_measured"):
            ends = state["step"] >= trainer.max_steps  # else the weights move on from what was measured
            cast(Any, module).latents_measured = state.get("latents_measured", 0) if ends else 0
        self._origin = (state["step"], state["images"])
        optimizer = trainer.optimizers[0]
        load_local_optimizer(optimizer, names_of(module), read(path, "optimizer"), state["optimizer"])
        module.load_extra_state(partial(native.load_tensors, path), state.get("extra", {}))
        module.recorded = {}
        for name, pair in state["recorded"].items():  # sums over all ranks, which must have the same names
            total, count = pair if trainer.is_global_zero else (0.0, 0.0)
            module.record(name, torch.tensor(total, dtype=torch.float64, device=module.device), count)
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


class NoCheckpoints(Checkpoints):
    """Writes none: for a run that is measured and not kept."""

    def on_step(self, trainer: pl.Trainer, module: TrainingModule, step: int) -> None:
        """Nothing."""


def read(path: Path, name: str) -> dict[str, LazyTensor]:
    """The tensors of a file of a checkpoint, or of its ranks' files; raises InputError if there are none."""
    if not files_of(path, name):
        raise InputError(f"{path / name}.safetensors", "not found")
    return open_pieces(path, name)


def as_text(document: dict[str, Any]) -> str:
    """Now, for what it is made of may change while the checkpoint is written."""
    return json.dumps(document, indent=1) + "\n"


def share(
    tensors: Mapping[str, Mapping[str, Tensor]], rank: int, ranks: int, writers: int
) -> tuple[dict[str, dict[str, Tensor]], int]:
    """(what this rank writes of all tensors by file, how many ranks write)."""
    if any(isinstance(value, DTensor) for values in tensors.values() for value in values.values()):
        return {file: local_state(values) for file, values in tensors.items()}, ranks
    writing = min(ranks, writers)
    sizes = {(file, name): v.nbytes for file, values in tensors.items() for name, v in values.items()}
    owner = shares(sizes, writing)
    mine = {
        file: {name: value for name, value in values.items() if owner[file, name] == rank}
        for file, values in tensors.items()
    }
    return mine, writing


def same_step(step: int, folder: Path, trainer: pl.Trainer) -> None:
    """Raise a RuntimeError on all ranks if they are about to resume from different checkpoints (-1: none)."""
    if trainer.world_size > 1:
        steps = torch.tensor([step, -step], device=trainer.strategy.root_device)
        torch.distributed.all_reduce(steps, torch.distributed.ReduceOp.MAX)
        newest, oldest = int(steps[0]), -int(steps[1])
        if newest != oldest:
            raise RuntimeError(
                f"{folder}: one rank sees step {newest}, another step {oldest} (-1: none); start again"
            )


def names_of(module: TrainingModule) -> dict[torch.nn.Parameter, str]:
    return {p: name for name, p in module.named_parameters() if p.requires_grad}


def load_strict(module: torch.nn.Module, tensors: Mapping[str, LazyTensor], where: str) -> None:
    """Load all of `module`, or say in one line which names or shapes disagree; `where` they come from."""
    require_same(module.state_dict(), tensors, where)
    load_local(module, tensors)


def require_same(own: Mapping[str, Any], found: Mapping[str, Any], where: str) -> None:
    """Raise an InputError unless the tensors of `found` have the names and shapes of `own`."""
    missing, extra = sorted(set(own) - set(found)), sorted(set(found) - set(own))
    shapes = [k for k in own if k in found and tuple(own[k].shape) != tuple(found[k].shape)]
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
            f"{k} has shape {list(found[k].shape)}, the config says {list(own[k].shape)}",
            "use the config that it was trained with",
        )
