"""Pictures joined to the latents: the rest of one to be painted into, a small one to be enlarged, depth.

Rombach et al. 2022, sections 4.4 and 4.5; Stable Diffusion 2. All keep what they show where captions are
dropped. In training everything random is a function of (seed, n, purpose).
b batch, c latent channels, h w latent size, H W picture size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.conditioning.base import ConditionerModule
from ldm.random import keyed_normal, keyed_uniform
from ldm.types import Batch, Conditioning

BOXES, STROKES = 4, 8  # the most that a mask is made of


class Shown(ConditionerModule):
    """What all share: pictures in [-1, 1] in the network's number format, and a null that keeps them."""

    source_scale = 1
    grey: Tensor  # 127.5, also says device and number format

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.seed = seed
        self.register_buffer("grey", torch.tensor(127.5), persistent=False)

    def unit(self, image: Tensor) -> Tensor:
        return image.to(self.grey, memory_format=torch.channels_last) / self.grey - 1

    def null(self, given: Conditioning) -> Conditioning:
        return given


class Inpainting(Shown):
    """concat [b 1+c h w]: the mask, 1 where to paint, and latents of the picture, mid-grey there.

    The mask is `batch.mask`, or else drawn: see `random_masks`, of which a share `full` covers everything.
    Without a picture all of `batch.target_size` is to be painted.
    """

    encode: Callable[[Tensor], Tensor]

    def __init__(self, full: float = 0.25, seed: int = 0) -> None:
        super().__init__(seed)
        if not 0 <= full <= 1:
            raise ValueError(f"full={full} is not a share within 0 and 1")
        self.full = full

    def use_autoencoder(self, autoencoder: Any) -> None:
        self.encode = autoencoder.encode  # a method, so that its weights do not become ours
        self.concat_channels = 1 + autoencoder.latent_channels

    @torch.no_grad()
    def forward(self, batch: Batch) -> Conditioning:
        image, mask = self._shown(batch)
        hidden = (image * (mask < 0.5)).contiguous(memory_format=torch.channels_last)
        latents = self.encode(hidden)
        return Conditioning(concat=torch.cat([F.interpolate(mask, latents.shape[2:]), latents], dim=1))

    def _shown(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Picture [b 3 H W] in [-1, 1] and mask [b 1 H W]."""
        if batch.image is not None:
            size = (batch.image.shape[2], batch.image.shape[3])
            mask = random_masks(self.seed, batch.n, *size, self.full) if batch.mask is None else batch.mask
            return self.unit(batch.image), mask.to(self.grey)
        if batch.moments is not None or batch.target_size is None:
            raise ValueError("inpainting needs batch.image: latents made beforehand cannot be masked")
        height, width = batch.target_size[0].tolist()  # sampling alone comes here
        mask = self.grey.new_ones(len(batch), 1, height, width)
        return torch.zeros_like(mask).expand(-1, 3, -1, -1), mask


class Upscaling(Shown):
    """concat [b 3 h w]: the picture `factor` of the autoencoder times smaller, with noise; label: how much.

    The label is the index of the noise in `noise_scheduler`, for a backbone with `num_classes`: in training a
    random one up to `max_noise_level`, and for a given `batch.source` always `noise_level`. The source is
    made h x w if `batch.target_size` is known.
    """

    needs_source = True

    def __init__(
        self,
        noise_scheduler: Any,
        max_noise_level: int = 350,
        noise_level: int = 20,
        num_classes: int = 1000,
        seed: int = 0,
    ) -> None:
        super().__init__(seed)
        if not 0 <= noise_level <= max_noise_level < num_classes:
            raise ValueError(
                f"{noise_level=}, {max_noise_level=}, {num_classes=}: need 0 <= noise_level <= "
                "max_noise_level < num_classes"
            )
        self.noise_scheduler, self.noise_level = noise_scheduler, noise_level
        self.max_noise_level, self.num_classes, self.concat_channels = max_noise_level, num_classes, 3

    def use_autoencoder(self, autoencoder: Any) -> None:
        self.factor = self.source_scale = autoencoder.factor

    @torch.no_grad()
    def forward(self, batch: Batch) -> Conditioning:
        if batch.source is not None:
            low = self.unit(batch.source)
            if batch.target_size is not None:
                height, width = (batch.target_size[0] // self.factor).tolist()  # sampling alone comes here
                low = resized(low, height, width)
            level = torch.full_like(batch.n, self.noise_level)
        elif batch.image is not None:
            height, width = (side // self.factor for side in batch.image.shape[2:])
            low = resized(self.unit(batch.image), height, width)
            share = keyed_uniform(self.seed, batch.n, "noise-level")
            level = (share * (self.max_noise_level + 1)).long()
        else:
            raise ValueError("upscaling needs a picture to enlarge: batch.source, or batch.image in training")
        noise = keyed_normal(self.seed, batch.n, "low-resolution", low.shape[1:]).to(low)
        alpha, sigma = (
            f(level.to(torch.float32)).to(low).view(-1, 1, 1, 1)
            for f in (self.noise_scheduler.alpha, self.noise_scheduler.sigma)
        )
        return Conditioning(concat=alpha * low + sigma * noise, label=level)


class Depth(Shown):
    """concat [b 1 h w]: a map of depth, its own least value -1 and its greatest 1; a flat one is -1.

    The map is the mean of the channels of `batch.source`, made h x w as Stable Diffusion 2's was: bicubic
    without antialiasing.
    """

    concat_channels = 1
    needs_source = draws_only = True

    def use_autoencoder(self, autoencoder: Any) -> None:
        self.factor = autoencoder.factor

    @torch.no_grad()
    def forward(self, batch: Batch) -> Conditioning:
        if batch.source is None:
            raise ValueError("a conditioner on depth needs a map of it: batch.source, in sampling init_image")
        grey = batch.source.float().mean(1, keepdim=True)
        grey = F.interpolate(grey, self._size(batch), mode="bicubic", align_corners=False)
        low = grey.amin((1, 2, 3), keepdim=True)
        span = grey.amax((1, 2, 3), keepdim=True) - low
        share = torch.where(span > 1e-2, (grey - low) / span, 0)  # of 255: less is rounding
        return Conditioning(concat=(2 * share - 1).to(self.grey))

    def _size(self, batch: Batch) -> list[int]:
        """Height and width of the latents."""
        if batch.moments is not None:
            return list(batch.moments.shape[2:])
        if batch.image is None and batch.target_size is not None:
            return (batch.target_size[0] // self.factor).tolist()  # type: ignore[no-any-return]  # sampling alone
        shown = batch.source if batch.image is None else batch.image
        assert shown is not None
        return [side // self.factor for side in shown.shape[2:]]


def resized(image: Tensor, height: int, width: int) -> Tensor:
    """[b 3 H W] in [-1, 1] to that size: bicubic with antialiasing."""
    if image.shape[2:] == (height, width):
        return image
    return F.interpolate(image, (height, width), mode="bicubic", antialias=True).clamp(-1, 1)


def random_masks(seed: int, n: Tensor, height: int, width: int, full: float = 0.25) -> Tensor:
    """Masks to paint in, float32 [b 1 H W] of 0 and 1; row i depends on (seed, n[i]) alone.

    A share `full` covers everything; of the others one half are 1 to 4 boxes, one half a stroke of a brush.
    """
    everything, kind = keyed_uniform(seed, n, "mask", (2,)).T[..., None, None]
    mask = torch.where(kind < 0.5, _boxes(seed, n, height, width), _stroke(seed, n, height, width))
    return (mask | (everything < full)).float()[:, None]


def _boxes(seed: int, n: Tensor, height: int, width: int) -> Tensor:
    """bool [b H W]: sides of 10 to 60 % of the picture's."""
    there, tall, wide, down, right = keyed_uniform(seed, n, "mask-boxes", (BOXES, 5)).unbind(-1)  # [b boxes]
    inside = []
    for size, place, pixels in ((tall, down, height), (wide, right, width)):
        side = (0.1 + 0.5 * size) * pixels
        start = (place * (pixels - side))[..., None]
        at = torch.arange(pixels, device=n.device) + 0.5
        inside.append((at >= start) & (at < start + side[..., None]))  # [b boxes pixels]
    first = torch.arange(BOXES, device=n.device) == 0
    rows = inside[0] & ((there < 0.5) | first)[..., None]
    return (rows[..., :, None] & inside[1][..., None, :]).any(1)


def _stroke(seed: int, n: Tensor, height: int, width: int) -> Tensor:
    """bool [b H W]: 3 to 8 straight pieces end to end, 6 to 24 % of the shorter side thick."""
    count, thickness, y, x = keyed_uniform(seed, n, "mask-stroke", (4,)).T[..., None, None]  # each [b 1 1]
    steps = keyed_uniform(seed, n, "mask-steps", (STROKES, 2)) - 0.5
    rows = torch.arange(height, device=n.device)[:, None] + 0.5
    columns = torch.arange(width, device=n.device) + 0.5
    y, x, pieces = y * height, x * width, 3 + (count * (STROKES - 2)).floor()
    nearest = torch.full((len(n), height, width), float("inf"), device=n.device)
    for k in range(STROKES):  # one piece at a time: distances of all would take eight times the memory
        dy, dx = steps[:, k].T[..., None, None] * 0.8
        to_y, to_x = (y + dy * height).clamp(0, height), (x + dx * width).clamp(0, width)
        dy, dx = to_y - y, to_x - x
        along = ((rows - y) * dy + (columns - x) * dx) / (dy * dy + dx * dx).clamp(min=1e-6)
        along = along.clamp(0, 1)
        distance = (rows - y - along * dy).square() + (columns - x - along * dx).square()
        nearest = torch.minimum(nearest, distance.masked_fill(pieces <= k, float("inf")))
        y, x = to_y, to_x
    return nearest < ((0.03 + 0.09 * thickness) * min(height, width)).square()
