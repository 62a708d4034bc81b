"""The reads of one worker, a block at a time, spread evenly over time.

Where the plan deals blocks, a block comes with one read, begun a little before the plan comes to it, each
lane in turn; its bytes are held until they are played. Lanes beyond the memory budget, and what buckets seat
away from the worker that holds the block, are read sample by sample.

n place in the run, m place in the plan beneath buckets (n without them), G global batch.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np

from ldm.data.buckets import Regroup
from ldm.data.mixture import Source
from ldm.data.plan import Dealt, Ints, Where
from ldm.data.reader import Raw, ShardReader
from ldm.data.turns import Turns


class Order(Protocol):
    """What a reader needs to know of the order; as in `Regroup`."""

    @property
    def base(self) -> Dealt: ...
    @property
    def batch(self) -> int: ...
    def dealt(self, n: Ints) -> Ints: ...
    def reach(self, step: int) -> int: ...
    def due(self, m: Ints, step: int) -> Ints: ...


@dataclass(frozen=True)
class InOrder:
    """The plan as it is: what is played when is what was dealt."""

    base: Dealt
    batch: int

    def dealt(self, n: Ints) -> Ints:
        return n

    def reach(self, step: int) -> int:
        return step

    def due(self, m: Ints, step: int) -> Ints:
        return m // self.batch


class Ticket(NamedTuple):
    """A sample that is being read."""

    future: Future[list[Raw]]
    place: int  # in what the future gives
    nbytes: int

    def take(self) -> Raw:
        """The sample; waits for it. Nothing else keeps its bytes then."""
        raws = self.future.result()
        raw, raws[self.place] = raws[self.place], Raw({}, "taken")
        return raw

    def drop(self) -> None:
        """Let go of it, as soon as it has come."""
        self.future.add_done_callback(lambda future: None if future.exception() else self._forget(future))

    def _forget(self, future: Future[list[Raw]]) -> None:
        future.result()[self.place] = Raw({}, "taken")


class Reads:
    """Samples of several sources, read on other threads."""

    def __init__(self, sources: Sequence[Source], readers: Sequence[ShardReader]) -> None:
        self.sources, self.readers = sources, readers
        ends = np.cumsum([len(source.index.shards) for source in sources]).tolist()
        self.firsts: list[int] = [0, *ends[:-1]]  # number of each source's first shard among those of all

    def give_up(self, shards: Mapping[int, str]) -> None:
        """Mask the samples of shards, numbered through all sources, for a reason."""
        for shard, reason in shards.items():
            s = bisect_right(self.firsts, shard) - 1
            self.readers[s].quarantine[shard - self.firsts[s]] = reason

    def take_events(self) -> list[tuple[int, str]]:
        """(shard, reason) of those that readers gave up since the last call."""
        pairs = zip(self.firsts, self.readers, strict=True)
        return [(first + shard, reason) for first, reader in pairs for shard, reason in reader.take_events()]

    def rows(self, at: Where) -> Ints:
        """Row in the index of its source of each sample, -1: none."""
        rows = np.full(len(at.place), -1)
        for s, source in enumerate(self.sources):
            mine = (at.source == s) & (at.place >= 0)
            rows[mine] = source.selection.rows[at.place[mine]]
        return rows

    def submit(self, at: Where, rows: Ints) -> list[Ticket]:
        """Begin to read the samples; neighbours of a source come with one read."""
        tickets: dict[int, Ticket] = {}
        for s in np.unique(at.source).tolist():
            mine, reader = np.flatnonzero(at.source == s), self.readers[s]
            facts: Any = reader.index.samples[rows[mine]]
            sizes: Ints = np.sum([facts[f"{kind}_size"] for kind in reader.kinds], axis=0, dtype=np.int64)
            future = reader.submit(rows[mine])
            tickets |= {i: Ticket(future, k, int(sizes[k])) for k, i in enumerate(mine.tolist())}
        return [tickets[i] for i in range(len(rows))]


class BlockReader:
    """Reads what one worker plays: the `slots` of each global batch.

    A lane belongs to the slot that plays it, which needs lanes that are a multiple of the global batch; with
    other lanes all is read sample by sample.
    """

    def __init__(self, reads: Reads, order: Order, slots: Iterable[int], budget: int) -> None:
        self.reads, self.order, self.budget = reads, order, budget
        self.base, self.batch = order.base, order.batch
        self.slots = np.array(sorted(slots), np.int64)
        self.held: dict[int, Ticket] = {}  # m -> fetched ahead
        self.bytes = 0
        self.step: int | None = None
        self.reached = 0  # what of the base has come, in steps
        self.samples = self.bytes_read = self.bytes_used = 0  # for tests and reports
        self.turn = self._turns()

    def _turns(self) -> dict[int, int]:
        """Lanes that are read by block -> how many samples of the last block are played when that begins."""
        if self.base.lanes % self.batch or not len(self.slots):
            return {}
        lanes = (np.arange(0, self.base.lanes, self.batch).reshape(-1, 1) + self.slots).ravel()
        size = self.base.blocks_at(lanes)[1]
        means = np.array([source.index.mean_bytes for source in self.reads.sources])
        need = size * means[self.base.places(lanes).source]
        mine = (size > 1) & (np.cumsum(np.where(size > 1, need, 0)) <= self.budget)
        lanes, size = lanes[mine], size[mine]
        return dict(
            zip(lanes.tolist(), (np.arange(len(lanes)) * size // max(1, len(lanes))).tolist(), strict=True)
        )

    def __call__(self, n: Ints) -> list[Ticket]:
        """The samples n, of one step; each call comes later in the run than the one before."""
        if not len(n):
            return []
        step = int(n[0]) // self.batch
        if step != self.step:
            self._enter(step)
        played = self.order.dealt(n)
        for m in played.tolist():
            if m not in self.held and m % self.base.lanes in self.turn:
                self._open(m, step + 1, also=played)  # a run that begins in the middle of a block
        missing = np.array([m for m in played.tolist() if m not in self.held], np.int64)
        singles = dict(zip(missing.tolist(), self._submit(missing), strict=True))
        tickets = [singles[m] if m in singles else self._release(m) for m in played.tolist()]
        self.samples += len(n)
        self.bytes_used += sum(ticket.nbytes for ticket in tickets)
        return tickets

    def _enter(self, step: int) -> None:
        """Begin the reads that come before a step, and drop what others will play."""
        reach = self.order.reach(step)
        going_on = self.step is not None and step == self.step + 1 and reach >= self.reached
        for base_step in range(self.reached + 1 if going_on else reach, reach + 1):
            n = base_step * self.batch + self.slots
            for m, offset, size in zip(
                n.tolist(), *(x.tolist() for x in self.base.blocks_at(n)), strict=True
            ):
                if self.turn.get(m % self.base.lanes) == offset:
                    self._open(m + self.base.lanes * (size - offset), step)
        if isinstance(self.order, Regroup):
            self._drop_strangers(step)
        if not going_on or (isinstance(self.order, Regroup) and step % self.order.steps == 0):
            self._drop_overdue(step)
        self.step, self.reached = step, reach

    def _drop_strangers(self, step: int) -> None:
        """Samples of our blocks that are played by others in this step."""
        everyone = np.arange(step * self.batch, (step + 1) * self.batch)
        played = self.order.dealt(everyone)
        away = np.isin(played % self.batch, self.slots) & ~np.isin(everyone % self.batch, self.slots)
        for m in played[away].tolist():
            if m in self.held:
                self._release(m).drop()

    def _drop_overdue(self, step: int) -> None:
        held = np.array(list(self.held), np.int64)
        for m in held[self.order.due(held, step) < step].tolist():
            self._release(m).drop()

    def _open(self, m: int, step: int, also: Ints | None = None) -> None:
        """Hold what is to be played, from `step` on or among `also`, of the block that m belongs to."""
        offset, size = (int(x[0]) for x in self.base.blocks_at(np.array([m])))
        block = m + self.base.lanes * np.arange(-offset, size - offset)
        wanted = self.order.due(block, step) >= step
        if also is not None:
            wanted |= np.isin(block, also)
        wanted &= np.array([b not in self.held for b in block.tolist()])
        block = block[wanted]
        if self.bytes >= 2 * self.budget:  # samples far above the mean
            return
        for b, ticket in zip(block.tolist(), self._submit(block), strict=True):
            self.held[b] = ticket
            self.bytes += ticket.nbytes

    def _submit(self, m: Ints) -> list[Ticket]:
        if not len(m):
            return []
        at = self.base.places(m)
        tickets = self.reads.submit(at, self.reads.rows(at))
        self.bytes_read += sum(ticket.nbytes for ticket in tickets)
        return tickets

    def _release(self, m: int) -> Ticket:
        ticket = self.held.pop(m)
        self.bytes -= ticket.nbytes
        return ticket


class TurnReader:
    """Reads what one worker plays where each step is the turn of one bucket: a `BlockReader` for each."""

    def __init__(self, reads: Reads, plan: Turns, slots: Sequence[int], budget: int) -> None:
        self.plan, share = plan, budget // len(plan.streams)
        orders = [InOrder(stream, plan.batch) for stream in plan.streams]
        self.readers = [BlockReader(reads, order, slots, share) for order in orders]
        self.turn = any(reader.turn for reader in self.readers)

    def __call__(self, n: Ints) -> list[Ticket]:
        """As that of `BlockReader`."""
        if not len(n):
            return []
        bucket, step = self.plan.turn(int(n[0]) // self.plan.batch)
        return self.readers[bucket](step * self.plan.batch + n % self.plan.batch)
