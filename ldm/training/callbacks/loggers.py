"""TensorBoard and Weights & Biases beside metrics.csv: the same rows, and the pictures with their prompts.

Not Lightning's loggers: those wait for `self.log`, and know neither what a killed run had logged ahead of its
checkpoint nor the run's record. Here no step is logged twice, whatever was killed and resumed.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import re
import secrets
from collections.abc import Callable, Mapping, Sequence
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


class Logger(Protocol):
    """What `Loggers` talks to, on rank 0 alone."""

    def start(
        self, run: RunDirectory, stage: Stage, config: Mapping[str, Any], step: int, logged: int
    ) -> None:
        """The run goes on after `step`; `logged` is the newest step that this stage ever wrote a row of."""

    def write(self, step: int, values: Mapping[str, float], pictures: Sequence[Picture]) -> None:
        """All of one step at once; steps rise."""

    def close(self, failed: bool) -> None:
        """The last call."""


class Loggers(StepCallback):
    """Hands on what `metrics` was told at a step. A logger that fails is dropped with a warning: training
    goes on, and metrics.csv has all."""

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

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        if trainer.is_global_zero:
            self._active = list(self.loggers)
            step, logged = trainer.global_step, self.metrics.logged
            self._each(lambda logger: logger.start(self.run, self.stage, self.config, step, logged))

    def on_step(self, trainer: pl.Trainer, module: TrainingModule, step: int) -> None:
        values, pictures = self.metrics.take_row()
        if values or pictures:
            self._each(lambda logger: logger.write(step, values, pictures))

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        self._close(failed=True)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._close(failed=False)

    def _close(self, failed: bool) -> None:
        self._each(lambda logger: logger.close(failed))
        self._active = []

    def _each(self, call: Callable[[Logger], None]) -> None:
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
        self, run: RunDirectory, stage: Stage, config: Mapping[str, Any], step: int, logged: int
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

    Never asks and hardly waits: without a key (WANDB_API_KEY or `wandb login`) or an answer of the server the
    run is kept in wandb/ of the stage, for `wandb sync`. WANDB_MODE decides where it is set.
    """

    def __init__(self, project: str = "ldm", entity: str | None = None, tags: Sequence[str] = ()) -> None:
        require("wandb")
        self.project, self.entity, self.tags = project, entity, list(tags)

    def start(
        self, run: RunDirectory, stage: Stage, config: Mapping[str, Any], step: int, logged: int
    ) -> None:
        import wandb

        name, known = stage.name or run.name, run.record().get("wandb", {})
        mine = known.get(name) or {"id": secrets.token_hex(4), "logged": 0}
        if name in known:  # rows up to here were handed over, some after the checkpoint
            mine = {**mine, "logged": max(mine["logged"], logged)}
        self.logged = mine["logged"]
        run.note(wandb={**known, name: mine})
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

    def write(self, step: int, values: Mapping[str, float], pictures: Sequence[Picture]) -> None:
        import wandb

        if step <= self.logged:
            return
        row: dict[str, Any] = dict(values)
        if pictures:
            data = [[p.prompt, step, p.seed, wandb.Image(p.image)] for p in pictures]
            row["samples"] = wandb.Table(columns=["prompt", "step", "seed", "picture"], data=data)
        self.run.log(row, step=step, commit=True)

    def close(self, failed: bool) -> None:
        self.run.finish(exit_code=int(failed))


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
