"""Snapshots of the averages of `module.ema_lengths`, from which `ldm ema` makes one of any other length."""

from __future__ import annotations

from pathlib import Path

import lightning.pytorch as pl
import torch

from ldm.checkpoints.files import clean, remove
from ldm.checkpoints.posthoc import snapshots, write_snapshot
from ldm.training.callbacks.base import StepCallback, spared
from ldm.training.module import TrainingModule
from ldm.training.sharding import gathered

DTYPES = ("float16", "bfloat16", "float32")


class EMASnapshots(StepCallback):
    """Writes folder/step-000005000/ on rank 0; at more than `keep` every other one goes, and `every` doubles.

    Which ones there are depends on the step alone, so a resumed run has those of an uninterrupted one. Of 16,
    of lengths 0.05 and 0.1, length 0.08 comes out to 0.02 % (float32), 0.1 % (float16) or 0.8 % (bfloat16) of
    its distance to the raw weights; length 0.04 to 0.2, 0.6 or 5 %.
    """

    def __init__(self, folder: Path, every: int, keep: int = 32, dtype: str = "float16") -> None:
        super().__init__(every)
        if keep < 2:
            raise ValueError(f"keep={keep} must be a number of snapshots from 2")
        if dtype not in DTYPES:
            raise ValueError(f"dtype={dtype} must be one of {', '.join(DTYPES)}")
        self.folder, self.keep = folder, keep
        self.dtype: torch.dtype = getattr(torch, dtype)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """A killed run may be ahead of its checkpoint: what comes again may come out differently on a GPU."""
        super().on_train_start(trainer, pl_module)
        if trainer.is_global_zero:
            clean(self.folder)
            for step, path in snapshots(self.folder).items():
                if step > trainer.global_step:
                    remove(path)

    def spacing(self, step: int) -> int:
        """Optimizer steps between snapshots at `step`: the first doubling of `every` that fits `keep`."""
        spacing = self.every
        while step // spacing > self.keep:
            spacing *= 2
        return spacing

    def on_step(self, trainer: pl.Trainer, module: TrainingModule, step: int) -> None:
        spacing = self.spacing(step)
        if step % spacing or not module.ema_lengths:
            return
        module.alive("a snapshot of the averages", long=True)  # the other ranks wait for it
        assert module.ema is not None
        if not trainer.is_global_zero and not module.ema.sharded:
            return
        averages = {
            length: gathered(module.ema.state_dict(length), self.dtype) for length in module.ema_lengths
        }
        if not trainer.is_global_zero:
            return
        with spared(f"{self.folder}"):
            write_snapshot(self.folder, step, averages)
            found = snapshots(self.folder)
            for other in found if len(found) > self.keep else ():
                if other % spacing:
                    remove(found[other])
