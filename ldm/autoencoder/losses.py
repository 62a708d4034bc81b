"""What stage 1 minimises, without the adversarial part: b batch, c latent channels, h w latent size.

Every term is **per pixel value**: reconstruction terms are means over the 3*H*W values of an image, and KL is
its sum over c h w divided by the same 3*H*W. This is the objective of Rombach et al. 2022 (who sum all of it
over the image) divided by 3*H*W: the balance is theirs, so that their KL weight 1e-6 keeps its meaning.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ldm.autoencoder.kl import kl as posterior_kl


class ReconstructionLoss(nn.Module):
    """l1*|e| + l2*e^2 + gradient*(|dx e| + |dy e|) + perceptual_weight*perceptual + kl*KL, e the error.

    The weight of `gradient` is on finite differences of the error between neighbouring pixels, which punishes
    blurred and displaced edges. `perceptual(output, target)` -> [b] or [b 1 1 1] comes frozen from outside.
    """

    def __init__(
        self,
        l1: float = 1.0,
        l2: float = 0.0,
        gradient: float = 0.0,
        kl: float = 1e-6,
        perceptual: nn.Module | None = None,
        perceptual_weight: float = 1.0,
    ) -> None:
        super().__init__()
        self.l1 = l1
        self.l2 = l2
        self.gradient = gradient
        self.kl = kl
        self.perceptual = perceptual
        self.perceptual_weight = perceptual_weight

    def forward(self, output: Tensor, target: Tensor, moments: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Images [b 3 H W] in [-1, 1], moments [b 2c h w] -> loss [b], and the terms' unweighted means.

        All in float32 at least. The mean of `kl` is in nats an image, summed over its latents.
        """
        if output.shape != target.shape:
            raise ValueError(f"output has shape {list(output.shape)}, target {list(target.shape)}")
        error = output.to(torch.promote_types(output.dtype, torch.float32)) - target
        nats = posterior_kl(moments)
        terms = {"l1": _mean(error.abs()), "kl": nats}
        loss = self.l1 * terms["l1"] + self.kl * nats / error[0].numel()
        if self.l2:
            terms["l2"] = _mean(error.square())
            loss = loss + self.l2 * terms["l2"]
        if self.gradient:
            terms["gradient"] = _mean(error.diff(dim=3).abs()) + _mean(error.diff(dim=2).abs())
            loss = loss + self.gradient * terms["gradient"]
        if self.perceptual is not None:
            terms["perceptual"] = self.perceptual(output, target).flatten(1).mean(dim=1)
            loss = loss + self.perceptual_weight * terms["perceptual"]
        return loss, {name: value.detach().mean() for name, value in {**terms, "loss": loss}.items()}


def _mean(x: Tensor) -> Tensor:
    """Mean over all but the batch: [b ...] -> [b]."""
    return x.flatten(1).mean(dim=1)
