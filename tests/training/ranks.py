"""A program, started by tests: runs the trainer in so many processes, one set of them after another.

Not train.py, whose checkpoints this need not: the state goes through `ldm.training.sharding` and torch.save,
whole, as a checkpoint has it. Processes are forks of one that has imported all: importing takes longer than
these trainings. `python ranks.py JOBS.json`: a list of {"world": ..., "name": ..., ...options of `job`}.
"""

import json
import os
import socket
import sys
from pathlib import Path

import lightning.pytorch as pl
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ldm.checkpoints.optimizer import flatten_optimizer
from ldm.checkpoints.run import RunDirectory
from ldm.config import build, compose
from ldm.random import keyed_normal
from ldm.training import assembly, diffusion_module
from ldm.training.callbacks.checkpoint import names_of
from ldm.training.sharding import gathered, load_local, load_local_optimizer, local, local_state

KINDS = ("model", "ema", "optimizer")


class Counting(TorchDispatchMode):
    """Names of the collectives that Python asks for."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            self.calls.append(func.__name__.strip("_").partition(".")[0])
        return func(*args, **(kwargs or {}))


def tensors_of(trainer, module):
    """({kind: tensors by name, maybe sharded}, the optimizer's settings)."""
    optimizer, settings = flatten_optimizer(trainer.optimizers[0], names_of(module))
    return {"model": module.state_dict(), "ema": module.ema.state_dict(), "optimizer": optimizer}, settings


def noting(drawn):
    """keyed_normal that keeps the first number of each row of noise."""

    def draw(seed, n, purpose, *shape):
        values = keyed_normal(seed, n, purpose, *shape)
        if purpose == "noise" and int(n.max()) < 1 << 61:
            drawn.extend(zip(n.tolist(), values.flatten(1)[:, 0].tolist(), strict=True))
        return values

    return draw


class Keep(pl.Callback):
    """Takes up the state of `source`, keeps that of the end in `folder`, and what happened between."""

    def __init__(self, folder, source, count):
        self.folder, self.source, self.count = folder, source, count
        self.facts = {"pictures": [], "noise": [], "collectives": {}, "buckets": {}, "timeouts": []}

    def on_fit_start(self, trainer, pl_module):
        if self.source is None:
            return
        state = torch.load(self.source / "state.pt", weights_only=True)
        load_local(pl_module, state["model"])
        pl_module.ema.load_state_dict(state["ema"])
        names = names_of(pl_module)
        load_local_optimizer(trainer.optimizers[0], names, state["optimizer"], state["settings"])
        loop = trainer.fit_loop.epoch_loop
        loop.automatic_optimization.optim_progress.optimizer.step.total.completed = state["step"]
        trainer.datamodule.resume_at(state["step"] * trainer.datamodule.global_batch_size)
        found, _ = tensors_of(trainer, pl_module)
        same = {kind: gathered(found[kind]) for kind in KINDS}
        self.facts["restored"] = all(
            torch.equal(value, same[kind][name]) for kind in KINDS for name, value in state[kind].items()
        ) and all(set(state[kind]) == set(same[kind]) for kind in KINDS)

    def on_train_start(self, trainer, pl_module):
        self._note_timeout()
        self.facts["static_graph"] = getattr(trainer.strategy.model, "static_graph", None)
        self.facts["names"] = list(pl_module.state_dict())
        trained = [p for p in pl_module.parameters() if p.requires_grad]
        self.facts["share"] = sum(local(p).numel() for p in trained) / sum(p.numel() for p in trained)
        if self.count == "buckets":
            from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

            def counting(state, bucket):
                self._add("buckets", trainer.global_step)
                return allreduce_hook(state, bucket)

            trainer.strategy.model.register_comm_hook(None, counting)

    def _note_timeout(self):
        if torch.distributed.is_initialized():
            backend = torch.distributed.group.WORLD._get_backend(torch.device("cpu"))
            self.facts["timeouts"].append(backend.options._timeout.total_seconds())

    def _add(self, what, step):
        self.facts[what][step] = self.facts[what].get(step, 0) + 1

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        sums = batch.image.sum((1, 2, 3)).tolist()
        self.facts["pictures"] += [
            [trainer.global_step, *pair] for pair in zip(batch.n.tolist(), sums, strict=True)
        ]

    def on_train_end(self, trainer, pl_module):
        self._note_timeout()
        tensors, settings = tensors_of(trainer, pl_module)
        mine = {kind: local_state(tensors[kind]) for kind in KINDS}
        self.facts["rows"] = {kind: {n: list(v.shape) for n, v in mine[kind].items()} for kind in KINDS}
        torch.save(mine, self.folder / f"part-{trainer.global_rank}.pt")
        whole = {kind: gathered(tensors[kind]) for kind in KINDS}
        if trainer.is_global_zero:
            step = trainer.global_step
            torch.save({**whole, "settings": settings, "step": step}, self.folder / "state.pt")


def job(world, folder, overrides, source=None, count=None, **ignored):
    """One training, in this process one rank of it."""
    cfg = compose("train", [*overrides, f"run_root={folder.parent}", f"run_name={folder.name}"])
    run = RunDirectory(cfg.run_root, cfg.run_name)
    stage = run.stage("")
    stage.folder.mkdir(parents=True, exist_ok=True)
    datamodule, module = build(cfg.data), assembly.build_module(cfg)
    if hasattr(module, "tokenizer"):
        datamodule.tokenize = module.tokenizer
    keep = Keep(folder, source and folder.parent / source, count)
    callbacks, _, checkpoints = assembly.build_callbacks(cfg, run, stage, None)
    callbacks[callbacks.index(checkpoints)] = keep
    trainer = assembly.build_trainer(cfg, callbacks, datamodule, module)
    diffusion_module.keyed_normal = noting(keep.facts["noise"]) if count == "noise" else keyed_normal
    if count == "collectives":
        with Counting() as counting:
            trainer.fit(module, datamodule=datamodule)
        keep.facts["collectives"] = {name: counting.calls.count(name) for name in set(counting.calls)}
    else:
        trainer.fit(module, datamodule=datamodule)
    (folder / f"facts-{trainer.global_rank}.json").write_text(json.dumps(keep.facts))


def rank(number, world, port, root, jobs):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "NODE_RANK": "0"}
    os.environ |= {"LOCAL_RANK": str(number), "WORLD_SIZE": str(world)} if world > 1 else {}
    if number:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
    for options in jobs:
        job(folder=root / options["name"], **options)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def main(path):
    """Jobs in a row that have one world size share their processes."""
    jobs = json.loads(path.read_text())
    torch.set_num_threads(1)
    while jobs:
        world = jobs[0]["world"]
        count = next((k for k, one in enumerate(jobs) if one["world"] != world), len(jobs))
        share, jobs = jobs[:count], jobs[count:]
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        children = []
        for number in range(world):
            child = os.fork()
            if child == 0:
                code = 1
                try:
                    rank(number, world, port, path.parent, share)
                    code = 0
                except BaseException:
                    import traceback

                    traceback.print_exc()
                finally:
                    sys.stdout.flush()
                    sys.stderr.flush()
                    os._exit(code)
            children.append(child)
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        if any(codes):
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
