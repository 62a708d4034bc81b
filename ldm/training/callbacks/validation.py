"""Validation with the EMA weights, every so many optimizer steps.

Not Lightning's loop: that counts batches since the start of the process, so a resumed run would validate at
other steps than an uninterrupted one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from ldm.errors import InputError
from ldm.evaluation.distribution import compare_features, feature_network
from ldm.pictures import to_uint8
from ldm.training.callbacks.base import StepCallback
from ldm.training.callbacks.metrics import MetricsLog
from ldm.training.module import TrainingModule
from ldm.types import Batch

Terms = Callable[[Batch], dict[str, tuple[Tensor, Tensor]]]


class Validation(StepCallback):
    """Writes the means of `module.validation_terms` to `metrics`, every `every` steps."""

    def __init__(self, metrics: MetricsLog, every: int) -> None:
        super().__init__(every)
        self.metrics = metrics

    def on_step(self, trainer: pl.Trainer, module: TrainingModule, step: int) -> None:
        if step % self.every == 0:
            self.metrics.write(trainer, step, validate(trainer, module))


class AutoencoderValidation(Validation):
    """For stage 1: also KID and FID of reconstructions, where `distribution` names a feature network.

    `packaged`, or a file for `ldm.evaluation.distribution.ExportedFeatures`. The network is in the scores'
    names (`validation/rFID-ENL0`): they are no published rFID, whose features are Inception's.
    """

    def __init__(self, metrics: MetricsLog, every: int, distribution: str | None = None) -> None:
        super().__init__(metrics, every)
        where = "callbacks.validation.distribution"
        self.network = feature_network(distribution, where) if distribution else None

    def on_step(self, trainer: pl.Trainer, module: Any, step: int) -> None:
        if step % self.every:
            return
        if self.network is None:
            return super().on_step(trainer, module, step)
        network, name = self.network.to(module.device), str(self.network.name)
        seen: list[tuple[Tensor, Tensor]] = []  # features [b 2 d] of both, weights [b]

        def terms(batch: Batch) -> dict[str, tuple[Tensor, Tensor]]:
            images, decoded = module.reconstruct(batch)
            with torch.autocast(module.device.type, enabled=False):
                pair = [network(to_uint8(x)).float().flatten(1) for x in (images, decoded)]
            seen.append((torch.stack(pair, 1), batch.weight))
            return module.score(images, decoded, batch.weight)

        values = validate(trainer, module, terms)
        module.alive("FID and KID", long=True)
        if seen:
            features, weight = (over_ranks(torch.cat(parts)).cpu() for parts in zip(*seen, strict=True))
            if int((weight > 0).sum()) < 2:  # every rank has them all, and raises
                raise InputError("data.validation_shards", "FID and KID need two readable pictures")
            if trainer.is_global_zero:
                real, decoded = features[weight > 0].unbind(1)
                score = compare_features(real, decoded, name)
                assert score.kid is not None
                assert score.fid is not None
                values |= {f"validation/rKID-{name}": score.kid, f"validation/rFID-{name}": score.fid}
        self.metrics.write(trainer, step, values)


def over_ranks(tensor: Tensor) -> Tensor:
    """The tensors of all ranks, equal in shape, one after another."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return tensor
    parts = [torch.empty_like(tensor) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(parts, tensor.contiguous())
    return torch.cat(parts)


@torch.no_grad()
def validate(trainer: pl.Trainer, module: TrainingModule, terms: Terms | None = None) -> dict[str, float]:
    """Means of `terms` (default: the module's) over the validation data of all ranks, by name; {} without."""
    loader = trainer.datamodule.val_dataloader()  # type: ignore[attr-defined]
    assert module.ema is not None
    terms = terms or module.validation_terms
    training = module.training
    module.eval()
    module.alive("validation", long=True)
    recorded, module.recorded = module.recorded, {}
    unread, module.unread = module.unread, lambda: None
    with module.ema.swapped(), trainer.precision_plugin.forward_context():
        for batch in loader:
            for name, (total, count) in terms(batch.to(module.device)).items():
                module.record(name, total, count)
            module.alive("validation")
    means = module.take_recorded()
    module.recorded, module.unread = recorded, unread
    module.train(training)
    return means
