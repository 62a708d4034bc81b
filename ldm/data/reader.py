"""Rows of an index -> bytes, one read for neighbours; a sample that cannot be read is a reason, no error.

One reader lives in each worker. Where the plan deals blocks, the reader fetches a block with one `pread` and
holds the bytes until the plan plays them, each lane in turn a little ahead, so that the reads of a worker
are spread evenly over time. A lane beyond the memory budget is read sample by sample.
"""

from __future__ import annotations

import os
from collections import Counter, OrderedDict
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ldm.data.index import Index
from ldm.data.plan import Ints, Stream

GAP = 256 << 10  # bytes between two samples that are rather read than skipped
OPEN_FILES = 32
BUDGET = 512 << 20  # bytes of blocks held by a worker


class Raw(NamedTuple):
    """Bytes of a sample, or why there are none (`reason`)."""

    image: bytes
    caption: bytes
    reason: str = ""


class ShardReader:
    """Reads rows of an index; opens files when needed, keeps a few open, and can be pickled."""

    def __init__(self, index: Index) -> None:
        self.index = index
        self.files: OrderedDict[int, int] = OrderedDict()  # shard -> file descriptor
        self.reads = 0  # for tests and reports
        self.failures: Counter[str] = Counter()  # reason -> samples

    def __call__(self, rows: Ints) -> list[Raw]:
        """Bytes of rows of the index, in the order asked; neighbours in a file come with one read."""
        out: list[Raw] = [Raw(b"", b"", "unread")] * len(rows)
        shards = self.index.shard_of(rows)
        for shard in np.unique(shards):
            at = np.flatnonzero(shards == shard)
            facts = self.index.samples[rows[at]]
            offsets = np.concatenate([facts["image_offset"], facts["caption_offset"]])
            sizes = np.concatenate([facts["image_size"], facts["caption_size"]]).astype(np.int64)
            try:
                pieces = self._ranges(self._file(int(shard)), offsets, sizes)
            except OSError as error:
                reason = "changed" if isinstance(error, ChangedError) else "unreadable"
                for i in at:
                    out[i] = Raw(b"", b"", reason)
                self.failures[reason] += len(at)
                continue
            for k, i in enumerate(at):
                out[i] = Raw(pieces[k], pieces[len(at) + k])
        return out

    def _file(self, shard: int) -> int:
        if shard in self.files:
            self.files.move_to_end(shard)
            return self.files[shard]
        if len(self.files) >= OPEN_FILES:
            os.close(self.files.popitem(last=False)[1])
        path = self.index.shards[shard]
        file = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        if os.fstat(file).st_size != self.index.sizes[shard]:
            os.close(file)
            raise ChangedError(f"{path} is not the file that was indexed")
        self.files[shard] = file
        return file

    def _ranges(self, file: int, offsets: NDArray[Any], sizes: NDArray[Any]) -> list[bytes]:
        """Bytes of each range, read in as few pieces as gaps of at most GAP allow."""
        order = np.argsort(offsets, kind="stable")
        ends = np.maximum.accumulate((offsets + sizes)[order])
        new = np.flatnonzero(offsets[order][1:] - ends[:-1] > GAP) + 1
        out = [b""] * len(offsets)
        for members in np.split(order, new):
            start = int(offsets[members[0]])
            data = self._pread(file, int((offsets + sizes)[members].max()) - start, start)
            for m in members:  # slices are copies: one late sample must not pin the whole buffer
                at = int(offsets[m]) - start
                out[m] = data[at : at + int(sizes[m])]
        return out

    def _pread(self, file: int, size: int, start: int) -> bytes:
        pieces, got = [], 0
        while got < size:
            piece = os.pread(file, size - got, start + got)
            self.reads += 1
            if not piece:
                raise ChangedError("the file ended early")
            pieces.append(piece)
            got += len(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def close(self) -> None:
        while self.files:
            os.close(self.files.popitem()[1])

    def __del__(self) -> None:
        self.close()

    def __reduce__(self) -> tuple[Any, ...]:
        return ShardReader, (self.index,)


class ChangedError(OSError):
    """A shard is not the file that was indexed."""


class BlockReader:
    """Reads the places n of the run that one worker plays, a block at a time.

    `slots` are the worker's slots of each global batch of `period` samples from `start` on. Needs lanes that
    are a multiple of the period, so that a lane is always played by the same slot.
    """

    def __init__(
        self, reader: ShardReader, rows: Ints, stream: Stream, start: int, period: int, slots: Sequence[int]
    ) -> None:
        if stream.lanes % period:
            raise ValueError(f"{stream.lanes} lanes are not a multiple of a global batch of {period}")
        self.reader, self.rows, self.stream, self.budget = reader, rows, stream, BUDGET
        self.held: dict[int, Raw] = {}  # n -> bytes that were fetched ahead
        self.bytes = 0
        firsts = range(start, start + stream.lanes, period)
        lanes = [(first + slot) % stream.lanes for first in firsts for slot in sorted(slots)]
        self.turn = {lane: i * stream.block // len(lanes) for i, lane in enumerate(lanes)}  # to fetch ahead

    def __call__(self, n: Ints) -> list[Raw]:
        """Bytes of the samples n; each call comes later in the run than the one before."""
        offsets, lanes = self.stream.offset(n), n % self.stream.lanes
        for m, offset, lane in zip(n.tolist(), offsets.tolist(), lanes.tolist(), strict=True):
            self._fetch(m)  # what is left of a block just entered
            if self.turn[lane] == offset:
                self._fetch(m + self.stream.lanes * (self.stream.block - offset))
        missing = [i for i, m in enumerate(n.tolist()) if m not in self.held]
        single = iter(self._read(n[missing])) if missing else iter(())
        return [self._take(m) if m in self.held else next(single) for m in n.tolist()]

    def _read(self, n: Ints) -> list[Raw]:
        return self.reader(self.rows[self.stream.places(n)[1]])

    def _fetch(self, first: int) -> None:
        """Hold the bytes from place `first` to the end of its block, if there is room."""
        if first in self.held or self.bytes >= self.budget:
            return
        n = self.stream.rest_of_block(first)
        for m, raw in zip(n.tolist(), self._read(n), strict=True):
            self.held[m] = raw
            self.bytes += len(raw.image) + len(raw.caption)

    def _take(self, n: int) -> Raw:
        raw = self.held.pop(n)
        self.bytes -= len(raw.image) + len(raw.caption)
        return raw
