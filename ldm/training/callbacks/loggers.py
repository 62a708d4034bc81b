"""TensorBoard and Weights & Biases beside metrics.csv: the same rows, and the pictures with their prompts.

Not Lightning's loggers: those wait for `self.log`, and know neither what a killed run had logged ahead of its
checkpoint nor the run's record. Here no step is logged twice, whatever was killed and resumed.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import queue
import re
import secrets
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import lightning.pytorch as pl
import numpy as np

from ldm.checkpoints.run import RunDirectory, Stage
from ldm.errors import InputError
from ldm.training.callbacks.base import StepCallback
from ldm.training.callbacks.metrics import MetricsLog, Picture
from ldm.training.module import TrainingModule

INIT_SECONDS = 10.0  # that W&B's server may take to answer before the run goes on offline
FINISH_SECONDS = 60.0  # that the last rows may take to be sent; they stay on disk

log = logging.getLogger(__name__)


History = Mapping[int, Mapping[str, float]]  # values by name, by step


class Logger(Protocol):
    """What `Loggers` talks to, on rank 0 alone, and in a thread of its own."""

    def start(
        self, run: RunDirectory, stage: Stage, config: Mapping[str, Any], step: int, history: History
    ) -> None:
        """The run goes on after `step`; `history` has the rows up to there, of processes before this one."""

    def write(self, step: int, values: Mapping[str, float], pictures: Sequence[Picture]) -> None:
        """All of one step at once; steps rise."""

    def close(self, failed: bool) -> None:
        """The last call."""


class Loggers(StepCallback):
    """Hands on what `metrics` was told at a step, in a thread: no server, disk or slow import delays a step.

    A logger that fails is dropped with a warning: training goes on, and metrics.csv has all.
    """

    def __init__(
        self,
        loggers: Sequence[Logger],
        metrics: MetricsLog,
        run: RunDirectory,
        stage: Stage,
        config: Mapping[str, Any],
    ) -> None:
        super().__init__()
        self.loggers, self.metrics, self.config = list(loggers), metrics, config
        self.run, self.stage = run, stage
        self._active: list[Logger] = []
        self._calls: queue.SimpleQueue[Callable[[Logger], None] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        if trainer.is_global_zero and self.loggers:
            self._active = list(self.loggers)
            step, history = trainer.global_step, self.metrics.history
            self._calls.put(lambda logger: logger.start(self.run, self.stage, self.config, step, history))
            self._thread = threading.Thread(target=self._work, name="loggers", daemon=True)
            self._thread.start()

    @property
    def idle(self) -> bool:
        """Whether all that was handed on so far is taken."""
        return self._calls.empty()

    def on_step(self, trainer: pl.Trainer, module: TrainingModule, step: int) -> None:
        values, pictures = self.metrics.take_row()
        if self._thread is not None and (values or pictures):
            self._calls.put(lambda logger: logger.write(step, values, pictures))

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        self._close(failed=True)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._close(failed=False)

    def _close(self, failed: bool) -> None:
        """Waits until all rows are handed over, but not for ever."""
        if self._thread is not None:
            self._calls.put(lambda logger: logger.close(failed))
            self._calls.put(None)
            self._thread.join(INIT_SECONDS + FINISH_SECONDS)
            if self._thread.is_alive():
                what = "%s: the last rows were not taken within %.0f s; metrics.csv has all"
                names = ", ".join(type(logger).__name__ for logger in self._active)
                log.warning(what, names, INIT_SECONDS + FINISH_SECONDS)
            self._thread = None

    def _work(self) -> None:
        while (call := self._calls.get()) is not None:
            for logger in list(self._active):
                try:
                    call(logger)
                except Exception as error:  # whatever a foreign package raises
                    self._active.remove(logger)
                    what = f"{type(error).__name__}: {' '.join(str(error).split())}"
                    log.warning("%s gets no more rows: %s", type(logger).__name__, what)


class TensorBoard:
    """Event files in tensorboard/ of the stage: `tensorboard --logdir runs/NAME`."""

    def __init__(self) -> None:
        require("tensorboard")

    def start(
        self, run: RunDirectory, stage: Stage, config: Mapping[str, Any], step: int, history: History
    ) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # What a killed run logged ahead of the checkpoint is purged by every reader.
        self.writer = SummaryWriter(str(stage.folder / "tensorboard"), purge_step=step + 1)

    def write(self, step: int, values: Mapping[str, float], pictures: Sequence[Picture]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)
        lines = ["| | prompt | step | seed |", "|-|-|-|-|"]
        for k, picture in enumerate(pictures):
            self.writer.add_image(f"samples/{k}", np.asarray(picture.image), step, dataformats="HWC")
            lines.append(f"| {k} | {picture.prompt} | {step} | {picture.seed} |")
        if pictures:
            self.writer.add_text("samples", "\n".join(lines), step)
        self.writer.flush()

    def close(self, failed: bool) -> None:
        self.writer.close()


class WeightsAndBiases:
    """One W&B run a stage, its id in run.json, so that the same one goes on after a restart.

    Never asks, and nothing but the end of the run waits for it: without a key (WANDB_API_KEY or `wandb
    login`) or an answer of the server the run is kept in wandb/ of the stage, for `wandb sync`. WANDB_MODE
    decides where it is set.
    """

    def __init__(self, project: str = "ldm", entity: str | None = None, tags: Sequence[str] = ()) -> None:
        require("wandb")
        self.project, self.entity, self.tags = project, entity, list(tags)

    def start(
        self, run: RunDirectory, stage: Stage, config: Mapping[str, Any], step: int, history: History
    ) -> None:
        import wandb

        name = stage.name or run.name
        mine = run.record().get("wandb", {}).get(name) or {"id": secrets.token_hex(4), "logged": 0}
        self.noted = partial(note, run, name, mine["id"])
        self.logged = mine["logged"]  # the newest step that was handed over, maybe after the checkpoint
        self.noted(self.logged)
        # Pictures wait here to be sent; W&B's own choice is the home folder.
        os.environ.setdefault("WANDB_DATA_DIR", str((run.path / "wandb").absolute()))
        settings = wandb.Settings(
            silent=True,
            console="off",
            disable_git=True,  # the remote's address and the command line may hold secrets
            x_disable_meta=True,
            x_save_requirements=False,
            init_timeout=INIT_SECONDS,
            finish_timeout=FINISH_SECONDS,
            x_transaction_log_flush_interval=1.0,  # seconds of rows that a kill may cost
        )
        arguments = {
            "project": self.project,
            "entity": self.entity,
            "tags": self.tags,
            "id": mine["id"],
            "name": "/".join(filter(None, (run.name, stage.name))),
            "group": run.name,
            "config": public(dict(config)),
            "dir": str(stage.folder),
            "resume": "allow",
            "reinit": "create_new",
            "settings": settings,
        }
        try:
            mode: Any = os.environ.get("WANDB_MODE")
            mode = mode or ("online" if wandb.login(prompt=False, verify=False) else "offline")
            self.run = wandb.init(mode=mode, **arguments)
        except wandb.Error as error:
            log.warning("W&B: %s; the run goes on offline", " ".join(str(error).split()))
            wandb.teardown(exit_code=1)  # its service still holds the id
            self.run = wandb.init(mode="offline", **arguments)
        place = f"wandb sync {self.run.settings.sync_dir}" if self.run.offline else self.run.url
        log.info("W&B run %s: %s", mine["id"], place)
        for earlier in sorted(history):  # those that a killed process had not handed over
            self.write(earlier, history[earlier], [])

    def write(self, step: int, values: Mapping[str, float], pictures: Sequence[Picture]) -> None:
        import wandb

        if step <= self.logged:
            return
        row: dict[str, Any] = dict(values)
        if pictures:
            data = [[p.prompt, step, p.seed, wandb.Image(p.image)] for p in pictures]
            row["samples"] = wandb.Table(columns=["prompt", "step", "seed", "picture"], data=data)
        self.noted(step)  # first: a step that is there twice would be worse than one that is missing
        self.run.log(row, step=step, commit=True)

    def close(self, failed: bool) -> None:
        self.run.finish(exit_code=int(failed))


def note(run: RunDirectory, name: str, identity: str, logged: int) -> None:
    """Keep in run.json which W&B run a stage is, and up to which step rows were handed over to it."""
    run.note(wandb={**run.record().get("wandb", {}), name: {"id": identity, "logged": logged}})


def require(package: str) -> None:
    """Raise an InputError unless `package`, of the extra of that name, is installed; does not import it."""
    if importlib.util.find_spec(package) is None:
        fix = f'pip install -e ".[{package}]"'
        raise InputError(f"logger={package}", f"needs the package {package}", fix)


def public(value: Any) -> Any:
    """A config for other people's servers: addresses without user, password and query, and no shell lines."""
    if isinstance(value, Mapping):
        return {key: public(item) for key, item in value.items()}
    if isinstance(value, list):
        return [public(item) for item in value]
    if not isinstance(value, str):
        return value
    value = re.sub(r"(\w+://)[^/\s]*@", r"\1", re.sub(r"^pipe:.*", "pipe:...", value))
    return re.sub(r"(\w+://[^\s?]*)\?\S*", r"\1", value)
