"""Forward and backward pass of a training step as one CUDA graph: for small batches, where the host is late.

Recorded at the first batch, on tensors that stay: a batch is copied into them, the graph replayed, and what
it wrote, loss, gradients and recorded numbers, is where it was at the first time. Clipping, optimizer and
average are the usual ones, outside of the graph: they are few launches, and what they read of the host (the
learning rate, the step) changes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor, nn

from ldm.autoencoder.vq import EMAVectorQuantizer
from ldm.conditioning.label import Classes
from ldm.errors import InputError
from ldm.nn.graph import Work, recorded
from ldm.training.adversarial_module import AdversarialAutoencoderModule
from ldm.training.module import Sums, TrainingModule
from ldm.types import Batch

PLACE = "speed.cuda_graph"
OF_HOST: dict[str, Any] = {
    "key": (),
    "reason": (),
    "events": (),
    "caption": None,
}  # what a batch has that is no tensor


class GraphedStep:
    """`training_step` of `module` and its backward pass; `step` runs it under the trainer's precision."""

    def __init__(
        self,
        module: TrainingModule,
        step: Callable[[Batch], Tensor],
        record: Callable[[Work, torch.device], Work] = recorded,
    ) -> None:
        self.module, self.step, self.record = module, step, record
        self.parameters = [p for p in module.parameters() if p.requires_grad]
        self.graph: tuple[Any, Batch, Work] | None = None  # of which shapes, on which tensors
        self.names: list[tuple[str, int, int, float]] = []  # of what is recorded: sums, counts, and the rest

    def __call__(self, batch: Batch) -> Tensor:
        """The loss; gradients are in the parameters, and what `record` was told is in the module."""
        given = batch.tensors()
        key = [(name, t.shape, t.dtype) for name, t in given.items()]
        if self.graph is not None and self.graph[0] != key:
            raise InputError(PLACE, "batches are of several sizes, and a graph is of one", "leave it false")
        if self.graph is None:
            more: dict[str, Any] = {name: t.clone() for name, t in given.items()}
            own = replace(batch, **OF_HOST, **more)
            self.graph = key, own, self.record(lambda: self._compute(own), self.module.device)
        _, own, replay = self.graph
        for mine, value in zip(own.tensors().values(), given.values(), strict=True):
            mine.copy_(value)
        loss, *rest = replay()
        numbers, gradients = rest[: -len(self.parameters)], rest[-len(self.parameters) :]
        for p, gradient in zip(self.parameters, gradients, strict=True):
            p.grad = gradient
        self._tell([t.clone() for t in numbers])  # kept until the log reads them, and written by each replay
        return loss.clone()

    def _compute(self, batch: Batch) -> list[Any]:
        """[loss, recorded numbers, gradients (None where there is none)]."""
        module, before = self.module, self.module.recorded
        module.recorded = {}
        try:
            for p in self.parameters:
                p.grad = None  # so that backward makes one, at the same place in each replay
            loss = self.step(batch)
            loss.backward()
            found = module.recorded
        finally:
            module.recorded = before
        self.names = [(name, len(s.totals), len(s.counts), s.counted) for name, s in found.items()]
        numbers = [t for s in found.values() for t in (*s.totals, *s.counts)]
        return [loss.detach(), *numbers, *(p.grad for p in self.parameters)]

    def _tell(self, numbers: list[Tensor]) -> None:
        for name, totals, counts, counted in self.names:
            sums = self.module.recorded.setdefault(name, Sums())
            sums.extend(numbers[:totals], numbers[totals : totals + counts], counted)
            del numbers[: totals + counts]


def graphed(trainer: Any, module: TrainingModule, data: Any, ours: bool) -> GraphedStep:
    """For `StepLoop`; raises InputError for what a graph cannot do, or has not been shown to do."""
    _require(
        not _may_record(trainer.strategy.root_device), "there is no GPU to record one on", "leave it false"
    )
    _require(not ours, "a profiler hears of each operation, and a graph has none", "leave one of them out")
    alone = isinstance(trainer.strategy, SingleDeviceStrategy)
    _require(not alone, "is of one process: nothing would average the ranks' gradients", "leave it false")
    micro = trainer.accumulate_grad_batches
    _require(micro > 1, "makes whole gradients", f"trainer.accumulate_grad_batches={micro} must be 1")
    scaled = getattr(trainer.precision_plugin, "scaler", None) is not None
    _require(scaled, "16-mixed changes its scale as it goes", "use trainer.precision=bf16-mixed")
    _require(getattr(data, "buckets", None) is not None, "is of one size", "leave data.buckets out")
    parts = [part for network in (module, *module.frozen.values()) for part in network.modules()]
    random = any(isinstance(part, nn.Dropout) and part.p > 0 for part in parts)
    _require(random, "would replay the first step's dropout", "set dropout=0.0")
    moving = isinstance(module, AdversarialAutoencoderModule)
    moving |= any(isinstance(part, EMAVectorQuantizer) for part in parts)
    _require(moving, "does not move codebooks or discriminators", "leave it false for this stage")
    worded = any(isinstance(part, Classes) and part.names for part in parts)
    _require(worded, "a class that is read from the caption is a number of the host", "give labels")

    def step(batch: Batch) -> Tensor:
        loss: Tensor = trainer.strategy.training_step(batch, 0)
        return loss

    return GraphedStep(module, step, recorded)


def _require(wrong: bool, what: str, fix: str) -> None:
    if wrong:
        raise InputError(PLACE, what, fix)


def _may_record(device: torch.device) -> bool:
    return device.type == "cuda"
