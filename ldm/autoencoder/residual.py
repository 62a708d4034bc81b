"""An autoencoder that learns only what a linear map of pixel patches misses: pictures after minutes on a CPU.

The linear path joins each patch of factor x factor pixels to its latents, as the shortcuts of residual
autoencoding do (Chen et al., "Deep compression autoencoder", 2024); the network starts at zero beside it, and
sees the picture as patches of patch_size x patch_size pixels along channels, so no convolution runs at full
resolution. Not an AutoencoderKL that other tools load: for that train `AutoencoderKL`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.autoencoder.kl import AutoencoderKL

LOG_VARIANCE = -6.0  # of the posterior at the start: noise must not drown what the linear path carries


class ResidualAutoencoderKL(AutoencoderKL):
    """`AutoencoderKL` over patches, plus the linear path; factor = patch_size * 2^(levels - 1)."""

    def __init__(
        self, latent_channels: int, block_out_channels: Sequence[int], patch_size: int = 4, **options: Any
    ) -> None:
        if patch_size < 1:
            raise ValueError(f"patch_size={patch_size} must be at least 1 pixel")
        values = 3 * patch_size**2
        super().__init__(
            in_channels=values,
            out_channels=values,
            latent_channels=latent_channels,
            block_out_channels=block_out_channels,
            **options,
        )
        self.patch_size = patch_size
        self.factor *= patch_size
        self.linear_encoder = nn.Conv2d(3 * self.factor**2, 2 * latent_channels, 1)
        self.linear_decoder = nn.Conv2d(latent_channels, 3 * self.factor**2, 1)
        self._start_linear()

    @torch.no_grad()
    def _start_linear(self) -> None:
        """An orthonormal projection and its transpose; nothing yet from the network."""
        c = self.latent_channels
        nn.init.zeros_(self.linear_encoder.weight)
        nn.init.orthogonal_(self.linear_encoder.weight[:c].view(c, -1))
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
