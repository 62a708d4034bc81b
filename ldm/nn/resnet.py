"""Convolution blocks of the U-Net and the autoencoders: b batch, c channels, h w size, d embedding width.

State-dict names are those of diffusers. Memory format is kept: channels_last in, channels_last out.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from ldm.nn.norm import group_norm


def zeroed(layer: nn.Module) -> nn.Module:
    """The same layer with parameters 0, so that the residual branch it ends starts as the identity."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


class ResnetBlock(nn.Module):
    """Norm, SiLU, conv, twice, around a skip; an embedding is added between the two (BigGAN, DDPM).

    `emb_width` None: no embedding. `zero_init`: the second convolution starts at 0.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        emb_width: int | None = None,
        norm_groups: int = 32,
        eps: float,
        dropout: float = 0.0,
        zero_init: bool = False,
    ) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(norm_groups, in_channels, eps)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time_emb_proj = nn.Linear(emb_width, out_channels) if emb_width else None
        self.norm2 = nn.GroupNorm(norm_groups, out_channels, eps)
        self.dropout = nn.Dropout(dropout)
        conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv2 = zeroed(conv2) if zero_init else conv2
        self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, x: Tensor, activated_emb: Tensor | None = None) -> Tensor:
        """[b c_in h w] -> [b c_out h w]; `activated_emb` is SiLU(embedding) [b d], computed once."""
        h = self.conv1(group_norm(x, self.norm1, silu=True))
        emb = None if self.time_emb_proj is None else self.time_emb_proj(activated_emb)
        h = self.conv2(self.dropout(group_norm(h, self.norm2, emb, silu=True)))
        return (x if self.conv_shortcut is None else self.conv_shortcut(x)) + h


class Downsample(nn.Module):
    """Halve height and width by a strided convolution, padded all round or (`asymmetric`) right and below."""

    def __init__(self, channels: int, asymmetric: bool = False) -> None:
        super().__init__()
        self.asymmetric = asymmetric
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=0 if asymmetric else 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)) if self.asymmetric else x)


class Upsample(nn.Module):
    """Enlarge to `size` by nearest neighbours, then a convolution; size None: double."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        return self.conv(F.interpolate(x, size=size or (2 * x.shape[2], 2 * x.shape[3]), mode="nearest"))


class Level(nn.Module):
    """The blocks of one resolution, under diffusers' names (lists may be empty); subclasses run them."""

    def __init__(
        self,
        resnets: Sequence[nn.Module],
        attentions: Sequence[nn.Module] = (),
        downsamplers: Sequence[nn.Module] = (),
        upsamplers: Sequence[nn.Module] = (),
    ) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(resnets)
        self.attentions = nn.ModuleList(attentions)
        self.downsamplers = nn.ModuleList(downsamplers)
        self.upsamplers = nn.ModuleList(upsamplers)
