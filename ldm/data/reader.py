"""Rows of an index -> bytes, one read for neighbours; a sample that cannot be read is a reason, no error.

One reader lives in each worker. Local shards are read at once; `submit`, and all that comes over the network,
is read on other threads, with time limits and retries. A shard that fails them all is quarantined: its
samples are masked from then on, and nothing waits for it again.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import xxhash
from numpy.typing import NDArray

from ldm.data.attempts import Attempts
from ldm.data.index import Index
from ldm.data.plan import Ints
from ldm.data.range_cache import RangeCache
from ldm.data.remote import public
from ldm.data.storage import ChangedError, Shard, is_remote, open_shard, stat
from ldm.errors import InputError

GAP = 256 << 10  # bytes between two samples that are rather read than skipped
LONGEST = 16 << 20  # bytes of one read, unless a sample is larger
log = logging.getLogger(__name__)


class Raw(NamedTuple):
    """Bytes of a sample's members by kind ("image", "caption", "json", ...), or why there are none."""

    parts: Mapping[str, bytes]
    reason: str = ""

    @property
    def nbytes(self) -> int:
        return sum(map(len, self.parts.values()))


@dataclass(frozen=True)
class ReadPolicy:
    """How long a worker waits for data, how often it tries, and what it may hold; units in configs/data."""

    timeout: float = 120.0
    deadline: float = 300.0
    retries: int = 5
    backoff: float = 1.0
    threads: int = 4
    hedge: bool = True
    verify: bool = True
    open_files: int = 32
    memory_mb: int = 512

    def __post_init__(self) -> None:
        least = {"timeout": 0.001, "deadline": 0.001, "threads": 1, "open_files": 1}
        for name in ("timeout", "deadline", "retries", "backoff", "threads", "open_files", "memory_mb"):
            value, low = getattr(self, name), least.get(name, 0)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not value >= low:
                raise InputError(f"data.reading.{name}", f"expected at least {low}, got {value!r}")


REASONS: dict[type[OSError], str] = {
    ChangedError: "changed",
    FileNotFoundError: "missing",
    PermissionError: "denied",
    TimeoutError: "timeout",
}


class Span(NamedTuple):
    """Neighbouring samples of one shard, which come with one read."""

    shard: int
    start: int
    size: int
    samples: list[tuple[int, list[int], list[int], list[int]]]  # place asked for; offset, size, check by kind


