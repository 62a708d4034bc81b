"""What guards and logging take of a step: the same training with fewer and with more callbacks, in turn.

`python -m benchmarks.guards --json benchmarks/results/guards.json` (some minutes). The network is as small as
it gets, so that what is around it shows: the absolute figures are microseconds of a step, whatever the model.
W&B has a key and a server that does not answer here (row 21 of the table of faults).
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import harness
from benchmarks.ddp import InMemory
from benchmarks.harness import Measured, Race, Table
from ldm.checkpoints.run import RunDirectory
from ldm.config import build, compose
from ldm.training import assembly
from ldm.training.callbacks.data_health import DataHealth
from ldm.training.callbacks.guard import Guard
from ldm.training.callbacks.heartbeat import Heartbeat
from ldm.training.callbacks.loggers import Loggers
from ldm.training.callbacks.metrics import MetricsLog
from ldm.training.callbacks.progress import ProgressBar
from ldm.training.callbacks.spikes import SpikeLog
from ldm.training.callbacks.throughput import Throughput
from ldm.training.callbacks.watchdog import StepWatchdog
from ldm.training.module import TrainingModule
from ldm.types import Batch

OVERRIDES = ["trainer=cpu", "data=shards", "data.shards=x", "autoencoder_from=x", "run_name=ours"]
SIZE, KEPT, WIDTH, LAYERS = 4, 8, 32, 12
GUARDS = (Guard, StepWatchdog, Heartbeat, SpikeLog)
LOGGING = (MetricsLog, Throughput, DataHealth, ProgressBar)
CONTESTANTS: dict[str, tuple[tuple[type, ...], str]] = {  # callbacks, logger
    "guards and logging": ((*GUARDS, *LOGGING, Loggers), "csv"),
    "neither": ((), "csv"),
    "guards": (GUARDS, "csv"),
    "logging": ((*LOGGING, Loggers), "csv"),
    "guards and logging, W&B unreachable": ((*GUARDS, *LOGGING, Loggers), "wandb"),
}
UNREACHABLE = {"WANDB_API_KEY": "0" * 40, "WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_SILENT": "true"}


class Module(TrainingModule):
    """A stage whose network is a few small layers: a step of a millisecond or two."""

    def __init__(self, cfg: Any) -> None:
        super().__init__(build(cfg.optimizer), lambda step: 1.0, 0.999, seed=0)
        torch.manual_seed(0)
        layers = [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.SiLU()) for _ in range(LAYERS)]
        self.net = nn.Sequential(*layers)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        assert batch.moments is not None
        loss = F.mse_loss(self.net(batch.moments), batch.moments)
        self.record("train/loss", loss)
        return loss


def batches() -> list[Batch]:
    """Kept in memory, from a fixed seed."""
    generator, n = torch.Generator().manual_seed(0), torch.arange(SIZE)
    more: dict[str, Any] = {"hash": n, "reason": [""] * SIZE, "key": [""] * SIZE}
    drawn = [torch.randn(SIZE, WIDTH, generator=generator) for _ in range(KEPT)]
    return [Batch(n, torch.ones(SIZE), moments=values, **more) for values in drawn]


class Clock(pl.Callback):
    """Time between the ends of two optimizer steps; the first waits for what loggers do at the start."""

    def __init__(self, first: int, last: int, loggers: Loggers | None) -> None:
        self.first, self.last, self.loggers = first, last, loggers
        self.begun = self.ended = (0.0, 0.0)

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.global_step == self.first:
            while self.loggers is not None and not self.loggers.idle:
                time.sleep(0.1)
            self.begun = time.perf_counter(), time.process_time()
        if trainer.global_step == self.last:
            self.ended = time.perf_counter(), time.process_time()


@assembly.flags_restored()
def train(kinds: tuple[type, ...], logger: str, first: int, steps: int) -> Measured:
    """One run with the callbacks of these kinds; its first and its last steps are not timed."""
    with tempfile.TemporaryDirectory() as folder:
        cfg = compose("train", [*OVERRIDES, f"logger={logger}"])
        cfg.run_root, cfg.trainer.max_steps = folder, first + steps + 1
        run = RunDirectory(folder, "ours")
        stage = run.stage("")
        stage.folder.mkdir(parents=True)
        callbacks, *_ = assembly.build_callbacks(cfg, run, stage, None)
        kept = [callback for callback in callbacks if isinstance(callback, kinds)]
        loggers = next((callback for callback in kept if isinstance(callback, Loggers)), None)
        clock = Clock(first, first + steps, loggers)
        data, module = InMemory(batches(), SIZE), Module(cfg)
        trainer = assembly.build_trainer(cfg, [*kept, clock], data, module)
        trainer.fit(module, datamodule=data)
    return Measured(steps, clock.ended[0] - clock.begun[0], clock.ended[1] - clock.begun[1])


def differences(race: Race) -> Table:
    """What each adds to a step of "neither", also as a share of a step of 0.2 s."""
    what = "Against the training without guards and logging, within rounds; a row of the log every 50 steps."
    table = harness.added(race, "neither", what)
    table.name, table.columns = "What a step pays", [*table.columns, "wall, of a step of 0.2 s"]
    for row in table.cells:
        row.append(f"{table.values[row[0]]['seconds'] / 1e6 / 0.2:.2%}")
    return table


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.guards", description=__doc__)
    parser.add_argument("--json", type=Path, help="write results here, and the tables beside it")
    parser.add_argument("--rounds", type=int, default=8, help="turns of each contestant")
    parser.add_argument("--steps", type=int, default=1000, help="optimizer steps of a turn")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    os.environ |= UNREACHABLE
    os.environ.pop("WANDB_MODE", None)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    about = harness.facts(["torch", "lightning", "wandb"])
    first = min(100, options.steps)

    def turn(kinds: tuple[type, ...], logger: str) -> Measured:
        return train(kinds, logger, first, options.steps)

    found = harness.race(
        "training of a very small network, one process",
        "Optimizer steps a second with all callbacks and with fewer, one thread.",
        {name: lambda more=more: turn(*more) for name, more in CONTESTANTS.items()},
        rounds=options.rounds,
        unit="steps",
        notes=[f"{options.steps} steps a turn after {first}, {options.rounds} turns each."],
    )
    harness.report(options.json, about, [differences(found), found])
    return 0


if __name__ == "__main__":
    sys.exit(main())
