"""The contracts between the parts of `ldm`, and nothing else: read this file first.

b batch, c channels, h w latent size, H W image size, l tokens, d width, p pooled width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """What the data gives and the networks take; a field that a source does not have is None."""

    n: Tensor  # int64 [b], place of each sample in the global run: the key of all its randomness
    weight: Tensor  # float32 [b], 1, or 0 for a sample that could not be read
    key: Sequence[str] = ()  # "shard/key" of each sample, to name it in messages
    image: Tensor | None = None  # uint8 [b 3 H W]; networks normalise to [-1, 1] on the device
    moments: Tensor | None = None  # float [b 2c h w], mean and log-variance of the posterior
    caption: Sequence[str] | None = None
    tokens: Tensor | None = None  # int64 [b l]
    original_size: Tensor | None = None  # int64 [b 2], height and width before any resize
    crop: Tensor | None = None  # int64 [b 2], top and left of the crop after the resize

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """The same batch with its tensors on `device`."""
        moved: dict[str, Any] = {
            f.name: value.to(device, non_blocking=non_blocking)
            for f in fields(self)
            if isinstance(value := getattr(self, f.name), Tensor)
        }
        return replace(self, **moved)

    def __len__(self) -> int:
        return len(self.n)


@dataclass(frozen=True)
class Conditioning:
    """What a backbone is told beside the noisy latents: each field a batch-first tensor, or None."""

    context: Tensor | None = None  # [b l d], for cross-attention
    context_mask: Tensor | None = None  # bool [b l], True where a token counts
    pooled: Tensor | None = None  # [b p]
    label: Tensor | None = None  # int64 [b]
    concat: Tensor | None = None  # [b c h w], joined to the latents along channels
    control: Tensor | None = None  # [b 3 H W]

    def _combine(self, other: Conditioning, join: Callable[[Tensor, Tensor], Tensor]) -> Conditioning:
        values: dict[str, Tensor | None] = {}
        for f in fields(self):
            mine, theirs = getattr(self, f.name), getattr(other, f.name)
            if (mine is None) != (theirs is None):
                raise ValueError(f"conditioning.{f.name} is given on one side only")
            values[f.name] = None if mine is None else join(mine, theirs)
        return Conditioning(**values)

    def where(self, keep: Tensor, other: Conditioning) -> Conditioning:
        """Rows of self where `keep` (bool [b]) is True, of `other` elsewhere."""
        return self._combine(
            other, lambda a, b: torch.where(keep.view(-1, *[1] * (a.ndim - 1)), a, b.to(a.dtype))
        )

    def cat(self, other: Conditioning) -> Conditioning:
        """Rows of self, then rows of `other`."""
        return self._combine(other, lambda a, b: torch.cat([a, b.to(a.dtype)]))


class GridRow(NamedTuple):
    """One noise level of a sampling grid: what the network is told, and what the solver computes with."""

    model_time: float
    alpha: float
    sigma: float


Grid = Sequence[GridRow]  # N + 1 rows from most to least noise; python floats, so no device is asked
Denoise = Callable[[Tensor, GridRow], Tensor]  # (x, row) -> estimate of the clean latents
NoiseSource = Callable[[int], Tensor]  # i -> i-th keyed standard normal noise, shaped like x
Weighting = Callable[
    [Any, Tensor], Tensor
]  # (noise_scheduler, t [b]) -> weight of the squared error in F space
TimeDistribution = Callable[[Tensor], Tensor]  # uniform [b] in (0, 1) -> position [b] in (0, 1)


class Autoencoder(Protocol):
    """Images in [-1, 1] to latents of about unit variance and back; owns the latent shift and scale."""

    latent_channels: int
    factor: int  # images are `factor` times larger than latents along each side

    def moments(self, images: Tensor) -> Tensor: ...  # [b 3 H W] -> [b 2c h w]

    def latents(self, moments: Tensor, noise: Tensor | None = None) -> Tensor: ...  # noise None: the mode

    def encode(self, images: Tensor, noise: Tensor | None = None) -> Tensor: ...

    def decode(self, latents: Tensor) -> Tensor: ...


class Conditioner(Protocol):
    """Batch to conditioning, and the conditioning that says nothing."""

    def __call__(self, batch: Batch) -> Conditioning: ...

    def null(self, batch_size: int) -> Conditioning: ...

    def tokenize(self, captions: Sequence[str]) -> Tensor: ...  # int64 [b l], picklable, no weights needed


class Backbone(Protocol):
    """A network F(x, time, conditioning); it is told numbers and knows no diffusion."""

    in_channels: int
    out_channels: int

    def __call__(self, x: Tensor, time: Tensor, conditioning: Conditioning) -> Tensor: ...


class NoiseScheduler(Protocol):
    """x_t = alpha(t) * latents + sigma(t) * noise, and the target F = a(t) * latents + b(t) * noise."""

    def alpha(self, t: Tensor) -> Tensor: ...

    def sigma(self, t: Tensor) -> Tensor: ...

    def time_at(self, u: Tensor) -> Tensor: ...  # position in (0, 1), clean to noisy -> t

    def time_of(self, log_snr: Tensor) -> Tensor: ...  # inverse of log(alpha^2 / sigma^2)

    def input_scale(self, t: Tensor) -> Tensor: ...

    def model_time(self, t: Tensor) -> Tensor: ...

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]: ...

    def grid(self, num_steps: int, spacing: str) -> Grid: ...


class Denoiser(Protocol):
    """A backbone under a noise scheduler: estimates clean latents, and says how wrong it is."""

    def __call__(self, noisy_latents: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor: ...

    def loss(self, latents: Tensor, noise: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor: ...


class Sampler(Protocol):
    """Solve from the first row of the grid to the last."""

    def __call__(
        self,
        denoise: Denoise,
        x: Tensor,
        grid: Grid,
        *,
        noise: NoiseSource,
        callback: Callable[[int, Tensor], None] | None = None,
    ) -> Tensor: ...


class SampleFilter(Protocol):
    """Keep a sample? Decided from its metadata alone, so that it can be cached; picklable."""

    def __call__(self, sample: dict[str, Any]) -> bool: ...
