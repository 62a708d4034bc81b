"""An autoencoder that learns only what a linear map of pixel patches misses: pictures after minutes on a CPU.

The linear path joins each patch of factor x factor pixels to its latents, as the shortcuts of residual
autoencoding do (Chen et al., "Deep compression autoencoder", 2024). It starts as the first terms of the
cosine transform, as in JPEG; the network starts at zero beside it. The network sees the picture as patches
of patch_size x patch_size pixels along channels, so no convolution runs at full resolution.
Not an AutoencoderKL that other tools load: for that train `AutoencoderKL`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.autoencoder.kl import AutoencoderKL

LOG_VARIANCE = -6.0  # of the posterior at the start: noise must not drown what the linear path carries
COLOURS = ((1.0, 1.0, 1.0), (1.0, 0.0, -1.0), (1.0, -2.0, 1.0))  # brightness, two of hue
HUE_COST = 2.0  # on squared frequency: the eye and most pictures have less detail in hue


def cosine_basis(size: int, count: int) -> Tensor:
    """The `count` lowest of the 3 * size^2 orthonormal cosine terms of a patch: [count 3 size size].

    DCT-II (Ahmed, Natarajan and Rao 1974) along both sides, for brightness and two orthogonal hues.
    """
    k = torch.arange(size, dtype=torch.float64)
    waves = torch.cos(math.pi * (2 * k + 1) * k[:, None] / (2 * size)) * math.sqrt(2 / size)
    waves[0] /= math.sqrt(2)
    colours = F.normalize(torch.tensor(COLOURS, dtype=torch.float64))
    order = sorted(
        ((u * u + v * v + (hue > 0)) * (HUE_COST if hue else 1.0), hue, u, v)
        for hue in range(3)
        for u in range(size)
        for v in range(size)
    )
    terms = [torch.einsum("c,y,x->cyx", colours[hue], waves[u], waves[v]) for _, hue, u, v in order[:count]]
    return torch.stack(terms).float()


class ResidualAutoencoderKL(AutoencoderKL):
    """`AutoencoderKL` over patches, plus the linear path; factor = patch_size * 2^(levels - 1)."""

    def __init__(
        self, latent_channels: int, block_out_channels: Sequence[int], patch_size: int = 4, **options: Any
    ) -> None:
        values, factor = 3 * patch_size**2, patch_size * 2 ** (len(block_out_channels) - 1)
        if not 0 < latent_channels <= 3 * factor**2:
            raise ValueError(f"latent_channels={latent_channels}, but a patch has {3 * factor**2} values")
        super().__init__(
            in_channels=values,
            out_channels=values,
            latent_channels=latent_channels,
            block_out_channels=block_out_channels,
            **options,
        )
        self.patch_size = patch_size
        self.factor = factor
        self.linear_encoder = nn.Conv2d(3 * self.factor**2, 2 * latent_channels, 1)
        self.linear_decoder = nn.Conv2d(latent_channels, 3 * self.factor**2, 1)
        self._start_linear()

    @torch.no_grad()
    def _start_linear(self) -> None:
        """The cosine projection and its transpose; nothing yet from the network."""
        c = self.latent_channels
        nn.init.zeros_(self.linear_encoder.weight)
        self.linear_encoder.weight[:c] = cosine_basis(self.factor, c).reshape(c, -1, 1, 1)
        self.linear_decoder.weight.copy_(self.linear_encoder.weight[:c].transpose(0, 1))
        for bias in (self.linear_encoder.bias, self.linear_decoder.bias):
            assert bias is not None
            nn.init.zeros_(bias)
        self.linear_encoder.bias[c:] = LOG_VARIANCE  # type: ignore[index]
        last = self.encoder.conv_out if self.quant_conv is None else self.quant_conv
        for parameter in (*last.parameters(), *self.decoder.conv_out.parameters()):
            nn.init.zeros_(parameter)

    def _encode(self, images: Tensor) -> Tensor:
        patches = F.pixel_unshuffle(images, self.patch_size).contiguous(memory_format=torch.channels_last)
        cells = F.pixel_unshuffle(images, self.factor).contiguous(memory_format=torch.channels_last)
        return super()._encode(patches) + self.linear_encoder(cells)

    def _decode(self, z: Tensor) -> Tensor:
        network = F.pixel_shuffle(super()._decode(z), self.patch_size)
        return network + F.pixel_shuffle(self.linear_decoder(z), self.factor)
