"""Data modules that make their shards themselves, on first use: the quickstart's emoji, a user's folder.

Packing a large folder takes hours: run `ldm data pack` once instead, and train on its shards.
"""

from __future__ import annotations

import hashlib
import io
import logging
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ldm.data.buckets import Regroup
from ldm.data.datamodule import ShardDataModule
from ldm.data.emoji import EmojiSet
from ldm.data.emoji_svg import OnBackgrounds, SvgEmojiSet
from ldm.data.makers import Maker
from ldm.data.mixture import Mixture
from ldm.data.pack import ShardWriter, listing, made_once, pack
from ldm.data.plan import Stream
from ldm.data.turns import Turns
from ldm.errors import InputError

FORMAT = 1  # of the folder of synthetic pictures
WORDS = ("a", "large", "small", "red", "blue", "house", "tree", "river", "under", "clouds", "at", "night")

log = logging.getLogger(__name__)


class EmojiDataModule(ShardDataModule):
    """`EmojiSet` as train and validation (held-out) shards; `options` are those of `ShardDataModule`."""

    kind: type[EmojiSet] = EmojiSet

    def __init__(
        self,
        cache_dir: str,
        image_size: int = 64,
        num_objects: int | None = 135,
        num_backgrounds: int = 8,
        held_out_seed: int = 0,
        **options: Any,
    ) -> None:
        self.emoji_set = self.kind(image_size, num_objects, num_backgrounds, held_out_seed)
        self.cache_dir = cache_dir
        super().__init__(shards=[], image_size=image_size, validation_shards=[], **options)

    def known_size(self) -> int:
        """Known from the settings, packed or not."""
        samples = len(self.emoji_set.training()[0])
        return min(samples, self.sets.limit or samples)

    def setup(self, stage: str | None = None) -> None:
        """Pack if need be, then index; the first process to finish packing wins."""
        if not self.sets.shards:
            train, held_out = self.emoji_set.prepare(self.cache_dir)
            self.sets.shards, self.sets.validation_shards = (
                [str(p) for p in train],
                [str(p) for p in held_out],
            )
        super().setup(stage)


class SvgEmojiDataModule(EmojiDataModule):
    """`SvgEmojiSet`: an object comes on another background each time, but never on the held-out one."""

    kind = SvgEmojiSet

    def maker(self, plan: Stream | Mixture | Regroup | Turns | None) -> Maker:
        return super().maker(None) if plan is None else OnBackgrounds(self.emoji_set, self.seed)


class SyntheticDataModule(ShardDataModule):
    """Smooth random pictures as JPEG, with captions, as training shards: the same for the same arguments."""

    def __init__(
        self, cache_dir: str, num_samples: int = 1024, image_size: int = 256, seed: int = 0, **options: Any
    ) -> None:
        if num_samples < 1:
            raise InputError(f"data.num_samples={num_samples}", "expected 1 or more")
        self.folder = Path(cache_dir) / f"synthetic-v{FORMAT}-{image_size}-{num_samples}-{seed}"
        self.num_samples, self.image_size, self.drawn_from = num_samples, image_size, seed
        super().__init__(shards=[], image_size=image_size, seed=seed, **options)

    def known_size(self) -> int:
        """Known from the settings, packed or not."""
        return min(self.num_samples, self.sets.limit or self.num_samples)

    def setup(self, stage: str | None = None) -> None:
        """Draw and pack if need be, then index; the first process to finish wins."""
        if not self.sets.shards:
            out = made_once(self.folder, self._draw)
            self.sets.shards = [str(path) for path in sorted(out.glob("*.tar"))]
        super().setup(stage)

    def _draw(self, out: Path) -> None:
        log.info("drawing %d pictures into %s", self.num_samples, self.folder)
        generator = np.random.default_rng(self.drawn_from)
        with ShardWriter(out, samples_per_shard=256) as writer:
            for _ in range(self.num_samples):
                sides = np.exp(generator.uniform(0, np.log(2.5), 2)) * self.image_size
                coarse = generator.integers(0, 256, (9, 9, 3), dtype=np.uint8)
                size = int(sides[0]), int(sides[1])
                picture, data = Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC), io.BytesIO()
                picture.save(data, "JPEG", quality=90)
                words = generator.choice(WORDS, generator.integers(8, 13))
                facts = {"width": picture.width, "height": picture.height}
                writer.write(data.getvalue(), "jpg", " ".join(words), facts)


class FolderDataModule(ShardDataModule):
    """A folder that `pack` takes, as training shards; `options` are those of `ShardDataModule`.

    The shards go into a folder of `cache_dir` (None: FOLDER.shards beside FOLDER) named after a digest of the
    folder's listing, so that a changed folder is packed anew.
    """

    def __init__(
        self, folder: str, cache_dir: str | None = None, samples_per_shard: int = 10_000, **options: Any
    ) -> None:
        self.folder = Path(folder).expanduser().absolute()
        self.cache_dir = Path(cache_dir or self.folder.with_name(f"{self.folder.name}.shards"))
        self.samples_per_shard = samples_per_shard
        super().__init__(shards=[], **options)

    def setup(self, stage: str | None = None) -> None:
        """Pack if need be, then index; the first process to finish packing wins."""
        if not self.sets.shards:
            if not self.folder.is_dir():
                raise InputError(f"data.folder={self.folder}", "no such folder", "give a folder of pictures")
            state = f"{self.samples_per_shard}\n{listing(self.folder)}"
            digest = hashlib.sha256(state.encode()).hexdigest()[:12]
            out = made_once(self.cache_dir / f"{self.folder.name}-{digest}", self._pack)
            self.sets.shards = [str(path) for path in sorted(out.glob("*.tar"))]
        super().setup(stage)

    def _pack(self, out: Path) -> None:
        for line in pack(self.folder, out, self.samples_per_shard).summary():
            log.info("%s: %s", self.folder, line)
