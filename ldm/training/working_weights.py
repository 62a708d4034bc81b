"""bf16 weights with fp32 masters: what matrix products and convolutions read, in place of a cast at each use.

A module's parameters stay as they are, in fp32: the optimizer, the average and checkpoints know of nothing
else. While a batch is forward and backward, layers hold bf16 copies, made in one call before the first
micro-batch; their gradients, which autocast has in bf16 too, are then added to those of the masters.

Of the backbone or the autoencoder: a text tower is small, and open_clip computes in the type of its weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor, nn

from ldm.errors import InputError
from ldm.training.adversarial_module import AdversarialAutoencoderModule
from ldm.training.module import TrainingModule
from ldm.training.strategies import DDP

PLACE = "speed.bf16_weights"
LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.ConvTranspose2d)  # whose operands autocast makes bf16


class WorkingWeights:
    """Of the trained layers of a network; made at the first use, when it is on its device."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.masters: list[Tensor] = []
        self.working: list[Tensor] = []
        self.gradients: list[Tensor] = []  # fp32, of the masters
        self.places: list[tuple[nn.Module, str, int]] = []

    def _make(self) -> None:
        numbers: dict[Tensor, int] = {}
        for layer in self.module.modules():
            for name, p in layer._parameters.items() if isinstance(layer, LAYERS) else ():
                if p is not None and p.requires_grad and p.dtype == torch.float32:
                    if p not in numbers:
                        numbers[p] = len(self.masters)
                        self.masters.append(p)
                        self.working.append(nn.Parameter(p.detach().to(torch.bfloat16)))
                        self.gradients.append(torch.zeros_like(p))
                    self.places.append((layer, name, numbers[p]))

    @contextmanager
    def held(self) -> Iterator[None]:
        """Inside, layers have the working weights, whatever those are."""
        if not self.places:
            self._make()
        self._give(self.working)
        try:
            yield
        finally:
            self._give(self.masters)

    def _give(self, parameters: list[Tensor]) -> None:
        for layer, name, k in self.places:
            layer._parameters[name] = cast(nn.Parameter, parameters[k])

    @contextmanager
    def used(self, first: bool) -> Iterator[None]:
        """For forward and backward of a micro-batch, the `first` or a later one of a step."""
        with self.held():
            if first:
                with torch.no_grad():
                    torch._foreach_copy_(self.working, self.masters)
            yield
        self._hand_over(first)

    @torch.no_grad()
    def _hand_over(self, first: bool) -> None:
        """A parameter that nothing used has no gradient, as ever."""
        fresh: list[tuple[Tensor, Tensor]] = []
        more: list[tuple[Tensor, Tensor]] = []
        for p, w, own in zip(self.masters, self.working, self.gradients, strict=True):
            if w.grad is not None:
                (fresh if first or p.grad is None else more).append((own, w.grad))
                p.grad, w.grad = own, None
        for add, pairs in ((torch._foreach_copy_, fresh), (torch._foreach_add_, more)):
            if pairs:
                add([own for own, _ in pairs], [given for _, given in pairs])


def working_weights(trainer: Any, module: TrainingModule, ours: bool, graphed: bool) -> WorkingWeights:
    """For `StepLoop`; raises InputError for what they do not help, or are not the same in."""
    precision, strategy = trainer.precision_plugin, trainer.strategy
    mixed = isinstance(precision, MixedPrecision) and precision.precision == "bf16-mixed"
    _require(not mixed, "is for bf16", "add trainer.precision=bf16-mixed, or leave it false")
    _require(not ours, "is not for a run that is profiled", "leave it false")
    _require(graphed, "a graph casts once a step anyway", "leave speed.cuda_graph or this one out")
    ranks = not isinstance(strategy, SingleDeviceStrategy)
    _require(ranks and not isinstance(strategy, DDP), "is of one device or ddp", "leave it false")
    shares = ranks and trainer.accumulate_grad_batches > 1
    fix = "leave it false, or accumulate on one device"
    _require(shares, "would add up a rank's micro-batches in bf16", fix)
    adversarial = isinstance(module, AdversarialAutoencoderModule)
    _require(adversarial, "is not for a discriminator, whose weight is measured in fp32", "leave it false")
    networks: Any = module
    return WorkingWeights(networks.backbone if hasattr(module, "backbone") else networks.autoencoder)


def _require(wrong: bool, what: str, fix: str) -> None:
    if wrong:
        raise InputError(PLACE, what, fix)
