"""What both stages share: optimizer step, EMA, frozen networks, and a record of numbers without host syncs.

Not a framework: `AutoencoderModule` and `LatentDiffusionModule` read on their own, this is the plumbing.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from ldm.checkpoints.posthoc import exponent
from ldm.random import keyed_word
from ldm.training.ema import EMA
from ldm.training.optim import ParameterRule, parameter_groups
from ldm.training.sharding import clip_norm, total_norm
from ldm.types import Batch

MOST_KEPT = 256  # recorded numbers of a name that are not added up yet
LRSchedule = Callable[[int], float]  # optimizer step -> factor on the learning rate


class NotFiniteError(Exception):
    """Leaves an optimizer's step between the gradient and the update."""


def to_unit(image: Tensor, dtype: Any = torch.float32) -> Tensor:
    """uint8 [b 3 h w] in 0..255 to [-1, 1], channels last."""
    return image.to(dtype, memory_format=torch.channels_last) / 127.5 - 1


class Sums:
    """A sum and a count, of numbers that are on the device: kept as they come, added up many at once."""

    def __init__(self) -> None:
        self.totals: list[Tensor] = []
        self.counts: list[Tensor] = []
        self.counted = 0.0  # beside `counts`: what is known without the device

    def add(self, total: Tensor, count: Tensor | float = 1.0) -> None:
        self.totals.append(total.detach() if total.requires_grad else total)
        if isinstance(count, Tensor):
            self.counts.append(count.detach())
        else:
            self.counted += count
        if len(self.totals) >= MOST_KEPT:
            self.pair()

    def extend(self, totals: list[Tensor], counts: list[Tensor], counted: float) -> None:
        """What was kept elsewhere, as `add` would have it."""
        self.totals += totals
        self.counts += counts
        self.counted += counted
        if len(self.totals) >= MOST_KEPT:
            self.pair()

    def pair(self) -> Tensor:
        """float64 [2]: sum and count."""
        total = torch.stack(self.totals).double().sum()
        count = torch.stack(self.counts).double().sum() if self.counts else torch.zeros_like(total)
        self.totals, self.counts = [total], [count] if self.counts else []
        return torch.stack([total, count + self.counted])


