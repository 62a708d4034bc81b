"""What stage 1 minimises, without the adversarial part: b batch, c latent channels, h w latent size.

Every term is **per pixel value**: reconstruction terms are means over the 3*H*W values of an image, and KL is
its sum over c h w divided by the same 3*H*W. This is the objective of Rombach et al. 2022 (who sum all of it
over the image) divided by 3*H*W: the balance is theirs, so that their KL weight 1e-6 keeps its meaning.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.autoencoder.kl import kl as posterior_kl

FLAT = 1e-4  # added under the root, where the slope of a flat window would be infinite


class ReconstructionLoss(nn.Module):
    """l1*|e| + l2*e^2 + gradient*(|dx e|^2 + |dy e|^2) + edges*E + perceptual_weight*perceptual + kl*KL.

    e is the error, dx and dy finite differences between neighbouring pixels. E is the error in edge strength:
    the root mean square of dx and dy in windows of 4 x 4 pixels, so that it asks for edges as sharp as the
    picture's and not for each pixel of them. `perceptual(output, target)` -> [b] or [b 1 1 1] comes frozen
    from outside.
    """

    def __init__(
        self,
        l1: float = 1.0,
        l2: float = 0.0,
        gradient: float = 0.0,
        edges: float = 0.0,
        kl: float = 1e-6,
        perceptual: nn.Module | None = None,
        perceptual_weight: float = 1.0,
    ) -> None:
        super().__init__()
        self.l1 = l1
        self.l2 = l2
        self.gradient = gradient
        self.edges = edges
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
            terms["gradient"] = _mean(error.diff(dim=3).square()) + _mean(error.diff(dim=2).square())
            loss = loss + self.gradient * terms["gradient"]
        if self.edges:
            terms["edges"] = _mean((edge_strength(output) - edge_strength(target)).abs())
            loss = loss + self.edges * terms["edges"]
        if self.perceptual is not None:
            terms["perceptual"] = self.perceptual(output, target).flatten(1).mean(dim=1)
            loss = loss + self.perceptual_weight * terms["perceptual"]
        return loss, {name: value.detach().mean() for name, value in {**terms, "loss": loss}.items()}


def edge_strength(images: Tensor, window: int = 4) -> Tensor:
    """Root of the mean of |dx|^2 + |dy|^2 in each window: [b 3 H W] -> [b 3 H//window W//window], float32."""
    images = images.to(torch.promote_types(images.dtype, torch.float32))
    dx, dy = F.pad(images.diff(dim=3), (0, 1)), F.pad(images.diff(dim=2), (0, 0, 0, 1))
    return (F.avg_pool2d(dx.square() + dy.square(), window) + FLAT).sqrt()


def _mean(x: Tensor) -> Tensor:
    """Mean over all but the batch: [b ...] -> [b]."""
    return x.flatten(1).mean(dim=1)