class ShardReader:
    """Reads rows of an index; opens files when needed, keeps a few open, and can be pickled.

    `cache` is asked first for whatever is read. `quarantine` (number of a shard -> reason) may be added to.
    """

    def __init__(
        self,
        index: Index,
        kinds: Sequence[str] = ("image", "caption"),
        policy: ReadPolicy | None = None,
        cache: RangeCache | None = None,
    ) -> None:
        self.index, self.kinds, self.cache = index, tuple(kinds), cache
        self.policy = ReadPolicy() if policy is None else policy
        self.quarantine: dict[int, str] = {}
        self.failures: Counter[str] = Counter()  # reason -> samples
        self.reads = self.bytes = 0  # ranges asked of shards, and what they brought
        self._begin()

    def _begin(self) -> None:
        """What belongs to one process."""
        self.process = os.getpid()
        self.files: OrderedDict[int, Shard] = OrderedDict()
        self.lock = threading.RLock()
        self.attempts: Attempts | None = None
        self.events: list[tuple[int, str]] = []

    def __reduce__(self) -> tuple[Any, ...]:
        state = {"quarantine": dict(self.quarantine)}
        return ShardReader, (self.index, self.kinds, self.policy, self.cache), state

    def __call__(self, rows: Ints) -> list[Raw]:
        """Bytes of rows of the index, in the order asked; neighbours in a file come with one read."""
        self._own()
        out, spans = [Raw({}, "unread")] * len(rows), self._spans(rows)
        if not self._near(spans):
            return self._start(out, spans).result()
        slow = self._put(out, self._try(spans))
        return self._start(out, slow).result() if slow else out

    def submit(self, rows: Ints) -> Future[list[Raw]]:
        """The same on other threads, local shards with time limits too."""
        self._own()
        return self._start([Raw({}, "unread")] * len(rows), self._spans(rows))

    def take_events(self) -> list[tuple[int, str]]:
        """(shard, reason) of those that were quarantined since the last call."""
        with self.lock:
            events, self.events = self.events, []
        return events

    def close(self) -> None:
        """Let go of files and threads; a later read opens what it needs again."""
        with self.lock:
            self.files.clear()
            if self.attempts is not None and self.process == os.getpid():
                self.attempts.close()
            self.attempts = None

    def __del__(self) -> None:
        if hasattr(self, "lock"):  # the constructor came to its end
            self.close()

    # ---- which bytes

    def _spans(self, rows: Ints) -> list[Span]:
        """A sample is never cut: what lies between its members is read with them."""
        facts, shards = self.index.samples[rows], self.index.shard_of(rows)
        offsets, sizes, checks = (
            np.stack([_column(facts, f"{kind}_{name}") for kind in self.kinds])
            for name in ("offset", "size", "check")
        )
        ends = np.where(sizes > 0, offsets + sizes, 0).max(0)
        starts = np.minimum(np.where(sizes > 0, offsets, np.iinfo(np.int64).max).min(0), ends)
        order = np.lexsort((starts, shards))
        members = zip(
            offsets.T[order].tolist(), sizes.T[order].tolist(), checks.T[order].tolist(), strict=True
        )
        spans: list[Span] = []
        for i, member in zip(order.tolist(), members, strict=True):
            shard, start, end = int(shards[i]), int(starts[i]), int(ends[i])
            last = spans[-1] if spans else None
            if last is not None and last.shard == shard and start - last.start - last.size <= GAP:
                size = max(last.size, end - last.start)
                if size <= LONGEST:
                    last.samples.append((i, *member))
                    spans[-1] = last._replace(size=size)
                    continue
            spans.append(Span(shard, start, end - start, [(i, *member)]))
        return spans

    # ---- reading them

    def _load(self, span: Span) -> list[Raw]:
        """Read a span, cut it into its samples, and check them."""
        data, raws = self._bytes(span.shard, span.start, span.size), []
        for _, offsets, sizes, checks in span.samples:
            starts = [offset - span.start for offset in offsets]
            # slices are copies: one late sample must not pin the whole buffer
            parts = {k: data[o : o + s] for k, o, s in zip(self.kinds, starts, sizes, strict=True)}
            good = not self.policy.verify or all(
                not check or check == xxhash.xxh3_64_intdigest(parts[kind]) & 0xFFFFFFFF
                for kind, check in zip(self.kinds, checks, strict=True)
            )
            raws.append(Raw(parts) if good else Raw({}, "corrupt"))
        return raws

    def _try(self, spans: list[Span]) -> list[tuple[Span, list[Raw] | None]]:
        """Those of spans that can be read just now."""
        done: list[tuple[Span, list[Raw] | None]] = []
        for span in spans:
            raws = None
            if span.shard not in self.quarantine:
                with suppress(OSError):
                    raws = self._load(span)
            done.append((span, raws))
        return done

    def _put(self, out: list[Raw], done: list[tuple[Span, list[Raw] | None]]) -> list[Span]:
        """Put samples where they were asked for; returns the spans that there are none of."""
        for span, raws in done:
            for (i, *_), raw in zip(span.samples, raws or (), strict=raws is not None):
                out[i] = raw
                if raw.reason:
                    self.failures[raw.reason] += 1
        return [span for span, raws in done if raws is None]

    def _bytes(self, shard: int, start: int, size: int) -> bytes:
        if self.cache is None or not size:
            return self._fetch(shard, start, size)
        url, timeout = self.index.shards[shard], self.policy.timeout
        facts = stat(url, timeout)
        self._check_size(shard, facts.size)
        fetch = partial(self._fetch, shard)
        return self.cache.read(f"{url} {facts.tag}", facts.size, start, size, fetch)

    def _fetch(self, shard: int, start: int, size: int) -> bytes:
        begun = time.monotonic()
        try:
            data = self._open(shard).read(start, size)
        except OSError:  # the next attempt opens it anew, and sees whether it has changed
            with self.lock:
                self.files.pop(shard, None)
            raise
        with self.lock:
            self.reads, self.bytes = self.reads + 1, self.bytes + size
            if self.attempts is not None and self._remote(shard):
                self.attempts.took(time.monotonic() - begun)
        return data

    def _open(self, shard: int) -> Shard:
        with self.lock:
            if shard in self.files:
                self.files.move_to_end(shard)
                return self.files[shard]
        opened = open_shard(self.index.shards[shard], self.policy.timeout)  # not under the lock: may hang
        self._check_size(shard, opened.size)
        with self.lock:
            self.files[shard] = opened
            while len(self.files) > self.policy.open_files:
                self.files.popitem(last=False)  # it closes when the last who reads it lets go
        return opened

    def _check_size(self, shard: int, size: int) -> None:
        if size != self.index.sizes[shard]:
            raise ChangedError(f"{size:,} bytes, {self.index.sizes[shard]:,} in the index")

    # ---- on the event loop

    def _start(self, out: list[Raw], spans: list[Span]) -> Future[list[Raw]]:
        with self.lock:
            if self.attempts is None:
                p = self.policy
                self.attempts = Attempts(p.timeout, p.deadline, p.retries, p.backoff, p.threads, ChangedError)
            return self.attempts.start(self._all(self.attempts, out, spans))

    async def _all(self, attempts: Attempts, out: list[Raw], spans: list[Span]) -> list[Raw]:
        """Local ones in one go, as each change of thread costs what a read does; what is left one by one."""
        if self._near(spans):
            with suppress(OSError):
                spans = self._put(out, await attempts.once(partial(self._try, spans)))
        if spans:
            await asyncio.gather(*(self._one(attempts, out, span) for span in spans))
        return out

    async def _one(self, attempts: Attempts, out: list[Raw], span: Span) -> None:
        def lost() -> bool:
            return span.shard in self.quarantine

        raws = None
        if not lost():
            try:
                hedge = self.policy.hedge and self._remote(span.shard)
                raws = await attempts(partial(self._load, span), lost, hedge)
            except OSError as error:
                self._give_up(span.shard, error)
                attempts.wake()
        self._put(out, [(span, raws or [Raw({}, self.quarantine[span.shard])] * len(span.samples))])

    def _give_up(self, shard: int, error: OSError) -> None:
        with self.lock:
            if shard in self.quarantine:
                return
            reason = next((name for kind, name in REASONS.items() if isinstance(error, kind)), "unreadable")
            self.quarantine[shard] = reason
            self.events.append((shard, reason))
        log.warning("quarantined %s as %s: %s", public(self.index.shards[shard]), reason, error)

    def _remote(self, shard: int) -> bool:
        return is_remote(self.index.shards[shard])

    def _near(self, spans: list[Span]) -> bool:
        """Whether all can be read at once: local, and without a cache."""
        return self.cache is None and not any(map(self._remote, {span.shard for span in spans}))

    def _own(self) -> None:
        if self.process != os.getpid():  # a fork has no threads, and locks of which nobody knows
            self._begin()


def _column(facts: NDArray[Any], name: str) -> NDArray[np.int64]:
    known = name in (facts.dtype.names or ())
    return facts[name].astype(np.int64) if known else np.zeros(len(facts), np.int64)
