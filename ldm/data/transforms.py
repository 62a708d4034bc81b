"""Picture to square pixels: shorter side resized, square cropped, perhaps mirrored, keyed by n.

b samples, S image size, H W size after the resize.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import interpolate

from ldm.data.image import MAX_PIXELS, BadImage, Picture
from ldm.errors import InputError
from ldm.random import keyed_uniform

Pixels = NDArray[np.uint8]


def resize(picture: Picture, height: int, width: int) -> Pixels:
    """Picture -> [height width 3], bicubic with antialiasing, as PIL's to within 2 levels of 255."""
    covered = picture.height * picture.eighths / 8, picture.width * picture.eighths / 8
    if covered == (height, width):
        return picture.pixels
    pixels = torch.from_numpy(picture.pixels).permute(2, 0, 1)[None]  # its layout is the one with a fast path
    if picture.eighths == 8:
        out = interpolate(pixels, (height, width), mode="bicubic", antialias=True)
    else:  # not the ratio of the sizes: a part of the last row and column does not count
        scale = [want / have * (1 + 1e-9) for want, have in zip((height, width), covered, strict=True)]
        out = interpolate(pixels, scale_factor=scale, mode="bicubic", antialias=True)
    return out[0, :, :height, :width].permute(1, 2, 0).numpy()


@dataclass(frozen=True)
class SquareCrop:
    """Resize so that the shorter side is `size`, crop `size` x `size`, mirror with probability `flip`.

    What happens to the n-th sample of the run depends on (seed, n) alone.
    """

    size: int
    crop: Literal["center", "random"] = "center"
    flip: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.crop not in ("center", "random"):
            raise InputError("data.crop", f"expected center or random, got '{self.crop}'")
        if not 0 <= self.flip <= 1:
            raise InputError("data.flip", f"expected a probability in [0, 1], got {self.flip}")
        if self.size < 1:
            raise InputError("data.image_size", f"expected at least 1 pixel, got {self.size}")

    def resize(self, picture: Picture) -> Pixels:
        """Picture -> [H W 3] with min(H, W) = S. Raises `BadImage`."""
        height, width = picture.height, picture.width
        if min(height, width) != self.size:
            scale = self.size / min(height, width)
            height, width = max(self.size, round(height * scale)), max(self.size, round(width * scale))
            if height * width > MAX_PIXELS:
                raise BadImage("too_large")  # a very long strip
        return resize(picture, height, width)

    def draws(self, n: NDArray[np.int64]) -> tuple[NDArray[Any], NDArray[np.bool_]]:
        """Position of the crop in [0, 1) [b 2], and whether to mirror [b]."""
        places = np.full((len(n), 2), 0.5)
        mirror = np.zeros(len(n), bool)
        key = torch.from_numpy(np.ascontiguousarray(n))
        if self.crop == "random" and len(n):
            places = keyed_uniform(self.seed, key, "crop", (2,)).double().numpy()
        if self.flip and len(n):
            mirror = keyed_uniform(self.seed, key, "flip").numpy() < self.flip
        return places, mirror

    def cut(self, pixels: Pixels, place: NDArray[Any], mirror: bool) -> tuple[Pixels, tuple[int, int]]:
        """[H W 3] -> [3 S S], and top and left of the crop, in the mirrored picture if it was mirrored."""
        top, left = (int(p * (side - self.size + 1)) for p, side in zip(place, pixels.shape, strict=False))
        if mirror:
            pixels = pixels[:, ::-1]
        square = pixels[top : top + self.size, left : left + self.size]
        return square.transpose(2, 0, 1), (top, left)
