"""Buckets that lie apart on disk: one stream each, and every step is the turn of one of them.

In a pass each bucket has as many turns as batches, at least one, in a keyed random order over the whole
pass; between its turns a stream stands still. So blocks stay whole and with the worker that reads them, as
without buckets (`Regroup`, for pictures that lie in any order, plays the samples of a block by many workers).

G global batch, k buckets, n place in the run.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ldm.data.mixture import Constants, Source
from ldm.data.plan import MIN_LANES, Ints, Stream, Where, mix, plan_constants


class Turns:
    """Which bucket plays in a step, and its stream's place for each n."""

    def __init__(self, streams: Sequence[Stream], batch: int) -> None:
        if len(streams) > 255:
            raise ValueError(f"{len(streams)} buckets, and at most 255 can take turns")
        self.streams, self.batch = list(streams), batch
        sizes = np.array([stream.size for stream in streams])
        self.quota = np.maximum(1, np.rint(sizes / batch)).astype(np.int64)  # turns of each bucket in a pass
        self.steps = int(self.quota.sum())
        self.passes: dict[int, tuple[NDArray[np.uint8], NDArray[np.int32]]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"passes": {}}

    @property
    def lanes(self) -> int:
        return sum(stream.lanes for stream in self.streams)

    @property
    def shares(self) -> list[float]:
        """Of what is played, how much comes from each bucket."""
        return [float(share) for share in self.quota / self.steps]

    @property
    def repeats(self) -> list[float]:
        """How often a pass plays a sample of each bucket: about once, but one turn fills a batch."""
        return [
            float(quota) * self.batch / stream.size
            for quota, stream in zip(self.quota, self.streams, strict=True)
        ]

    @property
    def constants(self) -> tuple[list[int], list[int]]:
        """Lanes and block of each stream: what a checkpoint stores."""
        return [stream.lanes for stream in self.streams], [stream.block for stream in self.streams]

    def bucket(self, step: int) -> int:
        """The bucket that all samples of a step belong to."""
        return self.turn(step)[0]

    def turn(self, step: int) -> tuple[int, int]:
        """Bucket of a step, and how many turns it had before."""
        number, i = divmod(step, self.steps)
        order, rank = self._pass(number)
        bucket = int(order[i])
        return bucket, number * int(self.quota[bucket]) + int(rank[i])

    def places(self, n: Ints) -> Where:
        step, slot = np.divmod(np.asarray(n, np.int64), self.batch)
        out = np.empty((3, len(step)), np.int64)
        for s in np.unique(step).tolist():
            bucket, turn = self.turn(s)
            out[:, step == s] = self.streams[bucket].places(turn * self.batch + slot[step == s])
        return Where(*out)

    def _pass(self, number: int) -> tuple[NDArray[np.uint8], NDArray[np.int32]]:
        """Bucket of each step of a pass, and which of the bucket's turns it is."""
        if number not in self.passes:
            key = mix(self.streams[0].seed, len(self.streams), 4, number, np.arange(self.steps))
            order = np.repeat(np.arange(len(self.quota), dtype=np.uint8), self.quota)
            order = order[np.argsort(key, kind="stable")]
            rank = np.empty(self.steps, np.int32)
            rank[np.argsort(order, kind="stable")] = np.concatenate([np.arange(q) for q in self.quota])
            while len(self.passes) > 1:  # with samples read ahead two passes may be asked for in turn
                del self.passes[next(iter(self.passes))]
            self.passes[number] = order, rank
        return self.passes[number]


def turns(sources: Sequence[Source], batch: int, seed: int, constants: Constants | None) -> Turns:
    """The plan of sources that are a bucket each, with lanes and blocks of its own or those of a checkpoint.

    All buckets together have as many lanes as one set, if the batch allows: the open blocks of all are held.
    """
    if constants is None:
        lanes = batch * -(-MIN_LANES // (batch * len(sources)))
        pairs = [plan_constants(len(source), source.index.mean_bytes, batch, lanes) for source in sources]
        constants = [lanes for lanes, _ in pairs], [block for _, block in pairs]
    streams = [
        Stream(source.selection.counts, lanes, block, seed, d)
        for d, (source, lanes, block) in enumerate(zip(sources, *constants, strict=True))  # type: ignore[arg-type]
    ]
    return Turns(streams, batch)
