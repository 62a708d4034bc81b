"""Our trainer against a plain DDP loop, two processes over gloo on this machine: what the trainer costs.

`python -m benchmarks.ddp --json benchmarks/results/ddp.json` (some minutes). Both train the same U-Net and
text tower on latents of the same frozen autoencoder, from the same batches in memory, with AdamW, clipping
and EMA. The plain loop is what a person would write by hand: torch's noise, DDP as it comes, no log. Ours
is the trainer of `trainer=ddp` with all its callbacks, a row of the log every 10 steps, norms in it.
"""

from __future__ import annotations

import argparse
import logging
import os
import socket
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from benchmarks import harness
from benchmarks.harness import Measured
from ldm.checkpoints.run import RunDirectory
from ldm.config import build, compose
from ldm.data.health import Budget, Health
from ldm.training import assembly
from ldm.training.optim import parameter_groups
from ldm.types import Batch

WORLD, CLIP, DECAY = 2, 1.0, 0.9999
KEPT = 8  # batches in memory, used in turn
OVERRIDES = [
    *("autoencoder=tiny", "backbone=tiny", "conditioner=text_transformer", "trainer=cpu", "data=shards"),
    *("conditioner.width=64", "conditioner.layers=2", "conditioner.heads=4", "conditioner.context_length=16"),
    *("data.shards=x", "autoencoder_from=x", "optimizer.lr=1e-4", "callbacks.metrics.every=10"),
    *("data.image_size=64", f"trainer.devices={WORLD}", f"trainer.gradient_clip_val={CLIP}", "run_name=ours"),
    "trainer.strategy={_target_: ldm.training.strategies.ddp}",
    "callbacks.checkpoint.writers=1",  # each process has a folder of its own here
]


class InMemory(pl.LightningDataModule):
    """The same few batches of this rank again and again, as the trainer asks for them."""

    def __init__(self, batches: Sequence[Batch], size: int) -> None:
        super().__init__()
        self.batches, self.global_batch_size, self.start = batches, size, 0
        self.health = Health(Budget())

    def check_batch(self, world: int, accumulate: int) -> None:
        assert self.global_batch_size % (world * accumulate) == 0

    def state(self, samples: int) -> dict[str, int]:
        return {"samples": samples}

    def train_dataloader(self) -> Endless:
        return Endless(self.batches)

    def val_dataloader(self) -> list[Batch]:
        return list(self.batches[:1])

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        return batch


class Endless:
    def __init__(self, batches: Sequence[Batch]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Batch]:
        while True:
            yield from self.batches


class Clock(pl.Callback):
    """Time between the ends of two optimizer steps."""

    def __init__(self, warm_up: int, last: int) -> None:
        self.warm_up, self.last = warm_up, last
        self.begun = self.ended = (0.0, 0.0)

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.global_step == self.warm_up:
            torch.distributed.barrier()
            self.begun = now()
        if trainer.global_step == self.last:
            torch.distributed.barrier()
            self.ended = now()


def now() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def measured(begun: tuple[float, float], ended: tuple[float, float], count: int) -> Measured:
    return Measured(count, ended[0] - begun[0], ended[1] - begun[1])


def batches_of(rank: int, size: int, cfg: Any, world: int = WORLD) -> list[Batch]:
    """Pictures and tokens of this rank, from a fixed seed."""
    generator, share, found = torch.Generator().manual_seed(rank), size // world, []
    length, side = cfg.conditioner.context_length, cfg.data.image_size
    for k in range(KEPT):
        image = torch.randint(0, 256, (share, 3, side, side), generator=generator, dtype=torch.uint8)
        tokens = torch.randint(1, 400, (share, length), generator=generator)
        n = torch.arange(share) + k * size + rank * share
        found.append(Batch(n, torch.ones(share), image=image, tokens=tokens, hash=n, reason=[""] * share))
    return found


