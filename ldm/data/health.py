"""What a run consumed, what of it was bad, and when that is too much.

Each rank counts its own batches, without waiting for the device; `agree` adds the ranks up, at the steps of
the log and of checkpoints alone, so that all of them know the same, and stop together if they must.

The digest is the sum modulo 2^64 of `Batch.hash` over all samples of completed optimizer steps: the same for
any number of ranks and workers and any number of restarts, and another one if a sample was lost or repeated.
"""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from ldm.data.reasons import REASONS, number_of
from ldm.errors import InputError
from ldm.types import Batch

NAMED = 10  # bad samples and shards that a run names in its log
PIECES = 20  # of the window that bad samples are counted in
Event = tuple[int, str, int]  # shard, reason, n at which it was given up
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Budget:
    """How much bad data a run puts up with; None: any amount.

    `in_a_row` samples of one rank, one after another; `fraction` of the last `window` samples of all ranks
    (so the first fraction * window bad ones are free); `shards` is the part of all shards that may be given
    up, and one always may.
    """

    in_a_row: int | None = 100
    fraction: float | None = 0.01
    window: int = 100_000
    shards: float | None = 0.001

    def __post_init__(self) -> None:
        for name in ("in_a_row", "fraction", "window", "shards"):
            value = getattr(self, name)
            if value is not None and value < (1 if name == "window" else 0):
                raise InputError(f"data.budget.{name}", f"{value} is too small", "null: no limit")


