"""The contracts between the parts of `ldm`, and nothing else: read this file first.

b batch, c channels, h w latent size, H W image size, l tokens, d width, p pooled width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad


@dataclass(frozen=True)
class Batch:
    """What the data gives and the networks take; a field that a source does not have is None."""

    n: Tensor  # int64 [b], place of each sample in the global run: the key of all its randomness
    weight: Tensor  # float32 [b], 1, or 0 for a sample that could not be read
    key: Sequence[str] = ()  # "shard/key" of each sample, to name it in messages
    reason: Sequence[str] = ()  # why a sample has weight 0; "" for one that could be read, and for padding
    hash: Tensor | None = None  # int64 [b], of "shard/key"; 0 for padding: the sum tells what was consumed
    events: Sequence[tuple[int, str, int]] = ()  # (shard, reason, n) of shards given up while it was made
    image: Tensor | None = None  # uint8 [b 3 H W]; networks normalise to [-1, 1] on the device
    moments: Tensor | None = None  # float [b m h w], what the autoencoder's moments() gave
    caption: Sequence[str] | None = None
    context: Tensor | None = None  # float [b l d], what frozen text towers gave for the caption beforehand
    context_mask: Tensor | None = None  # bool [b l], and this with it
    pooled: Tensor | None = None  # float [b p], and this
    tokens: Tensor | None = None  # int64 [b l]
    original_size: Tensor | None = None  # int64 [b 2], height and width before any resize
    crop: Tensor | None = None  # int64 [b 2], top and left of the crop after the resize
    target_size: Tensor | None = None  # int64 [b 2], height and width of the picture; None: those of `image`
    label: Tensor | None = None  # int64 [b], class; below 0: not known
    mask: Tensor | None = None  # [b 1 H W], 1 where `image` is to be painted anew, else 0
    source: Tensor | None = None  # uint8 [b 3 H W], a picture to go by where the result is not known

    def tensors(self) -> dict[str, Tensor]:
        """Those of its fields that are tensors, by name."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """The same batch with its tensors on `device`."""
        moved: dict[str, Any] = {
            name: tensor.to(device, non_blocking=non_blocking) for name, tensor in self.tensors().items()
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
        """Rows of self, then rows of `other`; a shorter context is filled up with tokens that are masked."""
        first, second = self, other
        if first.context is not None and second.context is not None:
            lengths = first.context.shape[1], second.context.shape[1]
            if lengths[0] != lengths[1] or (first.context_mask is None) != (second.context_mask is None):
                first, second = (_filled_up(c, c.context, max(lengths)) for c in (first, second))
        return first._combine(second, lambda a, b: torch.cat([a, b.to(a.dtype)]))


def _filled_up(conditioning: Conditioning, context: Any, length: int) -> Conditioning:
    mask, more = conditioning.context_mask, length - context.shape[1]
    mask = context.new_ones(context.shape[:2], dtype=torch.bool) if mask is None else mask
    return replace(conditioning, context=pad(context, (0, 0, 0, more)), context_mask=pad(mask, (0, more)))


class GridRow(NamedTuple):
    """One noise level of a sampling grid: what the network is told, and what the solver computes with."""

    model_time: float
    alpha: float
    sigma: float


class Grid(tuple[GridRow, ...]):
    """N + 1 rows from most to least noise; python floats, so no device is asked.

    `row_of(sigma / alpha)` is a row of the same process at any level, for samplers that leave the grid.
    """

    row_of: Callable[[float], GridRow]

    def __new__(cls, rows: Iterable[GridRow], row_of: Callable[[float], GridRow]) -> Grid:
        grid = super().__new__(cls, rows)
        grid.row_of = row_of
        return grid


Denoise = Callable[[Tensor, GridRow], Tensor]  # (x, row) -> estimate of the clean latents
NoiseSource = Callable[[int], Tensor]  # i -> i-th keyed standard normal noise, shaped like x
Weighting = Callable[
    [Any, Tensor], Tensor
]  # (noise_scheduler, t [b]) -> weight of the squared error in F space
TimeDistribution = Callable[
    [Any, Tensor], Tensor
]  # (noise_scheduler, uniform [b] in (0, 1)) -> position [b] that its time_at takes


class Autoencoder(Protocol):
    """Images in [-1, 1] to latents of about unit variance and back; owns the latent shift and scale."""

    latent_channels: int
    factor: int  # images are `factor` times larger than latents along each side

    def moments(self, images: Tensor) -> Tensor: ...  # [b 3 H W] -> [b m h w]; KL: m = 2c, VQ: m = c

    def latents(self, moments: Tensor, noise: Tensor | None = None) -> Tensor: ...  # noise None: the mode

    def encode(self, images: Tensor, noise: Tensor | None = None) -> Tensor: ...

    def decode(self, latents: Tensor) -> Tensor: ...


class Conditioner(Protocol):
    """Batch to conditioning, and the conditioning that says nothing."""

    context_dim: int | None  # widths of what it gives; None, or 0 channels: it gives none
    pooled_dim: int | None
    num_classes: int | None
    concat_channels: int
    tokenizer: Callable[[Sequence[str]], Tensor] | None  # -> int64 [b l]; picklable, needs no weights

    def __call__(self, batch: Batch) -> Conditioning: ...

    def null(self, given: Conditioning) -> Conditioning: ...  # `given`, less what a dropped caption says

    def use_autoencoder(self, autoencoder: Any) -> None: ...  # once, before any batch


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

    def position_of(self, t: Tensor) -> Tensor: ...  # inverse of time_at

    def time_of(self, log_snr: Tensor) -> Tensor: ...  # inverse of log(alpha^2 / sigma^2)

    def input_scale(self, t: Tensor) -> Tensor: ...

    def model_time(self, t: Tensor) -> Tensor: ...

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]: ...

    def clean_from_output(self, x: Tensor, output: Tensor, alpha: Any, sigma: Any) -> Tensor: ...

    def grid(self, num_steps: int, spacing: str) -> Grid: ...


class Denoiser(Protocol):
    """A backbone under a noise scheduler: estimates clean latents, and says how wrong it is."""

    def __call__(self, noisy_latents: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor: ...

    def output_at(self, x: Tensor, row: GridRow, conditioning: Conditioning) -> Tensor: ...  # F

    def at_row(self, x: Tensor, row: GridRow, conditioning: Conditioning) -> Tensor: ...  # clean estimate

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
