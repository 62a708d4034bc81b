"""Synthetic data sets in the shape of LAION's, the same on every machine.

Photographs are noise with the spectrum of nature, gradients and discs, as JPEG of quality 90; their sides are
log-uniform between 384 and 1600 px. Sets are made once per folder.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import webdataset as wds
from PIL import Image

SIDES = 384, 1600
TEXT = (
    "a the of with small large red green blue old new house tree river mountain cat dog street light photo "
    "painting vintage wooden kitchen garden city night summer portrait woman man child car boat sky"
)
WORDS = TEXT.split()


def photo(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    """Octaves of noise, each weaker than the one before, under a gradient and six discs."""
    pixels = np.full((height, width, 3), 128, np.float32)
    grid, strength, longer = 4, 60.0, max(width, height)
    while grid <= longer:
        size = max(2, height * grid // longer + 1), max(2, width * grid // longer + 1)
        noise = rng.normal(0, 0.5, (*size, 3)).astype(np.float32)
        noise += noise[..., :1]  # the channels of a photograph go together
        for channel in range(3):
            layer = Image.fromarray(np.ascontiguousarray(noise[..., channel]))
            pixels[..., channel] += strength * np.asarray(
                layer.resize((width, height), Image.Resampling.BICUBIC)
            )
        grid, strength = 2 * grid, 0.68 * strength
    down, right = np.mgrid[0:height, 0:width].astype(np.float32)
    slope = rng.normal(0, 40, 2)
    pixels += (slope[0] * down / height + slope[1] * right / width)[..., None]
    for _ in range(6):
        x, y, radius = (
            rng.uniform(0, width),
            rng.uniform(0, height),
            rng.uniform(0.05, 0.3) * min(width, height),
        )
        pixels[(right - x) ** 2 + (down - y) ** 2 < radius**2] += rng.normal(0, 40, 3)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def jpegs(count: int, seed: int = 0, sides: tuple[int, int] = SIDES) -> Iterator[tuple[bytes, int, int]]:
    """Bytes, width and height of photographs."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        side = np.exp(rng.uniform(*np.log(sides)))
        stretch = np.exp(rng.normal(0, 0.15))
        width, height = int(side * stretch), int(side / stretch)
        file = io.BytesIO()
        photo(rng, width, height).save(file, "JPEG", quality=90)
        yield file.getvalue(), width, height


def caption(rng: np.random.Generator) -> str:
    return " ".join(rng.choice(WORDS, rng.integers(4, 20)))


def facts(number: int, width: int, height: int, text: str) -> bytes:
    """The json that img2dataset writes beside a picture."""
    values: dict[str, Any] = {
        "caption": text,
        "url": f"http://example.org/{number}.jpg",
        "key": f"{number:09d}",
    }
    values |= {"status": "success", "width": width, "height": height}
    values |= {"original_width": width, "original_height": height, "similarity": 0.31, "punsafe": 0.01}
    return json.dumps(values).encode()


def once(folder: Path, write: Callable[[Path], Any]) -> Path:
    """The folder, filled by `write` unless that was done before."""
    if not (folder / "done").exists():
        folder.mkdir(parents=True, exist_ok=True)
        write(folder)
        (folder / "done").touch()
    return folder


def write_shards(folder: Path, samples: Iterable[dict[str, Any]], per_shard: int) -> None:
    """Samples, numbered, into 00000.tar, 00001.tar, ..."""
    tar: Any = None
    for number, sample in enumerate(samples):
        if number % per_shard == 0:
            if tar is not None:
                tar.close()
            tar = wds.TarWriter(str(folder / f"{number // per_shard:05d}.tar"))
        tar.write({"__key__": f"{number:09d}", **sample})
    if tar is not None:
        tar.close()


def urls(folder: Path) -> list[str]:
    return sorted(map(str, folder.glob("*.tar")))


def pictures(
    folder: Path, shards: int, per_shard: int, distinct: int, sides: tuple[int, int] = SIDES, pad: int = 0
) -> Path:
    """Shards of jpg, txt and json; `distinct` photographs take turns, every caption is new.

    `pad` bytes after the end of each picture make files large for tests that decode nothing.
    """

    def samples() -> Iterator[dict[str, Any]]:
        found = list(jpegs(distinct, sides=sides))
        rng = np.random.default_rng(1)
        for number in range(shards * per_shard):
            data, width, height = found[number % distinct]
            text = caption(rng)
            yield {"jpg": data + bytes(pad), "txt": text, "json": facts(number, width, height, text)}

    return once(folder, lambda path: write_shards(path, samples(), per_shard))


def many(folder: Path, samples: int, per_shard: int = 10_000) -> Path:
    """Shards that are links to one shard of tiny pictures: a large index for little room."""

    def write(path: Path) -> None:
        one = pictures(folder.with_name(folder.name + "_one"), 1, per_shard, 16, sides=(17, 24))
        for number in range(-(-samples // per_shard)):
            (path / f"{number:05d}.tar").symlink_to((one / "00000.tar").resolve())

    return once(folder, write)


def latents(folder: Path, shards: int, per_shard: int, dataset: Callable[[int], str] | None) -> Path:
    """Shards of moments.npy [1 8 32 32] in fp16, txt and json; `dataset` (samples) gives dataset.json."""

    def samples() -> Iterator[dict[str, Any]]:
        rng = np.random.default_rng(0)
        for _ in range(shards * per_shard):
            file = io.BytesIO()
            np.save(file, rng.normal(0, 1, (1, 8, 32, 32)).astype(np.float16))
            yield {"moments.npy": file.getvalue(), "txt": caption(rng), "json": b'{"crop": [[0, 0]]}'}

    def write(path: Path) -> None:
        write_shards(path, samples(), per_shard)
        if dataset is not None:
            (path / "dataset.json").write_text(dataset(shards * per_shard))

    return once(folder, write)
