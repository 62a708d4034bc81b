"""Which steps had a loss far above those before, and which samples they were trained on.

Each rank judges its own losses. They stay on the device until the log or a checkpoint reads numbers anyway:
no other step waits for the device.
"""

from __future__ import annotations

import csv
import io
import logging
import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor

from ldm.checkpoints.files import append_rows, replace
from ldm.training.callbacks.base import StepCallback, spared
from ldm.training.module import TrainingModule
from ldm.types import Batch

COLUMNS = ["step", "loss", "median", "mad", "keys"]  # keys: "shard/key" of each sample, joined by ";"
LEAST = 16  # losses before any is judged, and an eighth of the window
FLAT = 1e-3  # of the median: the least MAD, for losses that are all but equal
NAMED = 10  # spikes that the log names; the file has all

log = logging.getLogger(__name__)


class SpikeLog(StepCallback):
    """A loss above median + `mads` x MAD of the `window` losses before it goes into spikes.csv, as does any
    that is not finite; `train/loss_spikes` counts them over all ranks, from row to row of the log.

    MAD: median of the distances from the median. 6 of it are 4 standard deviations of normal losses, which a
    step in 10,000 exceeds by chance; of log-normal ones (sigma 0.3) a step in 200 does. Rank 3 writes
    spikes-rank-00003.csv. `rows`: steps between rows of the log.
    """

    def __init__(self, folder: Path, rows: int, window: int = 512, mads: float = 6.0) -> None:
        super().__init__()
        if window < LEAST:
            raise ValueError(f"window={window} must be a number of steps from {LEAST}")
        if mads <= 0:
            raise ValueError(f"mads={mads} must be above 0")
        self.folder, self.rows, self.window, self.mads = folder, rows, window, mads
        self._loss: Tensor | None = None  # of the micro-batches of this step up to now
        self._keys: list[str] = []
        self._unread: list[
            tuple[int, list[str], Tensor]
        ] = []  # steps, their samples, their loss on the device
        self._named = 0

    def path(self, rank: int) -> Path:
        return self.folder / (f"spikes-rank-{rank:05d}.csv" if rank else "spikes.csv")

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._loss, self._keys, self._unread = None, [], []
        cast(TrainingModule, pl_module).unread = partial(self.read, trainer, pl_module)
        if trainer.is_global_zero:  # no other rank gets past its first step before this one
            for path in self.folder.glob("spikes*.csv"):
                with spared(f"{path}"):
                    cut(path, trainer.global_step)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if isinstance(outputs, Mapping):
            loss = outputs["loss"]  # Lightning has divided it by the number of micro-batches
            self._loss = loss if self._loss is None else self._loss + loss
            self._keys += cast(Batch, batch).key
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_step(self, trainer: pl.Trainer, module: TrainingModule, step: int) -> None:
        if self._loss is not None:
            self._unread.append((step, self._keys, self._loss))
        self._loss, self._keys = None, []

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.read(trainer, cast(TrainingModule, pl_module))

    def read(self, trainer: pl.Trainer, module: Any) -> None:
        """Judge the losses since the last call. Waits for the device."""
        unread, self._unread = self._unread, []
        if not unread:
            return
        losses = torch.stack([loss.float() for _, _, loss in unread]).tolist()
        found = []
        usual, known = usual_before(losses, module.losses, self.window), len(module.losses)
        for (step, keys, _), loss, (middle, mad) in zip(unread, losses, usual, strict=True):
            spike = self.is_spike(loss, middle, mad, known)
            known += math.isfinite(loss)
            if spike:
                found.append(
                    (step, f"{loss:.7g}", f"{middle:.7g}", f"{mad:.7g}", ";".join(filter(None, keys)))
                )
        module.losses = [*module.losses, *filter(math.isfinite, losses)][-self.window :]
        # A share, so that a row's mean is the count of all ranks.
        share = len(unread) / (self.rows * trainer.world_size)
        module.record("train/loss_spikes", torch.tensor(float(len(found)), device=module.device), share)
        if found:
            self._tell(found, self.path(trainer.global_rank))

    def is_spike(self, loss: float, middle: float, mad: float, known: int) -> bool:
        """Whether `loss` is one after `known` losses with this median and MAD."""
        judged = known >= max(LEAST, self.window // 8)
        high = judged and loss > middle + self.mads * max(mad, FLAT * abs(middle))
        return high or not math.isfinite(loss)

    def _tell(self, found: list[tuple[Any, ...]], path: Path) -> None:
        with spared(f"{path}"):
            append_rows(path, COLUMNS, found)
        for step, loss, middle, mad, keys in found[: max(0, NAMED - self._named)]:
            names = keys.split(";")
            more = f" and {len(names) - 8} more" if len(names) > 8 else ""
            log.warning(
                "step %d: loss %s, where median %s and MAD %s were usual; trained on %s",
                *(step, loss, middle, mad, ", ".join(names[:8]) + more),
            )
        if self._named < NAMED <= self._named + len(found):
            log.warning("more such steps are named in %s alone", path)
        self._named += len(found)


def usual_before(losses: list[float], before: list[float], window: int) -> list[tuple[float, float]]:
    """For each loss the median and MAD of the `window` finite ones before it, first of all those `before`."""
    finite = np.isfinite(losses)
    values = np.array([*before, *np.array(losses)[finite]])
    ends = len(before) + np.cumsum(finite) - finite  # how many come before each
    if len(before) >= window:  # all at once: one by one it would be a tenth of a millisecond a step
        windows = np.lib.stride_tricks.sliding_window_view(values, window)[ends - window]
        middles = np.median(windows, axis=1)
        mads = np.median(np.abs(windows - middles[:, None]), axis=1)
        return list(zip(middles.tolist(), mads.tolist(), strict=True))
    return [_median_and_mad(values[max(0, end - window) : end]) for end in ends]


def _median_and_mad(values: np.ndarray) -> tuple[float, float]:
    if not len(values):
        return math.nan, math.nan
    middle = float(np.median(values))
    return middle, float(np.median(np.abs(values - middle)))


def cut(path: Path, step: int) -> None:
    """Take the rows after `step` out of the file: a killed run was ahead of its checkpoint."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.reader(file) if len(row) == len(COLUMNS)]
    kept = [row for row in rows if row[0].isdigit() and int(row[0]) <= step]
    if len(kept) < len(rows) - 1:
        text = io.StringIO(newline="")
        csv.writer(text).writerows([COLUMNS, *kept])
        replace(path, text.getvalue())
