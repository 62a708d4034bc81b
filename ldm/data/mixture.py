"""Several data sets in one run, by weight: a fixed pattern of lanes says which set plays at each place.

Each set is a `Stream` of its own with its share of the lanes, so it has its own endless epochs and its own
size of block, and a block is still played by one lane, hence read by one worker.

L lanes of all sets together, l those of one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ldm.data.index import Index
from ldm.data.plan import Ints, Stream, Where, plan_constants
from ldm.data.selection import Selection
from ldm.errors import InputError

SETTINGS = ("shards", "weight", "name", "filters", "columns")  # of a data set in data.mix


@dataclass
class Source:
    """One data set: its index, what is used of it, and its weight among the others."""

    index: Index
    selection: Selection
    weight: float = 1.0
    name: str = "data.shards"

    def __len__(self) -> int:
        return len(self.selection)


def checked(mix: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The data sets of `data.mix`, less what is null there. Raises `InputError`."""
    if not mix:
        raise InputError("data.mix", "no data set given", "give a list of {shards: ..., weight: ...}")
    for i, entry in enumerate(mix):
        for name in entry:
            if name not in SETTINGS:
                raise InputError(f"data.mix[{i}].{name}", "unknown", f"one of {', '.join(SETTINGS)}")
        if not entry.get("shards"):
            raise InputError(f"data.mix[{i}].shards", "no shards given", "a folder, glob, brace list or list")
        if not float(entry.get("weight", 1.0)) > 0:
            raise InputError(f"data.mix[{i}].weight", f"expected above 0, got {entry['weight']}")
    return [{name: value for name, value in entry.items() if value is not None} for entry in mix]


def shares(weights: Sequence[float], lanes: int) -> list[int]:
    """Whole lanes of each set, at least one; what rounding leaves goes to the largest."""
    share = np.maximum(1, np.asarray(weights) / np.sum(weights) * lanes).astype(int)
    share[share.argmax()] += lanes - share.sum()
    if share.min() < 1:
        raise ValueError(f"{len(share)} data sets do not fit into {lanes} lanes")
    return [int(count) for count in share]


class Mixture:
    """Of every sum(lanes) consecutive places each stream plays as many as it has lanes, evenly spread."""

    def __init__(self, streams: Sequence[Stream]) -> None:
        self.streams, share = list(streams), [stream.lanes for stream in streams]
        self.lanes = sum(share)
        offset = [(d / len(share) + 1) / 2 for d in range(len(share))]  # no two sets at the same time
        times = [(np.arange(count) + o) / count for count, o in zip(share, offset, strict=True)]
        order = np.argsort(np.concatenate(times), kind="stable")
        self.owner = np.repeat(np.arange(len(share)), share)[order]  # [L] the stream of a lane
        self.rank = np.concatenate([np.arange(count) for count in share])[order]  # [L] and its lane there

    @property
    def shares(self) -> list[float]:
        """Of what is played, how much comes from each stream."""
        return [stream.lanes / self.lanes for stream in self.streams]

    @property
    def constants(self) -> tuple[list[int], list[int]]:
        """Lanes and block of each stream: what a checkpoint stores."""
        return [stream.lanes for stream in self.streams], [stream.block for stream in self.streams]

    def _own(self, n: Ints) -> list[tuple[Stream, NDArray[np.bool_], Ints]]:
        """Which of n each stream plays, and which places of its own those are."""
        turn, lane = np.divmod(np.asarray(n, np.int64), self.lanes)
        masks = [self.owner[lane] == d for d in range(len(self.streams))]
        return [
            (stream, mask, turn[mask] * stream.lanes + self.rank[lane[mask]])
            for stream, mask in zip(self.streams, masks, strict=True)
        ]

    def places(self, n: Ints) -> Where:
        out = np.empty((3, len(n)), np.int64)
        for stream, mask, own in self._own(n):
            out[:, mask] = stream.places(own)
        return Where(*out)

    def blocks_at(self, n: Ints) -> tuple[Ints, Ints]:
        out = np.empty((2, len(n)), np.int64)
        for stream, mask, own in self._own(n):
            out[:, mask] = stream.blocks_at(own)
        return out[0], out[1]

    def look_up(self, tables: Sequence[NDArray[Any]], first: int, count: int) -> NDArray[Any]:
        start, end = first // self.lanes, -(-(first + count) // self.lanes)
        out = np.empty((end - start, self.lanes), tables[0].dtype)
        for d, stream in enumerate(self.streams):
            own = stream.look_up(tables, start * stream.lanes, (end - start) * stream.lanes)
            out[:, self.owner == d] = own.reshape(-1, stream.lanes)
        at = first - start * self.lanes
        return out.ravel()[at : at + count]


Constants = tuple[int, int] | tuple[list[int], list[int]]


def deal(sources: Sequence[Source], batch: int, seed: int, constants: Constants | None) -> Stream | Mixture:
    """The plan of one data set or several, with lanes and blocks of its own or those of a checkpoint."""
    if len(sources) == 1:
        lanes, block = constants or plan_constants(len(sources[0]), sources[0].index.mean_bytes, batch)
        return Stream(sources[0].selection.counts, lanes, block, seed)  # type: ignore[arg-type]
    if constants is None:
        total, _ = plan_constants(1, 1, batch)
        counts = shares([source.weight for source in sources], total)
        sizes = [(len(s), s.index.mean_bytes, batch, lanes) for s, lanes in zip(sources, counts, strict=True)]
        constants = counts, [plan_constants(*size)[1] for size in sizes]
    streams = [
        Stream(source.selection.counts, lanes, block, seed, d)
        for d, (source, lanes, block) in enumerate(zip(sources, *constants, strict=True))  # type: ignore[arg-type]
    ]
    return Mixture(streams)
