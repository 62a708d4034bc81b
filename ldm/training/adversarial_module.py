"""Stage 1 with a discriminator: the autoencoder learns to draw what it cannot tell from the data.

Esser et al., "Taming transformers for high-resolution image synthesis" (VQGAN), 2021, section 3.2.
The discriminator lives beside the module, as the EMA does: not in its state dict, its EMA or DDP. Lightning
steps the autoencoder's optimizer and counts its steps; the discriminator's follows it within the same step,
on the gradient of the same micro-batches, averaged over ranks by one all-reduce.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ldm.checkpoints.optimizer import flatten_optimizer, restore_optimizer
from ldm.errors import InputError
from ldm.training.autoencoder_module import AutoencoderModule
from ldm.types import Batch

MOST = 1e4  # bound of the adaptive weight
SMALL = 1e-4  # added to the norm that it divides by


class AdversarialAutoencoderModule(AutoencoderModule):
    """`AutoencoderModule` plus `weight` * adaptive * `generator_loss(logits)` from optimizer step `start` on.

    adaptive: ratio of the norms of the two losses' gradients at the decoder's last layer, of all ranks'
    gradients together (of each micro-batch by itself), between 0 and 1e4; False: 1.
    discriminator_loss(real logits, fake logits) and generator_loss(fake logits) -> [b].
    """

    discriminator: nn.Module

    def __init__(
        self,
        *args: Any,
        discriminator: nn.Module | None = None,
        discriminator_optimizer: Callable[..., torch.optim.Optimizer],
        discriminator_loss: Callable[[Tensor, Tensor], Tensor],
        generator_loss: Callable[[Tensor], Tensor],
        start: int = 50_000,
        weight: float = 0.5,
        adaptive: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(*args, **options)
        if start < 0 or weight <= 0:
            raise ValueError(f"start={start} must be at least 0, and weight={weight} above 0")
        if discriminator is None:
            raise ValueError("discriminator=null, and this module trains against one: discriminator=patchgan")
        vars(self)["discriminator"] = discriminator  # not as a submodule
        self.make_discriminator_optimizer = discriminator_optimizer
        self.discriminator_loss, self.generator_loss = discriminator_loss, generator_loss
        self.start, self.weight, self.adaptive = start, weight, adaptive
        self.discriminator_optimizer: torch.optim.Optimizer | None = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> AdversarialAutoencoderModule:
        self.discriminator._apply(fn, recurse)
        super()._apply(fn, recurse)
        return self

    def configure_optimizers(self) -> torch.optim.Optimizer:
        if self.adaptive and not self.autoencoder.decoder.conv_out.weight.requires_grad:
            what = "freezes decoder.conv_out, where the adaptive weight is measured"
            raise InputError("parameter_groups", what, "add module.adaptive=false")
        self.discriminator_optimizer = self.make_discriminator_optimizer(self.discriminator.parameters())
        return super().configure_optimizers()

    def on_fit_start(self) -> None:
        if getattr(self.trainer.precision_plugin, "scaler", None) is not None:
            what = "16-mixed scales the loss of one optimizer, and a discriminator has its own"
            raise InputError("trainer.precision", what, "use bf16-mixed or 32-true")
        super().on_fit_start()

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        images, reconstruction, loss = self.reconstruct_and_judge(batch)
        if self.trainer.global_step < self.start:
            return loss
        adversarial = self._judge(images, reconstruction, batch.weight)
        factor = self._adaptive_weight(loss, adversarial) if self.adaptive else torch.ones_like(loss)
        self.record("train/adversarial", adversarial)
        self.record("train/adaptive_weight", factor)
        return loss + self.weight * factor * adversarial

    def _judge(self, images: Tensor, reconstruction: Tensor, weight: Tensor) -> Tensor:
        """Add to the discriminator's gradient; returns the generator's loss, through the same weights."""
        shares = self.trainer.accumulate_grad_batches
        with torch.enable_grad():
            logits = self.discriminator(torch.cat([images, reconstruction.detach().to(images)]))
            real, fake = logits.chunk(2)
            loss = (self.discriminator_loss(real, fake) * weight).mean()
            (loss / shares).backward()
        for name, value in (("discriminator", loss), ("logits_real", real), ("logits_fake", fake)):
            self.record(f"train/{name}", value.mean())
        self.discriminator.requires_grad_(False)
        losses = self.generator_loss(self.discriminator(reconstruction))
        self.discriminator.requires_grad_(True)
        return (losses * weight).mean()

    def _adaptive_weight(self, loss: Tensor, adversarial: Tensor) -> Tensor:
        last = self.autoencoder.decoder.conv_out.weight
        pair = [torch.autograd.grad(part, last, retain_graph=True)[0] for part in (loss, adversarial)]
        gradients = torch.stack(pair).to(torch.promote_types(last.dtype, torch.float32))
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(gradients)  # the sum: only the ratio of the norms counts
            gradients /= torch.distributed.get_world_size()
        norm, adversarial_norm = gradients.flatten(1).norm(dim=1)
        return (norm / (adversarial_norm + SMALL)).clamp(0, MOST).detach()

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None
    ) -> None:
        step = self.trainer.global_step
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        if step >= self.start:
            self._step_discriminator(self.lr_schedule(step))

    def _step_discriminator(self, factor: float) -> None:
        """One step of its optimizer, with the clipping and the schedule of the autoencoder's."""
        assert self.discriminator_optimizer is not None
        parameters = [p for p in self.discriminator.parameters() if p.grad is not None]
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            average([p.grad for p in parameters if p.grad is not None])
        norm = torch.nn.utils.get_total_norm(p.grad for p in parameters if p.grad is not None)
        if clip := self.trainer.gradient_clip_val:
            torch.nn.utils.clip_grads_with_norm_(parameters, clip, norm)
        for group in self.discriminator_optimizer.param_groups:
            group.setdefault("base_lr", group["lr"])
            group["lr"] = group["base_lr"] * factor
        if self.may_step(self.discriminator_optimizer, torch.isfinite(norm)):
            self.discriminator_optimizer.step()
        self.discriminator_optimizer.zero_grad(set_to_none=True)

    def extra_state(self) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
        assert self.discriminator_optimizer is not None
        tensors, settings = super().extra_state()
        names = {p: name for name, p in self.discriminator.named_parameters()}
        moments, document = flatten_optimizer(self.discriminator_optimizer, names)
        own = {"discriminator": self.discriminator.state_dict(), "discriminator_optimizer": moments}
        return tensors | own, settings | {"discriminator": document}

    def load_extra_state(self, load: Callable[[str], dict[str, Tensor]], document: dict[str, Any]) -> None:
        super().load_extra_state(load, document)
        if "discriminator" not in document:
            fix = "init_from= takes weights alone"
            raise InputError("resume", "the checkpoint was trained without a discriminator", fix)
        assert self.discriminator_optimizer is not None
        self.discriminator.load_state_dict(load("discriminator"))
        names = {p: name for name, p in self.discriminator.named_parameters()}
        moments = load("discriminator_optimizer")
        restore_optimizer(self.discriminator_optimizer, names, moments, document["discriminator"])


def average(gradients: list[Tensor]) -> None:
    """The mean over all ranks, in place, by one all-reduce."""
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    torch.distributed.all_reduce(flat)
    flat /= torch.distributed.get_world_size()
    parts = flat.split([gradient.numel() for gradient in gradients])
    torch._foreach_copy_(gradients, [p.view_as(g) for p, g in zip(parts, gradients, strict=True)])
