"""Every step one bucket: a plan dealt anew, so that all samples of a global batch have one shape.

Nothing is sorted beforehand. Inside a period of T * G places of the plan beneath, each bucket's samples make
batches in the order in which they come, and the batches are played in the order in which they are full. With
k buckets T - k + 1 batches always get full, so every period has as many steps, its number is one division,
and the state of the data is still the one integer n. Left out: (k - 1) / T, other samples in each period.

G global batch, T period in steps, k buckets, n place in the run, m place in the plan beneath.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ldm.data.plan import Dealt, Ints, Where
from ldm.data.shapes import Numbers


class Table(NamedTuple):
    """How one period is played; places are counted from its start."""

    period: int
    buckets: NDArray[np.uint8]  # [T G] of each place
    members: list[NDArray[np.int32]]  # of each bucket: its places that are in full batches, in order
    first: Ints  # [k + 1] number of each bucket's first batch
    order: Ints  # [steps] number of the batch that a step plays
    step: Ints  # [batches] and the step that plays it, -1: none

    def bucket(self, number: Any) -> Any:
        """The bucket that a batch belongs to."""
        return np.searchsorted(self.first, number, side="right") - 1


class Regroup:
    """Deals `base` anew; `numbers` and `final` give a sample's bucket, see `shapes.Sorted`."""

    def __init__(
        self,
        base: Dealt,
        numbers: Sequence[Numbers],
        final: NDArray[np.uint8],
        count: int,
        batch: int,
        period: int,
    ) -> None:
        if period < 2 * count:
            raise ValueError(f"a period of {period} steps is too short for {count} buckets")
        self.base, self.numbers, self.final, self.count = base, list(numbers), final, count
        self.batch, self.period, self.steps = batch, period, period - count + 1
        self.size = period * batch  # places of the plan beneath in a period
        self._forget()

    def _forget(self) -> None:
        self.table: Table | None = None
        self.played: dict[int, NDArray[np.uint8]] = {}  # period -> bucket of each of its steps
        self.seated: dict[int, Ints] = {}  # step -> place of each slot

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"table": None, "played": {}, "seated": {}}

    # ---- what is played when

    def places(self, n: Ints) -> Where:
        return self.base.places(self.dealt(n))

    def dealt(self, n: Ints) -> Ints:
        """Places m of the plan beneath that are played at n."""
        step, slot = np.divmod(np.asarray(n, np.int64), self.batch)
        out = np.empty_like(slot)
        for s in np.unique(step).tolist():
            out[step == s] = self._seats(s)[slot[step == s]]
        return out

    def bucket(self, step: int) -> int:
        """The bucket that all samples of a step belong to."""
        period, i = divmod(step, self.steps)
        if period not in self.played:
            table = self._table(period)
            self.played[period] = table.bucket(table.order).astype(np.uint8)
            while len(self.played) > 2:  # with samples read ahead two periods may be asked for in turn
                del self.played[next(iter(self.played))]
        return int(self.played[period][i])

    def reach(self, step: int) -> int:
        """How many places of the plan beneath have come when a step is full, as the number of their step."""
        period, i = divmod(step, self.steps)
        return period * self.period + int(self._batch(self._table(period), i)[-1]) // self.batch

    def due(self, m: Ints, step: int) -> Ints:
        """The step that plays each m, as far as one can see in `step`: -1 for past and left out, or large."""
        period = step // self.steps
        table, at = self._table(period), np.asarray(m, np.int64) - period * self.size
        out = np.where(at < 0, -1, np.iinfo(np.int64).max)
        inside = np.flatnonzero((at >= 0) & (at < self.size))
        bucket = table.buckets[at[inside]]
        for b in np.unique(bucket).tolist():
            mine = inside[bucket == b]
            rank = np.searchsorted(table.members[b], at[mine])
            number = np.where(rank < len(table.members[b]), table.first[b] + rank // self.batch, -1)
            played = np.append(table.step, -1)[number]
            out[mine] = np.where(played < 0, -1, period * self.steps + played)
        return out

    # ---- a period

    def _table(self, period: int) -> Table:
        if self.table is None or self.table.period != period:
            self.table = None  # room for the next
            self.table = self._built(period)
        return self.table

    def _built(self, period: int) -> Table:
        tables = [numbers.array for numbers in self.numbers]
        buckets = self.final[self.base.look_up(tables, period * self.size, self.size)]
        members = [np.flatnonzero(buckets == b).astype(np.int32) for b in range(self.count)]
        members = [places[: len(places) // self.batch * self.batch] for places in members]
        full = np.array([len(places) // self.batch for places in members])
        last = np.concatenate([places[self.batch - 1 :: self.batch] for places in members])
        order = np.argsort(last, kind="stable")[: self.steps]
        step = np.full(len(last), -1)
        step[order] = np.arange(self.steps)
        return Table(period, buckets, members, np.concatenate([[0], np.cumsum(full)]), order, step)

    def _batch(self, table: Table, i: int) -> NDArray[np.int32]:
        """Places of the i-th step of a period, in order."""
        number = table.order[i]
        bucket = int(table.bucket(number))
        start = int(number - table.first[bucket]) * self.batch
        return table.members[bucket][start : start + self.batch]

    def _seats(self, step: int) -> Ints:
        if step not in self.seated:
            period, i = divmod(step, self.steps)
            members = self._batch(self._table(period), i).astype(np.int64) + period * self.size
            self.seated[step] = seat(members, self.batch)
            while len(self.seated) > 4:
                del self.seated[next(iter(self.seated))]
        return self.seated[step]


def seat(members: Ints, batch: int) -> Ints:
    """Which member each slot plays: its own (m mod G) if that is free, else one near it.

    A block is played by one slot of the plan beneath, and held by the worker of that slot. So members are put
    into cells of 1, 2, 4, ... slots around their own until all have one: no world size is needed for it.
    """
    out, free = np.full(batch, -1), np.arange(batch)
    left = members[np.argsort(members % batch, kind="stable")]
    size = 1
    while left.size:
        cell = left % batch // size
        rank = np.arange(left.size) - np.searchsorted(cell, cell)  # among those of its cell
        first = np.searchsorted(free // size, cell)
        fits = first + rank < np.searchsorted(free // size, cell, side="right")
        taken = (first + rank)[fits]
        out[free[taken]] = left[fits]
        free, left, size = np.delete(free, taken), left[~fits], 2 * size
    return out
