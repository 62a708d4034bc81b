"""What a trainer costs a step beside the networks' own work (C4), and what memory it takes (C8).

All contestants train the same small network on the same batches, with fused AdamW, clipping and an EMA, and
must end at the same loss. Ours is the trainer with every callback of the recipes: guards, log, checkpoints.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, LearningRateMonitor, ModelCheckpoint, Timer
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.ddp import Endless, InMemory
from benchmarks.harness import Measured
from ldm.checkpoints.run import RunDirectory
from ldm.config import build, compose
from ldm.training import assembly
from ldm.training.module import TrainingModule
from ldm.training.optim import parameter_groups
from ldm.types import Batch

CLIP, DECAY, EVERY, KEPT, SIZE = 1.0, 0.999, 50, 8, 8
OVERRIDES = [
    *("experiment=quickstart_diffusion", "trainer=cpu", "run_name=ours", "report=null"),
    *("optimizer.lr=1e-3", "optimizer.betas=[0.9,0.999]", "optimizer.weight_decay=0.01"),
    f"callbacks.metrics.every={EVERY}",
    *("callbacks.validation.every=1000000", "callbacks.pictures.every=1000000"),
    *("callbacks.checkpoint.every=1000000", "autoencoder_from=x"),
]


def network(width: int = 32, layers: int = 12) -> nn.Module:
    """A small network of as many tensors as a step's bookkeeping should be measured with."""
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Sequential(nn.Linear(width, width), nn.SiLU()) for _ in range(layers)))


def inputs() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(SIZE, 32, generator=generator) for _ in range(KEPT)]


def loss_of(net: nn.Module, x: Tensor) -> Tensor:
    return F.mse_loss(net(x), x.flip(1))


class Clock:
    """Wall and CPU time between two steps, and the loss of the last."""

    def __init__(self, first: int, last: int) -> None:
        self.first, self.last, self.loss, self.early = first, last, 0.0, 0.0
        self.begun = self.ended = (0.0, 0.0)

    def tick(self, step: int) -> None:
        if step == EVERY:  # later, rounding grows: a fused AdamW ends half a percent from one that is not
            self.early = self.loss
        if step == self.first:
            self.begun = time.perf_counter(), time.process_time()
        if step == self.last:
            self.ended = time.perf_counter(), time.process_time()

    def measured(self) -> Measured:
        took = [b - a for a, b in zip(self.begun, self.ended, strict=True)]
        return Measured(self.last - self.first, took[0], took[1])


# ---- the loop by hand


def by_hand(clock: Clock) -> None:
    """What a person would write: nothing but the step, the loss read every `EVERY` steps."""
    net, batches = network(), inputs()
    parameters = list(net.parameters())
    optimizer = torch.optim.AdamW(parameter_groups(net, 0.01), lr=1e-3, fused=True)
    average = [p.detach().clone() for p in parameters]
    for step in range(clock.last):
        loss = loss_of(net, batches[step % KEPT])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            torch._foreach_lerp_(average, parameters, 1 - min(DECAY, (1 + step) / (10 + step)))
        if (step + 1) % EVERY == 0 or step + 1 == clock.last:
            clock.loss = loss.item()
        clock.tick(step + 1)


# ---- ours


class Module(TrainingModule):
    """A stage whose network is `network()`."""

    def __init__(self, cfg: Any) -> None:
        super().__init__(build(cfg.optimizer), lambda step: 1.0, DECAY, seed=0)
        self.net = network()

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        assert batch.moments is not None
        loss = loss_of(self.net, batch.moments)
        self.record("train/loss", loss)
        return loss


class Ticks(pl.Callback):
    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, *args: Any) -> None:
        if trainer.global_step in (EVERY, self.clock.last):
            self.clock.loss = float(outputs["loss"])
        self.clock.tick(trainer.global_step)


