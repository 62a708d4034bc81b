"""Which sample is the n-th of the run? A pure function of integers.

It knows no rank, worker, batch size, file or saved state, so the state of the data is the one integer n.
Blocks of neighbouring samples (one read each) are dealt in a keyed random order to lanes; a lane plays its
block in random order, one sample a turn. The stream is endless and has no epoch edge: every sample comes at
most once an epoch, the (size mod block) that sit out differ by epoch. The hash is our own, because numpy
promises its random streams only for one build.

N samples, B block, L lanes, n place in the run, b length of a vector of n.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

PLAN_VERSION = 1  # raise it whenever a golden value of tests/data/test_plan.py changes
READ_BYTES = 2 << 20  # a block is about one efficient read
MIN_LANES = 1024
ROUNDS = 8  # pairs of Feistel rounds; four are visibly biased below 20 elements

Ints = NDArray[np.int64]
U64 = np.uint64


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


def plan_constants(size: int, mean_bytes: float, global_batch_size: int) -> tuple[int, int]:
    """Lanes and block of a new run; store them, later calls may give others.

    Lanes are a multiple of the global batch, so that a block is always played by the same slot of a step,
    hence read by one worker; a block is at most 2 MiB and the open blocks at most a sixteenth of the data.
    """
    lanes = global_batch_size * -(-MIN_LANES // global_batch_size)
    return lanes, power_of_two(min(int(READ_BYTES / max(mean_bytes, 1.0)), size // (16 * lanes)))


class Stream:
    """n -> (source, epoch, shard, index) over shards of `counts` samples, endlessly.

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

    def places(self, n: Ints) -> tuple[Ints, Ints]:
        """Epoch, and place in the concatenation of all shards, of each n: int64 [b] both."""
        key = (self.seed, self.source)
        turn, lane = np.divmod(np.asarray(n, np.int64), self.lanes)
        q = turn // self.block * self.lanes + lane  # the q-th block of the endless deal
        epoch, i = np.divmod(q, self.blocks)
        h = mix(*key, 1, q)  # order inside the block: an odd step from any start
        inside = (turn * (h | 1) + (h >> 32)) % self.block
        place = shuffle(i, self.blocks, *key, 2, epoch) * self.block + inside
        rotation = draw(self.size, *key, 3, epoch)
        return epoch, (place + rotation) % self.size

    def __call__(self, n: Ints) -> Ints:
        """Rows source, epoch, shard, index in the shard: int64 [4, b]."""
        epoch, place = self.places(n)
        shard = np.searchsorted(self.cumulative, place, side="right") - 1
        return np.stack([np.full_like(place, self.source), epoch, shard, place - self.cumulative[shard]])

    def offset(self, n: Ints) -> Ints:
        """How many samples of its block were played before n: int64 [b], 0 at the first."""
        return np.asarray(n, np.int64) // self.lanes % self.block

    def rest_of_block(self, n: int) -> Ints:
        """n and the later places in the run that play the same block."""
        left = self.block - int(self.offset(np.array([n]))[0])
        return n + self.lanes * np.arange(left, dtype=np.int64)
