"""Places in the run -> batches, through workers that each make their part of every batch.

The stages (which places, load, collate) form a webdataset `DataPipeline` that runs in each worker. A worker
makes the same slots of every batch, not whole batches: so neither the number of ranks nor of workers changes
what is in a batch, or in which order. Rank and world size are passed in, never asked of the environment.

G global batch, W ranks, k micro-batches a step, p samples of a part, S image size, l tokens.
"""

from __future__ import annotations

import logging
import signal
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count, islice
from typing import Any

import numpy as np
import torch
import webdataset as wds
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, get_worker_info

from ldm.data.image import BadImage, decode
from ldm.data.index import Index
from ldm.data.plan import Ints, Stream
from ldm.data.reader import BlockReader, Raw, ShardReader
from ldm.data.transforms import Pixels, SquareCrop
from ldm.types import Batch

Tokenize = Callable[[list[str]], Tensor]
Part = dict[str, Any]  # the fields of a Batch: the image a tensor (shared memory), the rest small
REPORTED = 10  # failures a worker names in the log
CAPTIONS = 16_384  # tokenised captions kept by a worker
log = logging.getLogger(__name__)


def cut(span: range, i: int, parts: int) -> range:
    """The i-th of `parts` near-equal contiguous pieces of a range."""
    size = len(span)
    return range(span.start + size * i // parts, span.start + size * (i + 1) // parts)


@dataclass(frozen=True)
class Share:
    """Which slots of every global batch belong to whom."""

    global_batch_size: int
    rank: int = 0
    world_size: int = 1
    accumulate: int = 1
    workers: int = 0

    def slots(self, micro: int, worker: int) -> range:
        local = cut(range(self.global_batch_size), self.rank, self.world_size)
        return cut(cut(local, micro, self.accumulate), worker, max(1, self.workers))

    def all_slots(self, worker: int) -> list[int]:
        return [slot for micro in range(self.accumulate) for slot in self.slots(micro, worker)]


def worker_id() -> int:
    info = get_worker_info()
    return 0 if info is None else int(info.id)


@dataclass(frozen=True)
class Places:
    """First stage: the worker's places n of each micro-batch, from `start`; endless without `steps`."""

    share: Share
    start: int = 0
    steps: int | None = None

    def __call__(self) -> Iterator[Ints]:
        worker = worker_id()
        for step in count() if self.steps is None else range(self.steps):
            for micro in range(self.share.accumulate):
                slots = self.share.slots(micro, worker)
                yield self.start + step * self.share.global_batch_size + np.arange(slots.start, slots.stop)


class Recent:
    """Least recently used values within a budget."""

    def __init__(self, budget: int) -> None:
        self.budget, self.used = budget, 0
        self.values: OrderedDict[Any, tuple[Any, int]] = OrderedDict()

    def get(self, key: Any) -> Any:
        if key not in self.values:
            return None
        self.values.move_to_end(key)
        return self.values[key][0]

    def put(self, key: Any, value: Any, size: int = 1) -> None:
        self.used += size - self.values.pop(key, (None, 0))[1]
        self.values[key] = (value, size)
        while self.used > self.budget:
            self.used -= self.values.popitem(last=False)[1][1]


@dataclass(frozen=True)
class Load:
    """Second stage: places -> pixels and captions; what cannot be read has weight 0 and a black image.

    Without a `stream` the selection is walked in its order, and places beyond its end are padding.
    """

    index: Index
    rows: Ints  # of the selection
    transform: SquareCrop
    places: Places
    stream: Stream | None = None
    memory_cache_mb: int = 0

    def __call__(self, source: Iterable[Ints]) -> Iterator[Part]:
        reader, memory = ShardReader(self.index), Recent(self.memory_cache_mb << 20)
        blocks, failures = self._blocks(reader), 0
        for n in source:
            rows = self._rows(n)
            hits = [memory.get(row) if row >= 0 else None for row in rows.tolist()]
            new = [i for i in range(len(n)) if rows[i] >= 0 and (blocks or hits[i] is None)]
            raws = dict(zip(new, blocks(n[new]) if blocks else reader(rows[new]), strict=True))
            part = self._empty(n, rows)
            places, mirror = self.transform.draws(n)
            for i, row in enumerate(rows.tolist()):
                if row < 0:
                    continue
                try:
                    pixels, caption = hits[i] or self._decode(raws[i])
                except BadImage as error:
                    failures += 1
                    if failures <= REPORTED:
                        log.warning("masked %s: %s", part["key"][i], error)
                    continue
                if self.memory_cache_mb:
                    memory.put(row, (pixels, caption), pixels.nbytes)
                square, part["crop"][i] = self.transform.cut(pixels, places[i], bool(mirror[i]))
                part["image"][i] = torch.from_numpy(np.ascontiguousarray(square))
                part["caption"][i], part["weight"][i] = caption, 1.0
            yield part

    def _blocks(self, reader: ShardReader) -> BlockReader | None:
        share, stream = self.places.share, self.stream
        if stream is None or stream.block == 1 or stream.lanes % share.global_batch_size:
            return None
        slots = share.all_slots(worker_id())
        return BlockReader(reader, self.rows, stream, self.places.start, share.global_batch_size, slots)

    def _rows(self, n: Ints) -> Ints:
        """Row of the index of each place, -1 for padding."""
        if self.stream is not None:
            return self.rows[self.stream.places(n)[1]]
        return np.where(n < len(self.rows), self.rows[np.minimum(n, len(self.rows) - 1)], -1)

    def _decode(self, raw: Raw) -> tuple[Pixels, str]:
        if raw.reason:
            raise BadImage(raw.reason)
        pixels = self.transform.resize(decode(raw.image, self.transform.size))
        return pixels, raw.caption.decode("utf-8", "replace").strip()

    def _empty(self, n: Ints, rows: Ints) -> Part:
        real = np.maximum(rows, 0)
        facts, size = self.index.samples[real], self.transform.size
        original = np.stack([facts["original_height"], facts["original_width"]], 1)
        columns = self.index.columns
        label = np.nan_to_num(columns["label"][real], nan=-1) if "label" in columns else None
        return {
            **({} if label is None else {"label": label.astype(np.int64)}),
            "n": n,
            "weight": np.zeros(len(n), np.float32),
            "key": [key if row >= 0 else "" for key, row in zip(self.index.keys(real), rows, strict=True)],
            "image": torch.zeros(len(n), 3, size, size, dtype=torch.uint8),
            "caption": [""] * len(n),
            "original_size": original.astype(np.int64),
            "crop": np.zeros((len(n), 2), np.int64),
        }


@dataclass(frozen=True)
class Tokens:
    """Third stage: captions -> tokens [p l]; those of recent captions are remembered."""

    tokenize: Tokenize

    def __call__(self, source: Iterable[Part]) -> Iterator[Part]:
        recent = Recent(CAPTIONS)
        for part in source:
            captions = part["caption"] or [""]  # no sample: still ask for the length
            new = [caption for caption in dict.fromkeys(captions) if recent.get(caption) is None]
            found: dict[str, NDArray[np.int64]] = {}
            if new:
                found = dict(zip(new, self.tokenize(new).numpy(), strict=True))
            rows = [found[caption] if caption in found else recent.get(caption) for caption in captions]
            for caption, row in found.items():
                recent.put(caption, row)
            yield part | {"tokens": np.stack(rows)[: len(part["caption"])]}


def as_is(part: Any) -> Any:
    return part


def join(parts: Sequence[Part], pin: bool) -> Batch:
    """The batch that the workers' parts make together, its image in pinned memory if asked."""
    fields: dict[str, Any] = {}
    for name, first in parts[0].items():
        values = [part[name] for part in parts]
        if isinstance(first, list):
            fields[name] = [item for value in values for item in value]
        elif len(parts) == 1 and isinstance(first, Tensor) and not pin:
            fields[name] = first
        elif isinstance(first, Tensor):
            shape = (sum(map(len, values)), *first.shape[1:])
            fields[name] = torch.cat(values, out=torch.empty(shape, dtype=first.dtype, pin_memory=pin))
        else:
            fields[name] = torch.from_numpy(np.concatenate(values))
    return Batch(**fields)


class Loader:
    """Batches of a pipeline; each `iter` begins at the pipeline's start again."""

    def __init__(
        self,
        pipeline: wds.DataPipeline,
        workers: int = 0,
        prefetch_factor: int | None = None,
        context: str | None = None,
        pin: bool = False,
    ) -> None:
        self.pipeline, self.workers, self.pin = pipeline, workers, pin
        self.options: dict[str, Any] = {}
        if workers:
            self.options = {"prefetch_factor": prefetch_factor, "multiprocessing_context": context}

    def __iter__(self) -> Iterator[Batch]:
        parts: Iterator[Part] = iter(
            DataLoader(
                self.pipeline,
                batch_size=None,
                num_workers=self.workers,
                collate_fn=as_is,
                worker_init_fn=ignore_interrupts,
                generator=torch.Generator(),  # the default one would be advanced: our numbers are keyed
                **self.options,
            )
        )
        while group := list(islice(parts, max(1, self.workers))):  # the loader takes its workers in turn
            yield join(group, self.pin)


def ignore_interrupts(worker: int) -> None:
    """Ctrl-C goes to the whole process group: the trainer saves first, and then ends its workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class FiniteLoader(Loader):
    """A loader that ends: validation."""

    def __init__(self, pipeline: wds.DataPipeline, length: int, **options: Any) -> None:
        super().__init__(pipeline, **options)
        self.length = length

    def __len__(self) -> int:
        return self.length
