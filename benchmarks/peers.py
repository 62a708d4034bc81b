"""What other loaders do with the same shards, as their pages recommend it, with equal work.

Each function gives batches as (keys, pictures or arrays, tokens). b samples, S image size, l tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset as wds
from torch import Tensor

Fields = tuple[Sequence[str], Tensor, Tensor]
Tokenize = Callable[[list[str]], Tensor]


def raw(shards: Sequence[str]) -> Iterator[dict[str, Any]]:
    """webdataset's samples, nothing decoded."""
    yield from wds.WebDataset(list(shards), shardshuffle=False)


class Transform:
    """torchvision's resize and centre crop, bicubic as ours, to uint8 [3 S S]; takes PIL or tensor."""

    def __init__(self, size: int) -> None:
        from torchvision.transforms import v2

        bicubic = v2.InterpolationMode.BICUBIC
        resize = v2.Resize(size, interpolation=bicubic, antialias=True)
        self.steps = v2.Compose([v2.ToImage(), resize, v2.CenterCrop(size)])
        self.pil = v2.Compose([resize, v2.CenterCrop(size), v2.PILToTensor()])

    def __call__(self, image: Any) -> Tensor:
        out: Tensor = self.steps(image) if isinstance(image, Tensor) else self.pil(image)
        return out.as_subclass(Tensor)


def torchvision_jpeg(key: str, data: bytes) -> Tensor | None:
    """A webdataset decoder: torchvision's libjpeg-turbo."""
    from torchvision.io import ImageReadMode, decode_jpeg

    if not key.endswith("jpg"):
        return None
    return decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), mode=ImageReadMode.RGB)


class Tokens:
    """The last step of a peer: captions of a batch -> tokens."""

    def __init__(self, tokenize: Tokenize) -> None:
        self.tokenize = tokenize

    def __call__(self, batch: Sequence[Any]) -> Fields:
        keys, images, captions = batch
        return list(keys), images, self.tokenize(list(captions))


def web(
    shards: Sequence[str], size: int, batch: int, workers: int, tokenize: Tokenize, decoder: Any
) -> Iterator[Fields]:
    """webdataset and its WebLoader; `decoder` "pil" or `torchvision_jpeg`. Batches are made in the worker."""
    data = (
        wds.WebDataset(list(shards), shardshuffle=False, nodesplitter=wds.split_by_node)
        .repeat()
        .shuffle(200)
        .decode(decoder, only=["jpg", "txt"])
        .to_tuple("__key__", "jpg", "txt")
        .map_tuple(None, Transform(size), None)
        .batched(batch)
        .map(Tokens(tokenize))
    )
    yield from wds.WebLoader(
        data, batch_size=None, num_workers=workers, prefetch_factor=2 if workers else None
    )


def as_array(sample: tuple[str, Any, str]) -> tuple[str, Tensor, str]:
    key, array, text = sample
    return key, torch.from_numpy(np.asarray(array)[0]), text


def web_latents(shards: Sequence[str], batch: int, workers: int, tokenize: Tokenize) -> Iterator[Fields]:
    """webdataset over cached moments, by its own .npy decoder."""
    data = (
        wds.WebDataset(list(shards), shardshuffle=False, nodesplitter=wds.split_by_node)
        .repeat()
        .shuffle(200)
        .decode(only=["moments.npy", "txt"])
        .to_tuple("__key__", "moments.npy", "txt")
        .map(as_array)
        .batched(batch)
        .map(Tokens(tokenize))
    )
    yield from wds.WebLoader(
        data, batch_size=None, num_workers=workers, prefetch_factor=2 if workers else None
    )


def pack_for_litdata(shards: Sequence[str], folder: Path) -> Path:
    """The JPEG bytes, captions and keys in litdata's format, made once."""
    from litdata.streaming.writer import BinaryWriter

    if not (folder / "index.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        writer = BinaryWriter(str(folder), chunk_bytes="64MB")
        for number, sample in enumerate(raw(shards)):
            writer.add_item(
                number, {"key": sample["__key__"], "jpg": sample["jpg"], "txt": sample["txt"].decode()}
            )
        writer.done()
        writer.merge()
    return folder


def lit(folder: Path, size: int, batch: int, workers: int, tokenize: Tokenize) -> Iterator[Fields]:
    """litdata's StreamingDataset and loader; JPEGs by torchvision, as its own serializer does."""
    from litdata import StreamingDataLoader, StreamingDataset

    transform, tokens = Transform(size), Tokens(tokenize)

    class Pictures(StreamingDataset):
        def __getitem__(self, index: Any) -> tuple[str, Tensor, str]:
            item = super().__getitem__(index)
            return item["key"], transform(torchvision_jpeg("jpg", item["jpg"])), item["txt"]

    def collate(items: list[tuple[str, Tensor, str]]) -> Fields:
        keys, images, captions = zip(*items, strict=True)
        return tokens((keys, torch.stack(images), captions))

    data = Pictures(str(folder), shuffle=True)
    while True:
        yield from StreamingDataLoader(
            data,
            batch_size=batch,
            num_workers=workers,
            collate_fn=collate,
            prefetch_factor=2 if workers else None,
        )
