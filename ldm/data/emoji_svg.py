"""All emoji as vectors: each drawn once, without background, which is put behind it as a sample is made.

The graphics are Twemoji's, as those of `EmojiSet`, drawn by resvg at any size. What is held out of training
stays one background of each object, and is packed flat.
"""

from __future__ import annotations

import io
import unicodedata
from collections.abc import Mapping
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ldm.data.emoji import (
    BACKGROUNDS,
    CATEGORIES,
    FILL,
    RENAMED,
    Colour,
    Draw,
    EmojiSet,
    Pair,
    Sample,
    caption_of,
    find,
    graphics,
    known_emoji,
    put_on,
)
from ldm.data.image import refusing
from ldm.data.makers import Part
from ldm.data.plan import Ints
from ldm.data.reader import Raw
from ldm.errors import InputError
from ldm.random import keyed_uniform

ALL = (*CATEGORIES, "Smileys & Emotion", "People & Body", "Activities", "Symbols", "Flags")
ALIKE = ("family man", "family woman", "bouvet island")  # silhouettes, the flag of Norway: left out


class SvgEmojiSet(EmojiSet):
    """An `EmojiSet` of all emoji without a tone of skin, whose training samples are objects alone."""

    kind = "emoji-svg"

    def __init__(
        self,
        image_size: int = 128,
        num_objects: int | None = None,
        num_backgrounds: int = 8,
        seed: int = 0,
    ) -> None:
        try:
            self.renderer = metadata.version("resvg_py")
        except metadata.PackageNotFoundError:
            what = "drawing emoji from vectors needs the package resvg_py"
            raise InputError("data", what, 'pip install -e ".[emoji]"') from None
        super().__init__(image_size, num_objects, num_backgrounds, seed)

    def catalogue(self) -> list[tuple[str, Path]]:
        """Name and SVG of every emoji; of those that look the same, the one with the shortest name."""
        folder, found = graphics("svg"), dict[bytes, tuple[str, Path]]()
        for name, code, category in known_emoji(ALL):
            path = find(folder, code)
            if path is None or name.startswith(ALIKE):
                continue
            name = _plain(RENAMED.get(name, name))
            if category == "Flags" and "flag" not in name:
                name = f"flag of {name}"
            if name.endswith(("-thirty", "o'clock")):
                name = f"clock at {name}"
            look = path.read_bytes()
            if look not in found or len(name) < len(found[look][0]):
                found[look] = name, path
        return list(found.values())

    @cached_property
    def sprites(self) -> list[Image.Image]:
        """The objects in the middle of an empty picture, RGBA."""
        return [_drawn(path, self.image_size) for path in self.files]

    def settings(self) -> dict[str, Any]:
        return super().settings() | {"resvg_py": self.renderer}

    def training(self) -> tuple[list[Pair], Draw]:
        """Each object once, with the background that it must not get."""
        return self.held_out, self.alone

    def alone(self, i: int, j: int) -> Sample:
        """Object i on nothing."""
        return Sample(self.sprites[i], self.objects[i], {"held_out": self.backgrounds[j]})


def _plain(name: str) -> str:
    """The name in ASCII: without accents, with straight quotes."""
    name = name.replace("\N{RIGHT SINGLE QUOTATION MARK}", "'")
    return unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode()


def _drawn(path: Path, size: int) -> Image.Image:
    import resvg_py

    side = round(size * FILL)
    png = resvg_py.svg_to_bytes(svg_path=str(path), width=side, height=side, skip_system_fonts=True)
    sprite = Image.open(io.BytesIO(png)).convert("RGBA")  # one of them, the watermelon, is not square
    picture = Image.new("RGBA", (size, size))
    picture.paste(sprite, ((size - sprite.width) // 2, (size - sprite.height) // 2))
    return picture


class OnBackgrounds:
    """Objects on plain colours: the n-th sample's is drawn by (seed, n), among all but the held-out one.

    A `Maker` of uint8 pictures [p 3 S S]. The name in the caption becomes "NAME on a COLOUR background".
    """

    kinds: tuple[str, ...] = ("image", "caption")

    def __init__(self, emoji: EmojiSet, seed: int) -> None:
        self.size, self.seed = emoji.image_size, seed
        self.colours: list[tuple[str, Colour]] = [(name, BACKGROUNDS[name]) for name in emoji.backgrounds]
        self.held_out: Mapping[str, int] = {emoji.objects[i]: j for i, j in emoji.held_out}

    def fields(self, n: Ints) -> Part:
        self.draws = keyed_uniform(
            self.seed, torch.from_numpy(np.ascontiguousarray(n)), "background"
        ).tolist()
        image: Tensor = torch.zeros(len(n), 3, self.size, self.size, dtype=torch.uint8)
        return {"image": image, "crop": np.zeros((len(n), 2), np.int64)}

    def prepare(self, raw: Raw) -> tuple[tuple[Image.Image, int], int]:
        """The object, and its held-out background."""
        with refusing("corrupt_image"):
            sprite = Image.open(io.BytesIO(raw.parts["image"])).convert("RGBA")
        return (sprite, self.held_out[raw.parts["caption"].decode()]), 4 * sprite.width * sprite.height

    def finish(self, part: Part, i: int, prepared: tuple[Image.Image, int]) -> None:
        sprite, held_out = prepared
        others = len(self.colours) - 1
        name, colour = self.colours[(held_out + 1 + int(self.draws[i] * others)) % (others + 1)]
        part["image"][i].numpy()[...] = put_on(sprite, self.size, colour).transpose(2, 0, 1)
        part["caption"][i] = caption_of(part["caption"][i], name)
