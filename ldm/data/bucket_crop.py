"""Pictures of a bucket: made to cover its shape, cropped, perhaps mirrored, keyed by n.

p samples of a part, H W the shape of the step's bucket.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ldm.data.buckets import Regroup
from ldm.data.image import MAX_PIXELS, BadImage, decode, header_size
from ldm.data.makers import Part
from ldm.data.plan import Ints
from ldm.data.reader import Raw
from ldm.data.shapes import Numbers
from ldm.data.transforms import Pixels, SquareCrop, resize


@dataclass(frozen=True)
class Assigned:
    """The bucket of samples in any order, each with `batch` numbers n; those of one call are alike."""

    numbers: Numbers
    final: NDArray[np.uint8]
    batch: int

    def bucket(self, sample: int) -> int:
        return int(self.final[self.numbers.array[sample]])


@dataclass
class BucketPictures:
    """uint8 pictures [p 3 H W]: those of one step are of one bucket; `square` says how to crop and mirror."""

    plan: Regroup | Assigned
    shapes: NDArray[np.int64]  # [k 2]
    square: SquareCrop
    kinds: tuple[str, ...] = ("image",)

    def fields(self, n: Ints) -> Part:
        self.height, self.width = (1, 1) if not len(n) else self.shape(int(n[0]))
        self.places, self.mirror = self.square.draws(n)
        image: Tensor = torch.zeros(len(n), 3, self.height, self.width, dtype=torch.uint8)
        size = np.tile(np.array([self.height, self.width], np.int64), (len(n), 1))
        return {"image": image, "crop": np.zeros((len(n), 2), np.int64), "target_size": size}

    def shape(self, n: int) -> tuple[int, int]:
        """Height and width of all pictures in the step of n."""
        height, width = self.shapes[self.plan.bucket(n // self.plan.batch)].tolist()
        return height, width

    def prepare(self, raw: Raw) -> tuple[Pixels, int]:
        data = raw.parts["image"]
        width, height = header_size(data)
        scale = max(self.height / height, self.width / width)
        height, width = max(self.height, round(height * scale)), max(self.width, round(width * scale))
        if height * width > MAX_PIXELS:
            raise BadImage("too_large")  # a very long strip
        pixels = resize(decode(data, min(height, width)), height, width)
        return pixels, pixels.nbytes

    def finish(self, part: Part, i: int, prepared: Pixels) -> None:
        sides = zip(prepared.shape, (self.height, self.width), self.places[i], strict=False)
        top, left = (int(place * (side - own + 1)) for side, own, place in sides)
        pixels: Any = prepared[:, ::-1] if self.mirror[i] else prepared
        kept = pixels[top : top + self.height, left : left + self.width]
        part["image"][i].numpy()[...] = kept.transpose(2, 0, 1)
        part["crop"][i] = top, left