@assembly.flags_restored()  # else a process started later takes this one for its launcher
def ours(clock: Clock) -> None:
    with tempfile.TemporaryDirectory() as folder:
        cfg = compose("train", OVERRIDES)
        cfg.run_root, cfg.trainer.max_steps = folder, clock.last + 1
        run = RunDirectory(folder, "ours")
        stage = run.stage("")
        stage.folder.mkdir(parents=True)
        batches = [
            Batch(
                torch.arange(SIZE), torch.ones(SIZE), moments=x, hash=torch.arange(SIZE), reason=[""] * SIZE
            )
            for x in inputs()
        ]
        data, module = InMemory(batches, SIZE), Module(cfg)
        callbacks = [
            c
            for c in assembly.build_callbacks(cfg, run, stage, None)[0]
            if type(c).__name__ not in ("TextPictures", "Validation")  # of a step that is not timed
        ]
        trainer = assembly.build_trainer(cfg, [*callbacks, Ticks(clock)], data, module)
        trainer.fit(module, datamodule=data)


# ---- Lightning as it comes


class Stock(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = network()

    def training_step(self, x: Tensor, batch_idx: int) -> Tensor:
        loss = loss_of(self.net, x)
        self.log("train/loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameter_groups(self.net, 0.01), lr=1e-3)


def stock(clock: Clock, callbacks: Callable[[str], list[pl.Callback]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        made = callbacks(folder)
        trainer = pl.Trainer(
            accelerator="cpu",
            max_steps=clock.last,
            max_epochs=-1,
            gradient_clip_val=CLIP,
            log_every_n_steps=EVERY,
            default_root_dir=folder,
            logger=CSVLogger(folder),
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=bool(made),
            callbacks=[*made, Ticks(clock)],
        )
        trainer.fit(Stock(), train_dataloaders=Endless(inputs()))  # type: ignore[arg-type]


def bare(clock: Clock) -> None:
    stock(clock, lambda folder: [])


def with_callbacks(clock: Clock) -> None:
    """Those of Lightning's own that do some of what ours do."""
    stock(
        clock,
        lambda folder: [
            EMAWeightAveraging(decay=DECAY),
            ModelCheckpoint(folder, every_n_train_steps=1_000_000, save_top_k=-1),
            LearningRateMonitor(),
            Timer(),
        ],
    )


# ---- accelerate


def accelerate(clock: Clock) -> None:
    """The loop of diffusers' scripts: two numbers read each step, its EMA in one call for all tensors."""
    from accelerate import Accelerator
    from diffusers.training_utils import EMAModel

    accelerator = Accelerator(cpu=True)
    net, batches = network(), inputs()
    optimizer = torch.optim.AdamW(parameter_groups(net, 0.01), lr=1e-3)
    net, optimizer = accelerator.prepare(net, optimizer)
    average = EMAModel(net.parameters(), decay=DECAY, foreach=True)
    for step in range(clock.last):
        with accelerator.accumulate(net):
            loss = loss_of(net, batches[step % KEPT])
            clock.loss = accelerator.gather(loss.repeat(SIZE)).mean().item()
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(net.parameters(), CLIP)
            optimizer.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients:
            average.step(net.parameters())
        clock.tick(step + 1)


TRAINERS: dict[str, Callable[[Clock], None]] = {
    "ours, all callbacks": ours,
    "loop by hand": by_hand,
    "Lightning, no callbacks": bare,
    "Lightning, its callbacks": with_callbacks,
    "accelerate": accelerate,
}


def trained(work: Callable[[Clock], None], steps: int, first: int) -> tuple[Measured, float]:
    """One run, and its loss after `EVERY` steps, or after the last if there are fewer."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    clock = Clock(first, first + steps)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        work(clock)
    return clock.measured(), clock.early or clock.loss


def main() -> int:
    """`python -m benchmarks.loops NAME STEPS`: train, and print the memory of the process as it went."""
    name, steps = sys.argv[1], int(sys.argv[2])
    torch.set_num_threads(1)
    found: dict[str, float] = {}

    class Weighed(Clock):
        def tick(self, step: int) -> None:
            if step == steps // 5:
                found["early"] = rss()
            if step == steps:
                found["end"] = rss()
            super().tick(step)

    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    TRAINERS[name](Weighed(0, steps))
    print(json.dumps(found))
    return 0


def rss() -> float:
    """MB of memory that this process has now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


if __name__ == "__main__":
    sys.exit(main())
