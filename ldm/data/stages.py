"""What happens in a worker: places in the run -> bytes -> fields of a batch -> tokens.

The stages form a webdataset `DataPipeline`. A worker makes the same slots of every batch, not whole batches:
so neither the number of ranks nor of workers changes what is in a batch, or in which order.

p samples of a part, l tokens.
"""

from __future__ import annotations

import logging
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any, NamedTuple

import numpy as np
import xxhash
from numpy.typing import NDArray
from torch import Tensor

from ldm.data.blocks import BlockReader, InOrder, Order, Reads, Ticket, TurnReader
from ldm.data.buckets import Regroup
from ldm.data.captions import Captions
from ldm.data.image import BadImage
from ldm.data.loader import Share, worker_id
from ldm.data.makers import Maker, Part
from ldm.data.mixture import Source
from ldm.data.plan import Dealt, Ints, Walk, Where, Window, skipped
from ldm.data.range_cache import RangeCache
from ldm.data.reader import Raw, ReadPolicy, ShardReader
from ldm.data.turns import Turns

Tokenize = Callable[[list[str]], Tensor]
REPORTED = 10  # failures a worker names in the log
AHEAD = 1  # parts whose single reads are begun before they are needed
CAPTIONS = 2_048  # tokenised captions kept by a worker: for sets that repeat them
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Places:
    """First stage: the worker's places n of each micro-batch, after `start` samples; endless without `steps`.

    Windows of places in `skip` are leapt over.
    """

    share: Share
    start: int = 0
    steps: int | None = None
    skip: Sequence[Window] = ()

    def __call__(self) -> Iterator[Ints]:
        return self.of(worker_id())

    def of(self, worker: int) -> Iterator[Ints]:
        """Those of one worker."""
        for step in count() if self.steps is None else range(self.steps):
            first = skipped(self.start + step * self.share.global_batch_size, self.skip)
            for micro in range(self.share.accumulate):
                slots = self.share.slots(micro, worker)
                yield first + np.arange(slots.start, slots.stop)


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


class Begun(NamedTuple):
    """A part whose bytes are being read."""

    n: Ints
    at: Where
    rows: Ints  # of the index of each one's source, -1: padding
    found: list[Any]  # what is in memory already, else a `Ticket`; None: padding


@dataclass(frozen=True)
class Load:
    """Second stage: places -> fields and captions; what cannot be read has weight 0 and zeros."""

    sources: Sequence[Source]
    maker: Maker
    captions: Captions
    places: Places
    plan: Dealt | Regroup | Turns | Walk
    memory_cache_mb: int = 0
    reading: ReadPolicy | None = None
    range_cache: RangeCache | None = None
    quarantine: Mapping[int, tuple[str, int]] = field(default_factory=dict)  # shards not to try: `Health`'s

    def __call__(self, source: Iterable[Ints]) -> Iterator[Part]:
        kinds = tuple(dict.fromkeys((*self.maker.kinds, *self.captions.kinds)))
        reading = kinds, self.reading, self.range_cache
        reads = Reads(self.sources, [ShardReader(source.index, *reading) for source in self.sources])
        reads.give_up({shard: reason for shard, (reason, _) in self.quarantine.items()})
        memory, failures = Recent(self.memory_cache_mb << 20), 0
        for n, at, rows, found in self._begun(source, reads, memory):
            part = self._facts(n, at.source, rows) | self.maker.fields(n)
            for i, row in enumerate(rows.tolist()):
                if row < 0:
                    continue
                try:
                    prepared, texts = self._prepared(found[i], memory, (int(at.source[i]), row))
                    caption = self.captions(texts, int(n[i]))
                except BadImage as error:
                    part["reason"][i] = str(error)
                    failures += 1
                    if failures <= REPORTED and isinstance(self.plan, Walk):  # else the run's `Health` tells
                        log.warning("masked %s: %s", part["key"][i], error)
                    continue
                part["caption"][i], part["weight"][i] = caption, 1.0
                self.maker.finish(part, i, prepared)
            first = int(n[0]) if len(n) else -1
            part["events"] = [(shard, reason, first) for shard, reason in reads.take_events()]
            yield part

    def _begun(self, source: Iterable[Ints], reads: Reads, memory: Recent) -> Iterator[Begun]:
        """The parts, their reads begun ahead."""
        blocks, waiting = self._blocks(reads), deque[Begun]()
        for n in source:
            at = self.plan.places(n)
            rows = reads.rows(at)
            keys = zip(at.source.tolist(), rows.tolist(), strict=True)
            found: list[Any] = [memory.get(key) for key in keys]
            if blocks is not None and blocks.turn:
                for i, ticket in enumerate(blocks(n)):
                    if found[i] is None:
                        found[i] = ticket
                    else:
                        ticket.drop()
            else:
                new = np.flatnonzero([row >= 0 and not value for row, value in zip(rows, found, strict=True)])
                tickets = reads.submit(Where(*(values[new] for values in at)), rows[new])
                for i, ticket in zip(new.tolist(), tickets, strict=True):
                    found[i] = ticket
            waiting.append(Begun(n, at, rows, found))
            if len(waiting) > AHEAD:
                yield waiting.popleft()
        yield from waiting

    def _blocks(self, reads: Reads) -> BlockReader | TurnReader | None:
        share, plan = self.places.share, self.plan
        if isinstance(plan, Walk):
            return None
        slots, budget = share.all_slots(worker_id()), reads.readers[0].policy.memory_mb << 20
        if isinstance(plan, Turns):
            return TurnReader(reads, plan, slots, budget)
        order: Order = plan if isinstance(plan, Regroup) else InOrder(plan, share.global_batch_size)
        return BlockReader(reads, order, slots, budget)

    def _prepared(self, found: Any, memory: Recent, key: tuple[int, int]) -> tuple[Any, dict[str, bytes]]:
        if not isinstance(found, Ticket):
            known: tuple[Any, dict[str, bytes]] = found
            return known
        raw: Raw = found.take()
        if raw.reason:
            raise BadImage(raw.reason)
        prepared, size = self.maker.prepare(raw)
        texts = {kind: raw.parts[kind] for kind in self.captions.kinds}
        if self.memory_cache_mb:
            memory.put(key, (prepared, texts), size)
        return prepared, texts

    def _facts(self, n: Ints, sources: Ints, rows: Ints) -> Part:
        keys, original = [""] * len(n), np.zeros((len(n), 2), np.int64)
        label = np.full(len(n), -1)
        for s, source in enumerate(self.sources):
            mine = np.flatnonzero((sources == s) & (rows >= 0))
            facts, columns = source.index.samples[rows[mine]], source.index.columns
            original[mine] = np.stack([facts["original_height"], facts["original_width"]], 1)
            if "label" in columns:
                label[mine] = np.nan_to_num(columns["label"][rows[mine]], nan=-1)
            for i, key in zip(mine.tolist(), source.index.keys(rows[mine]), strict=True):
                keys[i] = f"{source.name}:{key}" if s else key  # shards of two sets may have equal names
        hashes = np.array([xxhash.xxh3_64_intdigest(key.encode()) if key else 0 for key in keys], np.uint64)
        labelled = any("label" in source.index.columns for source in self.sources)
        return {
            **({"label": label} if labelled else {}),
            "n": n,
            "weight": np.zeros(len(n), np.float32),
            "key": keys,
            "reason": [""] * len(n),
            "hash": hashes.view(np.int64),
            "caption": [""] * len(n),
            "original_size": original,
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