def ours(cfg: Any, batches: Sequence[Batch], size: int, warm_up: int, steps: int) -> Measured:
    """One run of the trainer; its last step, with validation, pictures and a checkpoint, is not timed."""
    with tempfile.TemporaryDirectory() as folder:
        cfg.run_root, cfg.trainer.max_steps = folder, warm_up + steps + 1
        run = RunDirectory(folder, "ours")
        stage = run.stage("")
        stage.folder.mkdir(parents=True)
        data, clock = InMemory(batches, size), Clock(warm_up, warm_up + steps)
        callbacks, *_ = assembly.build_callbacks(cfg, run, stage, None)
        module = assembly.build_module(cfg)
        trainer = assembly.build_trainer(cfg, [*callbacks, clock], data, module)
        trainer.fit(module, datamodule=data)
    return measured(clock.begun, clock.ended, steps * size)


class Loss(nn.Module):
    """Stage 2 by hand: what DDP wraps."""

    def __init__(self, module: Any) -> None:
        super().__init__()
        self.backbone, self.conditioner = module.backbone, module.conditioner
        self.scheduler, self.autoencoder = module.noise_scheduler, [module.frozen["autoencoder"]]

    def forward(self, batch: Batch) -> Tensor:
        assert batch.image is not None
        with torch.no_grad():
            image = batch.image.to(torch.float32, memory_format=torch.channels_last) / 127.5 - 1
            latents = self.autoencoder[0].encode(image)
        conditioning = self.conditioner(batch)
        keep = torch.rand(len(latents)) >= 0.1
        conditioning = conditioning.where(keep, self.conditioner.null(conditioning))
        noise, time = torch.randn_like(latents), self.scheduler.time_at(torch.rand(len(latents)))
        alpha, sigma = self.scheduler.alpha(time), self.scheduler.sigma(time)
        noisy = alpha.view(-1, 1, 1, 1) * latents + sigma.view(-1, 1, 1, 1) * noise
        return F.mse_loss(self.backbone(noisy, self.scheduler.model_time(time), conditioning), noise)


def plain(cfg: Any, batches: Sequence[Batch], size: int, warm_up: int, steps: int) -> Measured:
    """The loop by hand."""
    module = assembly.build_module(cfg)
    net = Loss(module)
    model = DistributedDataParallel(net)
    optimizer = build(cfg.optimizer)(parameter_groups(net, cfg.optimizer.weight_decay))
    parameters = list(net.parameters())
    average = [p.detach().clone() for p in parameters]
    begun = ended = now()
    for step in range(warm_up + steps):
        model(batches[step % KEPT]).backward()
        torch.nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            torch._foreach_lerp_(average, parameters, 1 - min(DECAY, (1 + step) / (10 + step)))
        if step + 1 == warm_up:
            torch.distributed.barrier()
            begun = now()
    torch.distributed.barrier()
    ended = now()
    return measured(begun, ended, steps * size)


def rank(number: int, port: int, options: argparse.Namespace) -> None:
    """What one process does; both run the race, and rank 0 tells of it."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "NODE_RANK": "0"}
    os.environ |= {"LOCAL_RANK": str(number), "WORLD_SIZE": str(WORLD)}
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    if number:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
    about = harness.facts(["torch", "lightning"])
    torch.distributed.init_process_group("gloo", rank=number, world_size=WORLD)
    cfg = compose("train", OVERRIDES)
    size, warm_up, steps = (4, 2, 3) if options.small else (options.batch, 10, options.steps)
    batches = batches_of(number, size, cfg)
    found = harness.race(
        f"two processes, global batch {size}",
        "Images a second of both processes together, one thread each; CPU time is of one of them.",
        {
            "ours": lambda: ours(cfg, batches, size, warm_up, steps),
            "plain loop": lambda: plain(cfg, batches, size, warm_up, steps),
        },
        rounds=options.rounds,
        unit="images",
        goals={"plain loop": 0.98},
        notes=[f"{steps} steps a turn after {warm_up}, {options.rounds} turns each."],
    )
    if number == 0:
        harness.report(options.json, about, [found])
    torch.distributed.destroy_process_group()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ddp", description=__doc__)
    parser.add_argument("--json", type=Path, help="write results here, and the tables beside it")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each contestant")
    parser.add_argument("--steps", type=int, default=40, help="optimizer steps of a turn")
    parser.add_argument("--batch", type=int, default=16, help="pictures of both processes together")
    parser.add_argument("--small", action="store_true", help="seconds; figures mean nothing")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for number in range(WORLD):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                rank(number, port, options)
                code = 0
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        children.append(child)
    return max(abs(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])) for child in children)


if __name__ == "__main__":
    sys.exit(main())