class Health:
    """Counters of one run; `shards` are the names of its shards, by number."""

    def __init__(self, budget: Budget, shards: Sequence[str] = ()) -> None:
        self.budget, self.shards = budget, shards
        self.digest, self.digest_from = 0, 0  # of the samples from that place up to the last agreement
        self.masked: Counter[str] = Counter()  # reason -> samples of all ranks
        self.quarantine: dict[int, tuple[str, int]] = {}  # shard -> (reason, n): not to be tried
        self._new_row: Counter[str] = Counter()  # of `masked`, what `take_row` has not given
        self._window: deque[tuple[int, int]] = deque()  # (samples, bad ones) of all ranks, in order
        self._samples, self._named, self._speaks = 0, 0, True
        self._clear()
        self._row = 0  # bad samples of this rank up to now, one after another

    def _clear(self) -> None:
        """This rank has nothing to tell."""
        self._sum: Tensor | None = None  # of hashes, on the device
        self._counts = [0] * len(REASONS)
        self._events: list[Event] = []
        self._first: list[tuple[str, str]] = []  # "shard/key" and reason
        self._longest = 0

    def add(self, batch: Batch) -> None:
        """Count a (micro-)batch of this rank that was trained on. Does not wait for the device."""
        if batch.hash is not None:
            total = batch.hash.sum()
            self._sum = total if self._sum is None else self._sum + total
        self._events += batch.events
        if not any(batch.reason):
            self._row = 0
            return
        for key, reason in zip(batch.key, batch.reason, strict=True):
            self._row = self._row + 1 if reason else 0
            self._longest = max(self._longest, self._row)
            if reason:
                self._counts[number_of(reason)] += 1
                if len(self._first) < NAMED:
                    self._first.append((key, reason))

    def agree(self, samples: int, device: torch.device | str = "cpu") -> None:
        """Add up over all ranks what they counted since the last time; `samples` the run has consumed by now.

        A collective. Raises `InputError` on every rank if a budget is exceeded.
        """
        too_long = self.budget.in_a_row is not None and self._longest > self.budget.in_a_row
        mine = torch.tensor([*self._counts, len(self._events), int(too_long)])
        digest = self._sum.to(device) if self._sum is not None else torch.zeros((), dtype=torch.int64)
        vector = torch.cat([mine.to(device), digest.to(device).view(1)])
        if shared := dist.is_available() and dist.is_initialized():
            dist.all_reduce(vector)  # int64 wraps: modulo 2^64
        *numbers, events, too_long_on, total = vector.tolist()
        counts = Counter({reason: k for reason, k in zip(REASONS, numbers, strict=True) if k})
        told = [(self._events, self._first, self._longest)]
        if shared and (events or too_long_on or (counts and self._named < NAMED)):
            told = [told[0]] * dist.get_world_size()
            dist.all_gather_object(told, (self._events, self._first, self._longest))
        self._clear()
        self.digest = (self.digest + total) % 2**64
        self.masked += counts
        self._new_row += counts
        self._slide(samples - self._samples, counts.total())
        self._samples = samples
        self._speaks = not shared or dist.get_rank() == 0
        self._name([one for _, first, _ in told for one in first])
        self._give_up(sorted((one for events, _, _ in told for one in events), key=lambda one: one[2]))
        self._check(max(longest for _, _, longest in told) if too_long_on else 0)

    def _slide(self, samples: int, bad: int) -> None:
        """Keep what the last `window` samples need, in pieces of a `PIECES`-th or more."""
        if self._window and self._window[-1][0] < self.budget.window // PIECES:
            before = self._window.pop()
            samples, bad = samples + before[0], bad + before[1]
        self._window.append((samples, bad))
        kept = sum(size for size, _ in self._window)
        while kept - self._window[0][0] >= self.budget.window:
            kept -= self._window.popleft()[0]

    def _name(self, bad: Sequence[tuple[str, str]]) -> None:
        new = bad[: NAMED - self._named]
        self._named += len(new)
        for key, reason in new if self._speaks else ():
            log.warning("masked %s: %s", key, reason)

    def _give_up(self, events: Sequence[Event]) -> None:
        for shard, reason, n in events:
            if shard not in self.quarantine:
                self.quarantine[shard] = (reason, n)
                if self._speaks:
                    log.warning("shard %s is given up: %s", self._shard(shard), reason)

    def _shard(self, number: int) -> str:
        return self.shards[number] if number < len(self.shards) else str(number)

    def _check(self, longest: int) -> None:
        """Raise `InputError` with the list if a budget is exceeded; `longest` row that is, or 0."""
        budget, (size, bad) = self.budget, map(sum, zip(*self._window, strict=True))
        lost = len(self.quarantine)
        allowed = max(1, int(budget.shards * len(self.shards))) if budget.shards else 0
        if longest:
            where, what = "in_a_row", f"{longest} bad samples in a row; {budget.in_a_row} are allowed"
        elif budget.fraction is not None and bad > budget.fraction * budget.window:
            limit = f"{budget.fraction * budget.window:,.0f} are allowed"
            where, what = "fraction", f"{bad:,} bad samples of the last {size:,}; {limit}"
        elif budget.shards is not None and lost > allowed:
            what = f"{lost} of {len(self.shards):,} shards were given up; {allowed} may be"
            where = "shards"
        else:
            return
        fix = "repair the data and repeat the command (it goes on from the newest checkpoint), or raise this"
        raise InputError(f"data.budget.{where}", f"{what}; {self.summary()}", fix)

    def summary(self) -> str:
        """What was masked, and which shards were given up."""
        counts = [f"{reason} {count:,}" for reason, count in self.masked.most_common()]
        lines = f"masked in this run: {', '.join(counts)}"
        if self.quarantine:
            names = [f"{PurePath(self._shard(k)).name} ({why})" for k, (why, _) in self.quarantine.items()]
            more = [f"{len(names) - NAMED} more"] if len(names) > NAMED else []
            lines += f"; shards given up: {', '.join(names[:NAMED] + more)}"
        return lines

    def take_row(self) -> dict[str, int]:
        """Masked samples by reason since the last call, for every reason that the run has met."""
        row = {reason: self._new_row[reason] for reason in REASONS if self.masked[reason]}
        self._new_row.clear()
        return row

    # ---- data.json

    def state(self) -> dict[str, Any]:
        """What goes into data.json: as of the last agreement, the same on all ranks."""
        return {
            "digest": f"{self.digest:016x}",
            "digest_from": self.digest_from,
            "masked": dict(sorted(self.masked.items())),
            "masked_since_row": dict(sorted((+self._new_row).items())),
            "quarantine": [[shard, *facts] for shard, facts in sorted(self.quarantine.items())],
        }

    def load(self, stored: Mapping[str, Any], same_shards: bool = True) -> None:
        """Go on from data.json; one of an older program has no digest: that begins where it ends."""
        self._samples = stored["samples"]
        self.digest = int(stored.get("digest", "0"), 16)
        self.digest_from = stored.get("digest_from", self._samples)
        self.masked = Counter(stored.get("masked", {}))
        self._new_row = Counter(stored.get("masked_since_row", {}))
        self.quarantine.clear()  # the dict itself is with the loader
        if same_shards:
            self.quarantine |= {shard: (reason, n) for shard, reason, n in stored.get("quarantine", [])}
