"""No step waits for the device but those that log: what a step reads from it, and what it sends it by itself.

On a CPU the code is made to take the path of a device, and each call that would wait for one is noted.
"""

import traceback
from contextlib import contextmanager

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import train
from ldm import random
from ldm.training.loop import StepLoop
from ldm.training.module import TrainingModule

READS = {  # of values, or of how many there are
    *("aten._local_scalar_dense", "aten.nonzero", "aten.masked_select", "aten.is_nonzero", "aten.equal"),
    *("aten._unique2", "aten.unique_consecutive", "aten.repeat_interleave.Tensor", "aten.bincount"),
}
CALLS = {torch.Tensor.cpu, torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.item}
MADE = {torch.tensor, torch.as_tensor, torch.from_numpy}  # numbers of the host: a copy that waits


def place():
    """Which of our own files we are in."""
    ours = [frame for frame in traceback.extract_stack() if "/ldm/" in frame.filename]
    return ours[-1].filename.rpartition("/ldm/")[2] if ours else "torch"


class Calls(TorchFunctionMode):
    def __init__(self, found):
        super().__init__()
        self.found = found

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in CALLS or function in MADE:
            self.found.append(f"{function.__name__} {place()}")
        return function(*args, **(kwargs or {}))


class Operations(TorchDispatchMode):
    def __init__(self, found):
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        name = str(operation)
        masks = [x for x in args[1] if x is not None] if name.startswith("aten.index") else []
        masked = any(isinstance(x, torch.Tensor) and x.dtype == torch.bool for x in masks)
        if name in READS or name.removesuffix(".default") in READS or masked:
            self.found.append(f"{name} {place()}")
        return operation(*args, **(kwargs or {}))


@contextmanager
def watched(found):
    with Calls(found), Operations(found):
        yield


@pytest.mark.parametrize(
    "work",
    [
        lambda x: x.sum().item(),
        lambda x: float(x[0]),
        lambda x: bool(x[0] > 0),
        lambda x: x.tolist(),
        lambda x: x.cpu(),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: torch.equal(x, x),
        lambda x: x + torch.tensor(1.0),
    ],
)
def test_reads_are_seen(work):
    found, x = [], torch.ones(3)
    with watched(found):
        x[1:] * 2
    assert found == []
    with watched(found):
        work(x)
    assert found


class Loader:
    """The loop's data, which arrives unwatched: workers make it."""

    def __init__(self, fetcher, found):
        self.fetcher, self.found = fetcher, found

    @property
    def done(self):
        return self.fetcher.done

    def __next__(self):
        batch = next(self.fetcher)
        self.found.clear()
        return batch


SELDOM = [
    *("trainer.max_steps=7", "callbacks.metrics.every=4", "optimizer.fused=true"),
    *(f"callbacks.{name}.every=1000" for name in ("checkpoint", "validation", "pictures")),
]
GAN = ["module=autoencoder_gan", "module.latent_samples=12", "module.start=0", "discriminator=patchgan"]
GAN += [f"discriminator.{setting}" for setting in ("width=8", "layers=1", "norm_groups=4")]
ASKED = "numpy training/callbacks/guard.py"  # a number asked for steps before, which waits on the host
STAGES = {
    "autoencoder": (1, []),
    "autoencoder with a discriminator": (1, GAN),
    "latent diffusion": (2, []),
    "latent diffusion, accumulating": (2, ["trainer.accumulate_grad_batches=2"]),
}


@pytest.mark.parametrize("name", STAGES)
def test_only_steps_that_log_wait_for_the_device(name, recipe, monkeypatch):
    stage, overrides = STAGES[name]
    argv = recipe(stage, "run", *SELDOM, *overrides)  # runs stage 1 at the first call
    reads, advance = {}, StepLoop.advance

    def watched_advance(self, fetcher):
        found = []
        with watched(found):
            advance(self, Loader(fetcher, found))
        reads.setdefault(self.global_step, []).extend(found)

    monkeypatch.setattr(StepLoop, "advance", watched_advance)
    monkeypatch.setattr(TrainingModule, "on_host", False)
    monkeypatch.setattr(random, "_arrays", lambda n: (torch, n.to(torch.int64).reshape(-1, 1)))
    assert train.command(argv) == 0
    assert {"tolist training/module.py", ASKED} <= set(reads[4]) | set(reads[6]), "the row of the log"
    quiet = {step: [each for each in found if each != ASKED] for step, found in reads.items()}
    assert [step for step, found in quiet.items() if found] == [4, 7]
    assert len(quiet) >= 7


@pytest.mark.gpu
@pytest.mark.parametrize("name", STAGES)
def test_on_a_gpu_torch_sees_no_wait_either(name, recipe, monkeypatch):
    """`set_sync_debug_mode` raises where torch would wait, in all steps but the first and those that log."""
    stage, overrides = STAGES[name]
    argv = recipe(stage, "run", *SELDOM, *overrides, "trainer.accelerator=gpu", "trainer.devices=1")
    advance, seen = StepLoop.advance, []

    def strict_advance(self, fetcher):
        quiet = self.global_step not in (0, 3, 6)
        torch.cuda.set_sync_debug_mode("error" if quiet else "default")
        try:
            advance(self, fetcher)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        seen.append(quiet)

    monkeypatch.setattr(StepLoop, "advance", strict_advance)
    assert train.command(argv) == 0
    assert sum(seen) >= 4
