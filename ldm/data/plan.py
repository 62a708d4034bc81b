"""Which sample is the n-th of the run? A pure function of integers.

It knows no rank, worker, batch size, file or saved state, so the state of the data is the one integer n.
Blocks of neighbouring samples (one read each) are dealt in a keyed random order to lanes; a lane plays its
block in random order, one sample a turn. The stream is endless and has no epoch edge: every sample comes at
most once an epoch, the (size mod block) that sit out differ by epoch. The hash is our own, because numpy
promises its random streams only for one build.

After a roll-back a run may leap over places: what it consumed is then counted without them.

N samples, B block, L lanes, n place in the run, b length of a vector of n, D deals of L blocks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, overload

import numpy as np
from numpy.typing import NDArray

PLAN_VERSION = 1  # raise it whenever a golden value of tests/data/test_plan.py changes
READ_BYTES = 2 << 20  # a block is about one efficient read
MIN_LANES = 1024
ROUNDS = 8  # pairs of Feistel rounds; four are visibly biased below 20 elements

CHUNK = 1 << 20  # places looked up at once

Ints = NDArray[np.int64]
U64 = np.uint64
Window = tuple[int, int]  # places n from the first until before the second


class Where(NamedTuple):
    """Which sample: int64 [b] each; place counts the samples of a source in their order, -1: none."""

    source: Ints
    epoch: Ints
    place: Ints


class Plan(Protocol):
    """What is played at each place of a run."""

    def places(self, n: Ints) -> Where: ...


class Dealt(Plan, Protocol):
    """A plan that deals blocks to lanes: places n and n + lanes play the same block, up to its end."""

    lanes: int

    def blocks_at(self, n: Ints) -> tuple[Ints, Ints]:
        """How many samples of its block were played before each n, and how many it has: int64 [b] both."""

    def look_up(self, tables: Sequence[NDArray[Any]], first: int, count: int) -> NDArray[Any]:
        """`tables[source][place]` of count places from `first` on; quicker than by `places`."""


def mix(*words: int | Ints) -> Ints:
    """Hash integers, or arrays of them elementwise, to 64 bits: one splitmix64 round a word."""
    h = np.zeros(1, U64)  # never 0-d: numpy warns about the overflow of scalars
    for word in words:
        h = (h ^ np.asarray(word, np.int64).astype(U64)) + U64(0x9E3779B97F4A7C15)
        h = (h ^ (h >> U64(30))) * U64(0xBF58476D1CE4E5B9)
        h = (h ^ (h >> U64(27))) * U64(0x94D049BB133111EB)
        h = h ^ (h >> U64(31))
    return h.view(np.int64)  # int64 with uint64 would silently become float64


def draw(size: int, *words: int | Ints) -> Ints:
    """Hash to range(size)."""
    return (mix(*words).view(U64) % U64(size)).astype(np.int64)


def shuffle(i: Ints, size: int, *words: int | Ints) -> Ints:
    """Where a keyed permutation of range(size) sends each i: no table, any size.

    A Feistel network on an a x b grid that covers the range, walked again from outside until it lands inside.
    """
    a = math.isqrt(size - 1) + 1
    b = -(-size // a)
    key = np.broadcast_to(mix(*words), i.shape)
    out, todo = i.copy(), np.arange(i.size)
    while todo.size:
        y, x = np.divmod(out[todo], a)
        k = key[todo]
        for r in range(0, 2 * ROUNDS, 2):
            x = (x + draw(a, k ^ (2 * ROUNDS * y + r))) % a
            y = (y + draw(b, k ^ (2 * ROUNDS * x + r + 1))) % b
        out[todo] = y * a + x
        todo = todo[out[todo] >= size]
    return out


def power_of_two(limit: int) -> int:
    """Largest power of two that is at most `limit`, at least 1."""
    return 1 << max(1, limit).bit_length() - 1


def plan_constants(
    size: int, mean_bytes: float, global_batch_size: int, lanes: int | None = None
) -> tuple[int, int]:
    """Lanes, if they are not given, and block of a new run; store them, later calls may give others.

    Lanes are a multiple of the global batch, so that a block is always played by the same slot of a step,
    hence read by one worker; a block is at most 2 MiB and the open blocks at most a sixteenth of the data.
    """
    if lanes is None:
        lanes = global_batch_size * -(-MIN_LANES // global_batch_size)
    return lanes, power_of_two(min(int(READ_BYTES / max(mean_bytes, 1.0)), size // (16 * lanes)))


class Stream:
    """Blocks of the samples of one source, shards of `counts` samples, endlessly.

    The block is capped at N / (16 L) and rounded down to a power of two; `lanes` and `block` hold the values
    in use, and giving those back makes the same stream.
    """

    def __init__(
        self, counts: Sequence[int] | Ints, lanes: int, block: int, seed: int = 0, source: int = 0
    ) -> None:
        self.cumulative: Ints = np.concatenate([[0], np.cumsum(np.asarray(counts, np.int64))])
        self.size = int(self.cumulative[-1])
        if self.size < 1:
            raise ValueError(f"a stream needs at least one sample, got {self.size} in {len(counts)} shards")
        self.lanes, self.seed, self.source = lanes, seed, source
        self.block = power_of_two(min(block, self.size // (16 * lanes)))
        self.blocks = self.size // self.block

    @property
    def constants(self) -> tuple[int, int]:
        """Lanes and block: what a checkpoint stores."""
        return self.lanes, self.block

    def places(self, n: Ints) -> Where:
        turn, lane = np.divmod(np.asarray(n, np.int64), self.lanes)
        epoch, place = self._played(turn // self.block * self.lanes + lane, turn)
        return Where(np.full_like(place, self.source), epoch, place)

    def _played(self, q: Ints, turn: Ints) -> tuple[Ints, Ints]:
        """Epoch, like q, and place of the sample that the q-th block of the deal plays at a turn."""
        key = (self.seed, self.source)
        epoch, i = np.divmod(q, self.blocks)
        h = mix(*key, 1, q)  # order inside the block: an odd step from any start
        inside = (turn * (h | 1) + (h >> 32)) & (self.block - 1)  # modulo a power of two, quicker
        first = shuffle(i.ravel(), self.blocks, *key, 2, epoch.ravel()).reshape(q.shape) * self.block
        place = (first + draw(self.size, *key, 3, epoch)) + inside
        np.subtract(place, self.size, out=place, where=place >= self.size)
        return epoch, place

    def epochs(self, n: Ints) -> Ints:
        """How often the sample of each n was dealt before: int64 [b]."""
        turn, lane = np.divmod(np.asarray(n, np.int64), self.lanes)
        return (turn // self.block * self.lanes + lane) // self.blocks

    def __call__(self, n: Ints) -> Ints:
        """Rows source, epoch, shard, index in the shard: int64 [4, b]."""
        source, epoch, place = self.places(n)
        shard = np.searchsorted(self.cumulative, place, side="right") - 1
        return np.stack([source, epoch, shard, place - self.cumulative[shard]])

    def blocks_at(self, n: Ints) -> tuple[Ints, Ints]:
        offset = np.asarray(n, np.int64) // self.lanes % self.block
        return offset, np.full_like(offset, self.block)

    def look_up(self, tables: Sequence[NDArray[Any]], first: int, count: int) -> NDArray[Any]:
        table, deal = tables[self.source], self.lanes * self.block
        out = np.empty(count, table.dtype)
        lanes, turns = np.arange(self.lanes), np.arange(self.block).reshape(1, -1, 1)
        end, step = -(-(first + count) // deal), max(1, CHUNK // deal)
        for start in range(first // deal, end, step):
            deals = np.arange(start, min(end, start + step)).reshape(-1, 1, 1)
            place = self._played(deals * self.lanes + lanes, deals * self.block + turns)[1]  # [D B L]
            at = start * deal - first
            piece = place.ravel()[max(0, -at) : count - at]
            out[max(0, at) : max(0, at) + len(piece)] = table[piece]
        return out


class Walk:
    """Each sample of several sources once, in order; what comes after the end is nothing."""

    def __init__(self, counts: Sequence[int]) -> None:
        self.cumulative: Ints = np.concatenate([[0], np.cumsum(np.asarray(counts, np.int64))])

    def places(self, n: Ints) -> Where:
        source = np.searchsorted(self.cumulative, n, side="right") - 1
        inside = source < len(self.cumulative) - 1
        source = np.where(inside, source, 0)
        return Where(source, np.zeros_like(source), np.where(inside, n - self.cumulative[source], -1))


# ---- places that a run leaps over


def merged(windows: Sequence[Window]) -> list[Window]:
    """The same places as windows that are sorted, apart and not empty."""
    out: list[Window] = []
    for first, end in sorted(windows):
        if out and first <= out[-1][1]:
            out[-1] = out[-1][0], max(end, out[-1][1])
        elif end > first:
            out.append((first, end))
    return out


@overload
def skipped(consumed: int, windows: Sequence[Window]) -> int: ...
@overload
def skipped(consumed: Ints, windows: Sequence[Window]) -> Ints: ...
def skipped(consumed: int | Ints, windows: Sequence[Window]) -> int | Ints:
    """The place n of a run that consumed so many samples and leaps over windows of places."""
    for first, end in merged(windows):
        consumed = consumed + (end - first) * (consumed >= first)
    return consumed


def consumed(n: int, windows: Sequence[Window]) -> int:
    """How many samples a run has consumed when it comes to place n: the inverse of `skipped`."""
    return n - sum(max(0, min(n, end) - first) for first, end in merged(windows))
