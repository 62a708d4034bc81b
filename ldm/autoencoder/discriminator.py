"""The critic of stage 1: is each patch of a picture real? And the losses of both players.

PatchGAN of pix2pix (Isola et al. 2017) as VQGAN uses it (Esser et al. 2021), with group norm in the place of
batch norm: no statistics of a batch, so neither its size nor the number of ranks changes what is learnt.
b batch, h w patches. Losses are in float32 at least, one a picture: means over its patches.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.nn.norm import GroupNorm

SLOPE = 0.2  # of the leaky ReLU
INIT_STD = 0.02  # of the convolutions' weights
WIDEST = 8  # times `width`


class PatchDiscriminator(nn.Module):
    """Images [b c H W] -> logits [b 1 h w], positive for real.

    `layers` strided convolutions of 4 x 4, whose channels double from `width` up to 8 * width: with 3, a
    logit sees 70 x 70 pixels and the logits of 256 px are 30 x 30. Pictures need 3 * 2^layers pixels a side.
    """

    def __init__(self, in_channels: int = 3, width: int = 64, layers: int = 3, norm_groups: int = 32) -> None:
        super().__init__()
        widths = [width * min(2**i, WIDEST) for i in range(layers + 1)]
        for channels in widths[1:]:
            if channels % norm_groups:
                raise ValueError(
                    f"discriminator of {channels} channels is not a multiple of norm_groups {norm_groups}"
                )
        parts: list[nn.Module] = [nn.Conv2d(in_channels, width, 4, stride=2, padding=1), nn.LeakyReLU(SLOPE)]
        for i in range(layers):
            stride = 2 if i < layers - 1 else 1
            conv = nn.Conv2d(widths[i], widths[i + 1], 4, stride=stride, padding=1, bias=False)
            parts += [conv, GroupNorm(norm_groups, widths[i + 1]), nn.LeakyReLU(SLOPE)]
        self.layers = nn.Sequential(*parts, nn.Conv2d(widths[-1], 1, 4, padding=1))
        for layer in self.layers:
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, 0.0, INIT_STD)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)


def hinge_discriminator(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """(relu(1 - real) + relu(1 + fake)) / 2: [b 1 h w] twice -> [b] (Lim and Ye 2017)."""
    return 0.5 * (_mean(F.relu(1 - _exact(real_logits))) + _mean(F.relu(1 + _exact(fake_logits))))


def hinge_generator(fake_logits: Tensor) -> Tensor:
    """-fake: [b 1 h w] -> [b]."""
    return -_mean(_exact(fake_logits))


def softplus_discriminator(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """(softplus(-real) + softplus(fake)) / 2: [b 1 h w] twice -> [b] (Goodfellow et al. 2014)."""
    return 0.5 * (_mean(F.softplus(-_exact(real_logits))) + _mean(F.softplus(_exact(fake_logits))))


def softplus_generator(fake_logits: Tensor) -> Tensor:
    """softplus(-fake), the non-saturating loss: [b 1 h w] -> [b]."""
    return _mean(F.softplus(-_exact(fake_logits)))


def _exact(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _mean(x: Tensor) -> Tensor:
    return x.flatten(1).mean(dim=1)
