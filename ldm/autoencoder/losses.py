"""What stage 1 minimises, without the adversarial part: b batch, H W image size.

Every term is **per pixel value**: reconstruction terms are means over the 3*H*W values of an image, and KL is
its sum over the latents divided by the same 3*H*W. This is the objective of Rombach et al. 2022 (who sum all
of it over the image) divided by 3*H*W: the balance is theirs, so that their KL weight 1e-6 keeps its meaning.
The codebook term is a mean over the latents' values and is added as it is (Esser et al. 2021).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FLAT = 1e-4  # added under the root, where the slope of a flat window would be infinite

Perceptual = Callable[[Tensor, Tensor], Tensor]  # (output, target) [b 3 H W] -> [b]


class ReconstructionLoss(nn.Module):
    """R / exp(s) + s + kl*KL + codebook*C, where R is
    l1*|e| + l2*e^2 + gradient*(|dx e|^2 + |dy e|^2) + edges*E + perceptual_weight*perceptual.

    e is the error, dx and dy finite differences between neighbouring pixels. E is the error in edge strength:
    the root mean square of dx and dy in windows of 4 x 4 pixels, so that it asks for edges as sharp as the
    picture's and not for each pixel of them. KL and C are the terms "kl" and "codebook" of the autoencoder.
    s is 0, or with `learn_log_variance` a parameter that starts at `log_variance`.
    """

    def __init__(
        self,
        l1: float = 1.0,
        l2: float = 0.0,
        gradient: float = 0.0,
        edges: float = 0.0,
        kl: float = 1e-6,
        codebook: float = 1.0,
        perceptual_weight: float = 1.0,
        learn_log_variance: bool = False,
        log_variance: float = 0.0,
    ) -> None:
        super().__init__()
        self.l1 = l1
        self.l2 = l2
        self.gradient = gradient
        self.edges = edges
        self.kl = kl
        self.codebook = codebook
        self.perceptual_weight = perceptual_weight
        self.log_variance = nn.Parameter(torch.tensor(log_variance)) if learn_log_variance else None

    def forward(
        self,
        output: Tensor,
        target: Tensor,
        terms: Mapping[str, Tensor],
        perceptual: Perceptual | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Images [b 3 H W] in [-1, 1], the autoencoder's terms [b] -> loss [b], and the unweighted means.

        All in float32 at least. The mean of `kl` is in nats an image, summed over its latents.
        """
        loss, logged = self.nll(output, target, perceptual)
        loss = loss + self.regularisation(terms, output[0].numel())
        logged = logged | {name: value.detach().mean() for name, value in terms.items()}
        return loss, logged | {"loss": loss.detach().mean()}

    def nll(
        self, output: Tensor, target: Tensor, perceptual: Perceptual | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The part that compares images: [b 3 H W] twice -> R / exp(s) + s [b], and the unweighted means."""
        if output.shape != target.shape:
            raise ValueError(f"output has shape {list(output.shape)}, target {list(target.shape)}")
        error = output.to(torch.promote_types(output.dtype, torch.float32)) - target
        terms = {"l1": _mean(error.abs())}
        loss = self.l1 * terms["l1"]
        if self.l2:
            terms["l2"] = _mean(error.square())
            loss = loss + self.l2 * terms["l2"]
        if self.gradient:
            terms["gradient"] = _mean(error.diff(dim=3).square()) + _mean(error.diff(dim=2).square())
            loss = loss + self.gradient * terms["gradient"]
        if self.edges:
            terms["edges"] = _mean((edge_strength(output) - edge_strength(target)).abs())
            loss = loss + self.edges * terms["edges"]
        if perceptual is not None:
            terms["perceptual"] = perceptual(output, target)
            loss = loss + self.perceptual_weight * terms["perceptual"]
        logged = {name: value.detach().mean() for name, value in terms.items()}
        if self.log_variance is not None:
            loss = loss / self.log_variance.exp() + self.log_variance
            logged["log_variance"] = self.log_variance.detach().clone()
        return loss, logged

    def regularisation(self, terms: Mapping[str, Tensor], values: int) -> Tensor | float:
        """The part that concerns the latents of images with that many `values` (3*H*W): [b]."""
        loss: Tensor | float = 0.0
        if "kl" in terms:
            loss = loss + self.kl * terms["kl"] / values
        if "codebook" in terms:
            loss = loss + self.codebook * terms["codebook"]
        return loss


def edge_strength(images: Tensor, window: int = 4) -> Tensor:
    """Root of the mean of |dx|^2 + |dy|^2 in each window: [b 3 H W] -> [b 3 H//window W//window], float32."""
    images = images.to(torch.promote_types(images.dtype, torch.float32))
    dx, dy = F.pad(images.diff(dim=3), (0, 1)), F.pad(images.diff(dim=2), (0, 0, 0, 1))
    return (F.avg_pool2d(dx.square() + dy.square(), window) + FLAT).sqrt()


def _mean(x: Tensor) -> Tensor:
    """Mean over all but the batch: [b c h w] -> [b].

    Of channels last, flattening would be a copy, and so would be the gradient that `mean` hands back.
    """
    return x.sum((1, 2, 3)) / x[0].numel()
