"""How fast a run is, and who is slow: rows beside the losses, and the run's story in log.txt.

All of it is read at the steps that `MetricsLog` writes a row at; no other step waits for the device or for
another rank.
"""

from __future__ import annotations

import logging
import resource
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

import lightning.pytorch as pl
import torch

from ldm.training.callbacks.base import StepCallback
from ldm.training.callbacks.metrics import MetricsLog
from ldm.training.callbacks.stragglers import Laps, own_seconds, slow_ranks
from ldm.training.log import FILE_ONLY
from ldm.training.module import TrainingModule

LINE_ROWS, LINE_SECONDS = 10, 600.0  # a line of log.txt every so many rows, and after so long without one
NAMED_AGAIN = 600.0  # seconds after which the same slow ranks are named again
JUDGED = 10  # steps in a row of the log below which nobody is called slow: chance alone makes such

log = logging.getLogger(__name__)


class Throughput(StepCallback):
    """Goes behind `metrics` in the list of callbacks: its rows are those steps'. `name` is the stage's."""

    def __init__(self, metrics: MetricsLog, cfg: Mapping[str, Any], name: str) -> None:
        super().__init__(metrics.every)
        self.metrics, self.cfg, self.name = metrics, cfg, name
        self.flops: float | None = None  # of a picture; None: not known, or not counted yet
        self._peak: float | None = None
        self._began: tuple[float, int] | None = None  # (time, step) after the first step of this process
        self._rows, self._told = 0, 0.0
        self._laps: Laps | None = None
        self._hosts: list[str] = []
        self._slow: tuple[set[int], float] = (set(), 0.0)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        device = trainer.strategy.root_device
        self._began, self._rows = None, 0
        self._peak = self._peak_of(device) if trainer.is_global_zero else None
        self._hosts = [socket.gethostname()]
        if trainer.world_size > 1:
            self._hosts = [""] * trainer.world_size
            torch.distributed.all_gather_object(self._hosts, socket.gethostname())
            self._laps = Laps(device)
        if trainer.is_global_zero:
            what = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
            nodes = f" on {len(set(self._hosts))} hosts" if len(set(self._hosts)) > 1 else ""
            where = f"{trainer.world_size} x {what}{nodes}, rank 0 on {self._hosts[0]}"
            self._say("%s: after step %d of %d, %s", self.name, trainer.global_step, trainer.max_steps, where)

    @staticmethod
    def _peak_of(device: torch.device) -> float | None:
        from ldm.training.flops import peak_flops  # late: it builds modules, as `assembly` does, its importer

        return peak_flops(device)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._peak and self.flops is None:
            began = time.perf_counter()
            self.flops = self._count(batch, trainer.global_step)
            self.metrics.leave_out(time.perf_counter() - began)
        if self._laps is not None:
            self._laps.batch_starts()

    def _count(self, batch: Any, step: int) -> float:
        """FLOPs of a picture; 0 where a network cannot be counted, which is no reason to stop a run."""
        from ldm.training.flops import flops_per_image

        try:
            return flops_per_image(self.cfg, batch, step)
        except Exception as error:
            log.warning("perf/mfu is left out: FLOPs not counted (%s: %s)", type(error).__name__, error)
            return 0.0

    def on_before_backward(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: torch.Tensor
    ) -> None:
        if self._laps is not None:
            self._laps.forward_ends()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._laps is not None:
            self._laps.batch_ends(step_ends=trainer.global_step != self._last_step)
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_step(self, trainer: pl.Trainer, module: TrainingModule, step: int) -> None:
        now = time.perf_counter()
        if self._began is None:
            self._began = (now, step)  # the first step compiles and warms up: it says nothing about the rest
        if step % self.every == 0:
            row = self._row(trainer, step, now)
            if self._laps is not None:
                row["perf/slowest_rank_ratio"] = self._compare(trainer, self._laps)
            self.metrics.write(trainer, step, row)
            if trainer.is_global_zero:
                self._tell(step, trainer.max_steps, now)

    def _row(self, trainer: pl.Trainer, step: int, now: float) -> dict[str, float]:
        each = self.metrics.latest["perf/images_per_sec"] / trainer.world_size
        row = {"perf/images_per_sec_per_gpu": each, "perf/memory_gb": memory(trainer.strategy.root_device)}
        if self._peak and self.flops:
            row["perf/mfu"] = each * self.flops / self._peak
        assert self._began is not None
        if step > self._began[1]:
            left = (now - self._began[0]) / (step - self._began[1]) * (trainer.max_steps - step)
            row["perf/hours_left"] = left / 3600
        return row

    # ---- slow ranks

    def _compare(self, trainer: pl.Trainer, laps: Laps) -> float:
        """The slowest rank's speed over the fastest's; one all-gather. Rank 0 names those that are slow."""
        steps, mine = len(laps.steps), laps.take()
        here = torch.tensor(mine, dtype=torch.float64, device=trainer.strategy.root_device)
        gathered = [torch.empty_like(here) for _ in range(trainer.world_size)]
        torch.distributed.all_gather(gathered, here)
        ranks = torch.stack(gathered).tolist()
        own = own_seconds(ranks)
        if trainer.is_global_zero and steps >= min(JUDGED, self.every):
            self._name(slow_ranks(own), own, ranks)
        return min(own) / max(own) if max(own) > 0 else 1.0

    def _name(self, slow: set[int], own: Sequence[float], ranks: Sequence[Sequence[float]]) -> None:
        now = time.perf_counter()
        if not slow or (slow == self._slow[0] and now - self._slow[1] < NAMED_AGAIN):
            return
        self._slow = (slow, now)
        usual = median(forward for _, forward, _ in ranks)
        for rank in sorted(slow):
            step, forward, wait = ranks[rank]
            log.warning(
                "slow: rank %d on %s works %.3g s a step, the fastest rank %.3g s "
                "(forward pass %.3g s, median of all ranks %.3g s; waits for data %.3g s of a step's %.3g s)",
                *(rank, self._hosts[rank], own[rank], min(own), forward, usual, wait, step),
            )

    # ---- the story

    def _tell(self, step: int, last: int, now: float) -> None:
        """Into log.txt at the first row, every tenth, the last, and where the last line is old."""
        due = self._rows % LINE_ROWS == 0 or now - self._told >= LINE_SECONDS or step + self.every > last
        self._rows += 1
        if due:
            self._told = now
            self._say("%s", story(self.name, step, last, self.metrics.latest))

    def _say(self, text: str, *values: Any) -> None:
        log.info(text, *values, extra={FILE_ONLY: True})  # on a terminal the bar says it


def story(name: str, step: int, last: int, row: Mapping[str, float]) -> str:
    """One line of the figures that a reader looks for first."""
    words = [f"{name}: step {step:,} of {last:,}"]
    shown = {
        "train/loss": "loss {:.4f}",
        "perf/images_per_sec": "{:,.1f} images/s",
        "perf/mfu": "MFU {:.1%}",
        "perf/data_wait_percent": "data wait {:.0f} %",
    }
    words += [text.format(row[key]) for key, text in shown.items() if key in row]
    if "perf/hours_left" in row:
        words.append(f"left {clock(3600 * row['perf/hours_left'])}")
    return "  ".join(words)


def clock(seconds: float) -> str:
    """As h:mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


def memory(device: torch.device) -> float:
    """GB (of 1e9 bytes) at the most up to now: of tensors on a CUDA device, else of this process in RAM."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024  # Linux counts in KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