class TrainingModule(pl.LightningModule):
    """One optimizer, one EMA; subclasses give `training_step` and `validation_terms`.

    `frozen` networks are not trained, not in the state dict, not seen by DDP; they move with the module.
    """

    def __init__(
        self,
        optimizer: Callable[..., torch.optim.Optimizer],
        lr_schedule: LRSchedule,
        ema_decay: float,
        seed: int,
        ema_lengths: Sequence[float] = (),
    ) -> None:
        super().__init__()
        if not 0 <= ema_decay < 1:
            raise ValueError(f"ema_decay={ema_decay} must be in [0, 1)")
        if len({exponent(length) for length in ema_lengths}) < len(ema_lengths):
            raise ValueError(f"ema_lengths={list(ema_lengths)} has a length twice")
        self.make_optimizer, self.lr_schedule = optimizer, lr_schedule
        self.ema_decay, self.ema_lengths, self.seed = ema_decay, tuple(ema_lengths), seed
        self.ema: EMA | None = None
        self.frozen: dict[str, nn.Module] = {}
        self.recorded: dict[str, Sums] = {}
        self.bad_in_a_row = torch.zeros((), dtype=torch.int64)  # newest steps without a finite gradient
        self.parameter_rules: Sequence[ParameterRule] = ()
        self.batch_ended = 0.0  # time.perf_counter() when the last batch was done with
        self.alive_at, self.doing, self.long_works = time.monotonic(), "the start", 0
        self.losses: list[float] = []  # of the newest steps, for SpikeLog; stored with the checkpoint
        self.unread: Callable[[], None] = lambda: None  # SpikeLog's: it reads when the rest is read

    def keep_frozen(self, name: str, network: nn.Module) -> None:
        """Keep `network` beside the module: eval mode for good, no gradients."""
        self.frozen[name] = network.eval().requires_grad_(False)

    @property
    def on_host(self) -> bool:
        """Whether the module's numbers can be read without waiting for a device."""
        return self.device.type == "cpu"

    @property
    def tokenizer(self) -> Callable[[Sequence[str]], Tensor] | None:
        """What loader workers turn captions into tokens with; None if the stage reads no captions."""
        return None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> TrainingModule:
        for network in self.frozen.values():
            network._apply(fn, recurse)
        return super()._apply(fn, recurse)

    def alive(self, doing: str, long: bool = False) -> None:
        """A sign of life for `StepWatchdog`; `doing` comes next.

        long: it may take as long as a first step, on this rank, or on another one that this one waits for.
        """
        own = vars(self)  # a Module's way of setting an attribute asks about tensors, for microseconds
        own["alive_at"], own["doing"] = time.monotonic(), doing
        own["long_works"] += long

    def record(self, name: str, total: Tensor, count: Tensor | float = 1.0) -> None:
        """Add to the mean called `name`; read and cleared by the log every so many steps."""
        self.recorded.setdefault(name, Sums()).add(total, count)

    def recorded_sums(self) -> dict[str, tuple[float, float]]:
        """(sum, count) over all ranks of what was recorded and not yet taken. Waits for the device."""
        self.unread()
        if not self.recorded:
            return {}
        names = sorted(self.recorded)
        pairs = torch.stack([self.recorded[name].pair() for name in names])
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(pairs)
        return {name: (total, count) for name, (total, count) in zip(names, pairs.tolist(), strict=True)}

    def take_recorded(self) -> dict[str, float]:
        """Means of what was recorded since the last call, over all ranks. Waits for the device."""
        sums, self.recorded = self.recorded_sums(), {}
        return {name: total / count for name, (total, count) in sums.items() if count > 0}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Also starts the EMA: the weights are on their device, and no callback has loaded others yet."""
        self.ema = EMA(self, self.ema_decay, self.ema_lengths)
        given = getattr(self.make_optimizer, "keywords", {})
        decay, lr = given.get("weight_decay", 0.0), given.get("lr")
        optimizer = self.make_optimizer(parameter_groups(self, decay, self.parameter_rules, lr))
        if self.on_host:  # torch would look for a GPU's driver in each step: is a graph being captured?
            vars(optimizer)["_accelerator_graph_capture_health_check"] = lambda: None
        return optimizer

    def on_fit_start(self) -> None:
        """Take two habits off Lightning: each step, its ranks would wait for the device to learn of signals
        (`Guard` sees to those), and it would convert the fields of a Batch, which the networks do.
        """
        vars(self.trainer.fit_loop.epoch_loop)["_broadcast_sigterm_tensor"] = lambda: None
        vars(self.trainer.precision_plugin)["convert_input"] = lambda batch: batch

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """What layers draw themselves (dropout) depends on (seed, step, micro-batch, rank), so it resumes."""
        trainer = self.trainer
        micro = trainer.accumulate_grad_batches
        place = trainer.global_step * micro + batch_idx % micro
        seed = keyed_word(self.seed, place * trainer.world_size + trainer.global_rank, "layers")
        if self.on_host:  # torch.manual_seed would keep a stack trace for each GPU library that is not in use
            torch.default_generator.manual_seed(seed)
        else:
            torch.manual_seed(seed)

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        # after all callbacks: from here on the loop waits for data
        vars(self)["batch_ended"] = time.perf_counter()
        self.alive("a training batch")

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip the norm of the whole gradient, and log it; Lightning refuses fused optimizers this way.

        In fp16 a fused optimizer unscales the gradient itself, afterwards: its norm is not known here.
        """
        scaled = getattr(self.trainer.precision_plugin, "scaler", None) is not None
        hidden = scaled and any(group.get("fused") for group in optimizer.param_groups)
        assert self.ema is not None
        if hasattr(optimizer, "clip_to"):
            norm = total_norm(p.grad for p in self.ema.parameters if p.grad is not None)
            optimizer.clip_to(norm, gradient_clip_val)
        elif gradient_clip_val and self.ema.sharded:
            norm = clip_norm(self.ema.parameters, gradient_clip_val)
        elif gradient_clip_val:
            norm = torch.nn.utils.clip_grad_norm_(self.ema.parameters, gradient_clip_val)
        elif not hidden:
            norm = total_norm(p.grad for p in self.ema.parameters if p.grad is not None)
        else:
            return
        self.record("train/grad_norm", norm)  # before clipping
        if self.on_host and not scaled and math.isfinite(norm.item()) and not self.bad_in_a_row.item():
            # all is well, without ten operations on one number
            self.record("train/skipped", self.bad_in_a_row)
        elif not scaled:  # a scaler looks at its gradients itself
            finite = torch.isfinite(norm.detach())
            bad = ~finite
            self.bad_in_a_row = (self.bad_in_a_row.to(bad.device) + 1) * bad
            self.record("train/skipped", bad)
            if not self.may_step(optimizer, finite):
                raise NotFiniteError

    def may_step(self, optimizer: torch.optim.Optimizer, finite: Tensor) -> bool:
        """Whether `optimizer` may step: not with a gradient that is not `finite`, on any rank.

        Fused optimizers on a GPU are told there, and leave weights and moments as they are (the average comes
        1 - decay nearer to them). For others the number is read here: on a GPU that waits.
        """
        if self.on_host or not all(group.get("fused") for group in optimizer.param_groups):
            return bool(finite)
        told: Any = optimizer
        told.grad_scale, told.found_inf = None, (~finite).float()
        return True

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None
    ) -> None:
        step, own = self.trainer.global_step, self.trainer.optimizers[0]
        factor = self.lr_schedule(step)
        for group in own.param_groups:
            group.setdefault("base_lr", group["lr"])
            group["lr"] = group["base_lr"] * factor
        assert self.ema is not None
        if hasattr(own, "average_with"):  # the optimizer moves our average in its own pass
            own.average_with(self.ema.by_parameter(), self.ema.decay_at(step))
        try:
            self.trainer.strategy.optimizer_step(own, optimizer_closure)
        except NotFiniteError:
            return
        if hasattr(own, "average_with"):
            self.ema.update_profiles(step)
        elif hasattr(own, "average_into"):  # the optimizer knows the average of its own
            own.average_into(self.ema.by_parameter())
            self.ema.update_profiles(step)
        else:
            self.ema.update(step)

    def extra_state(self) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
        """For the checkpoint, beside weights, EMA and optimizer: (tensors by file, a JSON document)."""
        assert self.ema is not None
        averages = {f"ema-{length}": self.ema.state_dict(length) for length in self.ema_lengths}
        return averages, {"losses": self.losses}

    def load_extra_state(self, load: Callable[[str], dict[str, Tensor]], document: dict[str, Any]) -> None:
        """Put back what `extra_state` gave; `load(file)` reads the tensors of one of its files."""
        assert self.ema is not None
        for length in self.ema_lengths:
            self.ema.load_state_dict(load(f"ema-{length}"), length)
        self.losses = list(document.get("losses", []))

    def validation_terms(self, batch: Batch) -> dict[str, tuple[Tensor, Tensor]]:
        """Sums and counts, by name, that a pass over the validation data adds up."""
        raise TypeError(f"{type(self).__name__} defines no validation")
