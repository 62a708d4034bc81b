"""Scores of pictures by functions of the user's, in a table beside each tar (see `score_table`).

Columns that a table has are kept, and not made again, so that the same command goes on where it was stopped.
The tar is never changed.

b samples of a batch, S image size.
"""

from __future__ import annotations

import inspect
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
import torch

from ldm.data.image import BadImage
from ldm.data.makers import Pictures
from ldm.data.reader import Raw
from ldm.data.scan import COLUMN, IMAGES
from ldm.data.score_table import Scores, Table, add, load, table_path
from ldm.data.storage import ReadAhead, expand, open_shard, public
from ldm.data.tar import Damage, walk
from ldm.data.transforms import SquareCrop
from ldm.errors import InputError

MOST = 64 << 20  # bytes of a member
AHEAD = 2  # batches decoded while one is scored


@dataclass(frozen=True)
class Scorer:
    """A column and what makes it: uint8 pictures [b 3 S S] (and captions) -> b numbers.

    `origin` names the function, so that a table says who made a column.
    """

    column: str
    function: Callable[..., Any]
    origin: str

    def __post_init__(self) -> None:
        if not COLUMN.fullmatch(self.column) or self.column == "key":
            what = f"'{self.column}' is no name for a column"
            raise InputError("--column", what, "use letters, digits, _ . : -")
        if not callable(self.function):
            raise InputError(f"--scorer {self.origin}", "is not a function", "write MODULE:FUNCTION")

    @property
    def takes_captions(self) -> bool:
        called = self.function.forward if isinstance(self.function, torch.nn.Module) else self.function
        places = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        needed = [p for p in inspect.signature(called).parameters.values() if p.default is p.empty]
        return sum(p.kind in places for p in needed) > 1

    @torch.no_grad()
    def __call__(self, images: torch.Tensor, captions: list[str]) -> Scores:
        found = self.function(images, captions) if self.takes_captions else self.function(images)
        values = torch.as_tensor(found).detach().float().cpu()
        if values.shape != (len(images),):
            what = f"returned shape {list(values.shape)} for a batch of {len(images)}"
            raise InputError(f"--scorer {self.origin}", what, "return one number a picture")
        return values.numpy()


def score(
    shards: str | Sequence[str],
    scorers: Sequence[Scorer],
    image_size: int = 224,
    batch_size: int = 64,
    num_threads: int = 4,
    overwrite: bool = False,
    task: tuple[int, int] = (0, 1),
    where: str = "shards",
) -> Iterator[tuple[str, int]]:
    """Give every shard's table the scorers' columns; yields (shard, samples scored, 0: it had them all).

    Pictures come resized and cut to the middle square of `image_size`. `task` (i, n): only every n-th shard,
    from the i-th. Raises `InputError` before any work if the tables cannot be written, or if a column was
    made by another function and `overwrite` is not given.
    """
    names = [scorer.column for scorer in scorers]
    if not scorers or len(set(names)) < len(names):
        raise InputError("--column", "each column is named once", "give a --column for each --scorer")
    paths = expand(shards, where)[task[0] :: task[1]]
    for path in paths:
        table_path(path)
    maker = Pictures(SquareCrop(image_size))
    with ThreadPoolExecutor(num_threads) as pool:
        for path in paths:
            table = load(path)
            missing = [s for s in scorers if overwrite or not _made(path, table, s)]
            if not missing:
                yield path, 0
                continue
            try:
                keys, new = _score_shard(path, missing, maker, batch_size, pool)
            except OSError as error:
                what = f"{public(path)}: {error.strerror or error}"
                raise InputError(where, what, "run it again to go on from there") from None
            add(path, keys, new, {scorer.column: scorer.origin for scorer in missing})
            yield path, len(keys)


def _made(path: str, table: Table, scorer: Scorer) -> bool:
    """Whether the table has the column; raises `InputError` if another function made it."""
    origin = table.origins.get(scorer.column, scorer.origin)
    if origin != scorer.origin:
        what = f"column {scorer.column} was made by {origin}"
        raise InputError(public(table_path(path)), what, "name another --column, or pass --overwrite")
    return scorer.column in table.columns


def samples(file: BinaryIO, total: int) -> Iterator[tuple[str, bytes, str]]:
    """(key, picture, caption) of each sample of a tar that has a picture; of equal keys the first."""
    seen: set[str] = set()
    key, parts = "", dict[str, bytes]()
    for item in walk(file, total):
        if isinstance(item, Damage):
            continue
        folder, slash, base = item.name.rpartition("/")
        stem, _, extension = base.partition(".")
        kind = "image" if extension.lower() in IMAGES else "caption" if extension == "txt" else ""
        if folder + slash + stem != key:
            if "image" in parts and key not in seen:
                yield key, parts["image"], parts.get("caption", b"").decode("utf-8", "replace").strip()
                seen.add(key)
            key, parts = folder + slash + stem, {}
        if kind and item.size <= MOST and kind not in parts:
            file.seek(item.offset)
            parts[kind] = file.read(item.size)
    if "image" in parts and key not in seen:
        yield key, parts["image"], parts.get("caption", b"").decode("utf-8", "replace").strip()


def _score_shard(
    path: str, scorers: Sequence[Scorer], maker: Pictures, batch_size: int, pool: ThreadPoolExecutor
) -> tuple[list[str], dict[str, Scores]]:
    """Keys of a shard's samples, and each column."""
    keys: list[str] = []
    pieces: dict[str, list[Scores]] = {scorer.column: [] for scorer in scorers}
    with closing(open_shard(path)) as shard, ReadAhead(shard) as file:
        for batch in _decoded(samples(file, shard.size), maker, batch_size, pool):
            keys += [key for key, _, _ in batch]
            good = [i for i, (_, prepared, _) in enumerate(batch) if prepared is not None]
            images = _images([batch[i][1] for i in good], maker)
            captions = [batch[i][2] for i in good]
            for scorer in scorers:
                values = np.full(len(batch), np.nan, np.float32)
                if good:
                    values[good] = scorer(images, captions)
                pieces[scorer.column].append(values)
    empty = np.zeros(0, np.float32)
    return keys, {name: np.concatenate([empty, *found]) for name, found in pieces.items()}


def _decoded(
    found: Iterator[tuple[str, bytes, str]], maker: Pictures, batch_size: int, pool: ThreadPoolExecutor
) -> Iterator[list[tuple[str, Any, str]]]:
    """Batches of (key, resized picture or None, caption), the next ones being decoded meanwhile."""
    waiting: deque[list[tuple[str, Future[Any], str]]] = deque()
    batch: list[tuple[str, Future[Any], str]] = []
    for key, data, caption in found:
        batch.append((key, pool.submit(_prepared, data, maker), caption))
        if len(batch) == batch_size:
            waiting.append(batch)
            batch = []
        if len(waiting) > AHEAD:
            yield [(key, future.result(), caption) for key, future, caption in waiting.popleft()]
    for rest in (*waiting, batch):
        if rest:
            yield [(key, future.result(), caption) for key, future, caption in rest]


def _prepared(data: bytes, maker: Pictures) -> Any:
    try:
        return maker.prepare(Raw({"image": data}))[0]
    except BadImage:
        return None


def _images(prepared: Sequence[Any], maker: Pictures) -> torch.Tensor:
    part = maker.fields(np.zeros(len(prepared), np.int64))
    for i, picture in enumerate(prepared):
        maker.finish(part, i, picture)
    return part["image"]
