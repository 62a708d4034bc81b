"""The autoencoder with a Gaussian posterior (stage 1 of latent diffusion), for any power-of-two factor.

Rombach et al. 2022, section 3.1; Kingma and Welling 2014. State-dict names are those of diffusers'
AutoencoderKL. b batch, c latent channels, h w latent size, H W image size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ldm.autoencoder.base import ConvAutoencoder

LOG_VARIANCE_RANGE = (-30.0, 20.0)


def posterior(moments: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and log-variance [b c h w], the latter clamped to [-30, 20], in float32 at least."""
    exact = moments.to(torch.promote_types(moments.dtype, torch.float32))
    mean, log_variance = exact.chunk(2, dim=1)
    return mean, log_variance.clamp(*LOG_VARIANCE_RANGE)


def kl(moments: Tensor) -> Tensor:
    """KL(N(mean, variance) || N(0, 1)) in nats, summed over c h w: [b 2c h w] -> [b]."""
    mean, log_variance = posterior(moments)
    return 0.5 * (mean.square() + log_variance.exp() - 1.0 - log_variance).sum((1, 2, 3))


class AutoencoderKL(ConvAutoencoder):
    """`moments` [b 2c h w] are mean and (unclamped) log-variance of z; options: `ConvAutoencoder`."""

    moments_per_latent = 2

    def forward(
        self, images: Tensor, noise: Tensor | None = None, weight: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Reconstruction [b 3 H W], and {"kl": nats an image [b]}."""
        moments = self.moments(images)
        return self._decode(self.sample(moments, noise)), {"kl": kl(moments)}

    def sample(self, moments: Tensor, noise: Tensor | None) -> Tensor:
        mean, log_variance = posterior(moments)
        if noise is None:
            return mean
        if noise.shape != mean.shape:
            raise ValueError(f"noise has shape {list(noise.shape)}, the posterior {list(mean.shape)}")
        return mean + torch.exp(0.5 * log_variance) * noise
