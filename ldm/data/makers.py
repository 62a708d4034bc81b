"""Bytes of a sample -> the fields of a batch: what is the same each time it comes, then what depends on n.

`Pictures` decodes, resizes, crops and mirrors. Another kind of sample (latents made beforehand) is another
`Maker` with the same three functions.

p samples of a part, S image size.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ldm.data.image import decode
from ldm.data.plan import Ints
from ldm.data.reader import Raw
from ldm.data.transforms import Pixels, SquareCrop

Part = dict[str, Any]  # the fields of a Batch: large ones are tensors (shared memory), the rest small


class Maker(Protocol):
    """Makes the fields of a part; picklable, one copy in each worker."""

    kinds: tuple[str, ...]  # members of a sample that `prepare` reads

    def fields(self, n: Ints) -> Part:
        """What the samples n get if none of them can be read: their fields, all zero."""

    def prepare(self, raw: Raw) -> tuple[Any, int]:
        """What does not depend on n, and its size in bytes. Raises `BadImage`, whose text is the reason."""

    def finish(self, part: Part, i: int, prepared: Any) -> None:
        """Put a sample into place i of a part that `fields` made; its caption is there, and may change."""


class Pictures:
    """uint8 pictures: decode and resize once, crop and mirror by n."""

    kinds: tuple[str, ...] = ("image",)

    def __init__(self, transform: SquareCrop) -> None:
        self.transform = transform

    def fields(self, n: Ints) -> Part:
        size = self.transform.size
        self.places, self.mirror = self.transform.draws(n)
        image: Tensor = torch.zeros(len(n), 3, size, size, dtype=torch.uint8)
        return {"image": image, "crop": np.zeros((len(n), 2), np.int64)}

    def prepare(self, raw: Raw) -> tuple[Pixels, int]:
        pixels = self.transform.resize(decode(raw.parts["image"], self.transform.size))
        return pixels, pixels.nbytes

    def finish(self, part: Part, i: int, prepared: Pixels) -> None:
        square, part["crop"][i] = self.transform.cut(prepared, self.places[i], bool(self.mirror[i]))
        part["image"][i].numpy()[...] = square  # the one copy: crop, mirror and planes in one go
