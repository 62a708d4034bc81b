"""The shapes of batches: pictures of many aspect ratios in buckets of one height and width each.

The bucket of a sample follows from the size of its stored picture, which the index knows: the largest
resolution that it fills without being enlarged, there the nearest aspect ratio. Numbers of buckets are kept
beside the index, one byte a sample; buckets that too few samples would fill are merged afterwards, over all
sources.

N samples of a source, k buckets; ratio = width / height.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ldm.data.mixture import Source
from ldm.data.parts import mapped, replace
from ldm.errors import InputError

FEWEST = 20  # of a period's steps, for a bucket of its own
MOST = 255  # numbers of buckets are bytes
CHUNK = 1 << 20  # samples sorted into buckets at once
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Buckets:
    """Which shapes there are; units in configs/data/shards.yaml."""

    resolutions: Sequence[int] = ()
    step: int = 64
    max_ratio: float = 2.0
    min_share: float | None = None
    period: int = 4096
    enlarge: float = 1.0

    def __post_init__(self) -> None:
        least = {"step": 1, "max_ratio": 1, "period": 2, "enlarge": 1, "min_share": 0}
        for name, low in least.items():
            value = getattr(self, name)
            if value is not None and not value >= low:
                raise InputError(f"data.buckets.{name}", f"expected at least {low}, got {value}")
        if self.min_share is not None and self.min_share > 1:
            raise InputError(
                "data.buckets.min_share", f"expected a share within 0 and 1, got {self.min_share}"
            )
        for side in self.resolutions:
            if side < self.step or side % self.step:
                what = f"{side} is not a multiple of data.buckets.step={self.step}"
                raise InputError("data.buckets.resolutions", what, f"nearest: {_nearest(side, self.step)}")
        if len(self.shapes()) > MOST:
            fix = "raise data.buckets.step, or lower max_ratio"
            raise InputError("data.buckets", f"{len(self.shapes())} shapes, at most {MOST}", fix)

    @staticmethod
    def of(given: Mapping[str, Any], image_size: int) -> Buckets:
        """From the config; raises `InputError` for a name that there is not."""
        names = [field.name for field in fields(Buckets)]
        for name in given:
            if name not in names:
                raise InputError(f"data.buckets.{name}", "unknown", f"one of {', '.join(names)}")
        sides = given.get("resolutions") or [image_size]
        return Buckets(**{**given, "resolutions": tuple(map(int, sides))})

    def shapes(self) -> NDArray[np.int64]:
        """Height, width [k 2]: the largest resolution first, then by ratio."""
        return np.concatenate([np.zeros((0, 2), np.int64), *self.grid()])

    def grid(self) -> list[NDArray[np.int64]]:
        """The shapes of each resolution: each long side in steps, with the longest short side that it allows.

        None has more pixels than the square of its resolution.
        """
        grid = []
        for side in sorted(set(self.resolutions), reverse=True):
            pairs: set[tuple[int, int]] = set()
            for long in range(side, int(side * self.max_ratio) + 1, self.step):
                short = side * side // long // self.step * self.step
                if short and long <= self.max_ratio * short:
                    pairs |= {(long, short), (short, long)}
            grid.append(np.array(sorted(pairs, key=lambda pair: pair[1] / pair[0]), np.int64))
        return grid

    def assign(self, width: NDArray[Any], height: NDArray[Any]) -> NDArray[np.uint8]:
        """The bucket of each picture of these sizes: a row of `shapes`."""
        out, todo = np.zeros(len(width), np.uint8), np.ones(len(width), bool)
        ratio, first = np.log(width / height), 0
        for shapes in self.grid():
            ratios = np.log(shapes[:, 1] / shapes[:, 0])
            best = np.searchsorted((ratios[1:] + ratios[:-1]) / 2, ratio)
            out[todo] = (first + best)[todo]  # the smallest resolution takes what fills none
            todo &= cover(width, height, shapes[best]) > self.enlarge
            first += len(shapes)
        return out


def cover(width: NDArray[Any], height: NDArray[Any], shapes: NDArray[np.int64]) -> NDArray[np.float64]:
    """By how much a picture is scaled to cover its shape [N 2]."""
    return np.maximum(shapes[:, 0] / height, shapes[:, 1] / width)


def _nearest(side: int, step: int) -> str:
    return ", ".join(str(m) for m in (side // step * step, (side // step + 1) * step) if m)


class Numbers:
    """The number of a bucket for each sample: memory-mapped where it can be, so that all workers share it."""

    def __init__(self, array: NDArray[np.uint8], path: Path | None = None) -> None:
        self.array, self.path = array, path

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path} | ({} if self.path else {"array": self.array})

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self.path:
            self.array = mapped(self.path)


def numbers(source: Source, buckets: Buckets) -> Numbers:
    """The bucket of each selected sample, from a file beside the index, which is made if need be."""
    facts = f"{source.selection.digest} {buckets.shapes().tolist()} {buckets.enlarge}"
    name = f"buckets-{hashlib.sha256(facts.encode()).hexdigest()[:32]}.npy"
    path = None if source.index.path is None else source.index.path.with_name(name)
    if path is not None and path.exists():
        try:
            return Numbers(mapped(path), path)
        except (ValueError, EOFError, OSError):
            log.warning("%s is damaged: made anew", path)
    found = np.empty(len(source), np.uint8)
    for start in range(0, len(source), CHUNK):
        sizes = source.index.samples[source.selection.rows[start : start + CHUNK]]
        found[start : start + CHUNK] = buckets.assign(sizes["width"], sizes["height"])
    if path is None:
        return Numbers(found)
    try:
        replace(path, lambda file: np.save(file, found))
    except OSError as error:
        log.warning("cannot keep %s (%s): each worker holds a copy", path, error.strerror)
        return Numbers(found)
    return Numbers(mapped(path), path)


@dataclass
class Sorted:
    """All sources in buckets that enough samples fill."""

    shapes: NDArray[np.int64]  # [k 2] height, width
    numbers: list[Numbers]  # of each source, before the merge
    final: NDArray[np.uint8]  # [256] number before the merge -> after it
    counts: NDArray[np.int64]  # [k] samples
    shares: NDArray[np.float64]  # [k] of what is played
    merged: list[str]  # lines for the log


def sort(sources: Sequence[Source], shares: Sequence[float], buckets: Buckets) -> Sorted:
    """Put every sample into a bucket; `shares` are those of the sources in what is played.

    A bucket below min_share (None: 20 / period) goes into the nearest ratio of its own resolution, or else of
    a lower one, or else of a higher one; the smallest first.
    """
    shapes, found = buckets.shapes(), [numbers(source, buckets) for source in sources]
    level = np.repeat(np.arange(len(buckets.grid())), [len(group) for group in buckets.grid()])
    tallies = np.array([tally(n.array, len(shapes)) for n in found])
    counts = tallies.sum(0)
    share = np.asarray(shares) @ (tallies / tallies.sum(1, keepdims=True)) / np.sum(shares)
    least = FEWEST / buckets.period if buckets.min_share is None else buckets.min_share
    into, alive, lines = np.arange(len(shapes)), np.flatnonzero(counts), []
    ratio = np.log(shapes[:, 1] / shapes[:, 0])
    while len(alive) > 1 and share[alive].min() < least:
        small = alive[share[alive].argmin()]
        alive = alive[alive != small]
        away = np.where(level[alive] == level[small], 0, np.where(level[alive] > level[small], 1, 2))
        target = alive[
            np.lexsort((np.abs(ratio[alive] - ratio[small]), np.abs(level[alive] - level[small]), away))[0]
        ]
        names = [f"{w} x {h}" for h, w in shapes[[small, target]].tolist()]
        lines.append(
            f"{counts[small]:,} samples of {names[0]} go to {names[1]}: {share[small]:.2%} are too few"
        )
        counts[target] += counts[small]
        share[target] += share[small]
        into[into == small] = target
    final = np.zeros(256, np.uint8)
    final[: len(shapes)] = np.searchsorted(alive, into)
    final[np.flatnonzero(~np.isin(into, alive))] = 0  # shapes of no sample
    return Sorted(shapes[alive], found, final, counts[alive], share[alive], lines)


def tally(array: NDArray[np.uint8], count: int) -> NDArray[np.int64]:
    pieces = (array[start : start + CHUNK] for start in range(0, len(array), CHUNK))
    return np.sum([np.bincount(piece, minlength=count) for piece in pieces], axis=0)


def report(found: Sorted, sources: Sequence[Source], buckets: Buckets, batch: int) -> list[str]:
    """Lines for the log: the buckets, what the crop takes, what is merged and what a period leaves out.

    Crops are measured on at most a million samples of each source, evenly spread.
    """
    loss, many, enlarged = np.zeros(len(found.shapes)), np.zeros(len(found.shapes)), 0.0
    for source, numbers_of in zip(sources, found.numbers, strict=True):
        at = np.arange(0, len(source), -(-len(source) // CHUNK))
        sizes, bucket = source.index.samples[source.selection.rows[at]], found.final[numbers_of.array[at]]
        shape = found.shapes[bucket]
        ratio = sizes["width"] / sizes["height"] * shape[:, 0] / shape[:, 1]
        loss += np.bincount(bucket, 1 - np.minimum(ratio, 1 / ratio), len(loss))
        many += np.bincount(bucket, minlength=len(many))
        enlarged += float(np.mean(cover(sizes["width"], sizes["height"], shape) > 1)) * source.weight
    enlarged /= sum(source.weight for source in sources)
    loss /= np.maximum(many, 1)
    lines = ["bucket (w x h)       samples    share  cropped away"]
    rows = zip(
        found.shapes.tolist(), found.counts.tolist(), found.shares.tolist(), loss.tolist(), strict=True
    )
    for (height, width), count, share, lost in rows:
        lines.append(f"{f'{width} x {height}':>14}{count:>14,}{share:>9.2%}{lost:>14.2%}")
        if count < batch / 4:
            repeats = f"a batch of {batch} repeats each of them {batch / count:.0f} times"
            log.warning("bucket %d x %d has %d samples: %s", width, height, count, repeats)
    left_out = (len(found.shapes) - 1) / buckets.period
    if left_out > 0.005:
        least = 1 << (200 * (len(found.shapes) - 1) - 1).bit_length()
        log.warning(
            "%.1f %% of samples are left out of a pass: raise data.buckets.period to %d",
            100 * left_out,
            least,
        )
    crop = f"{found.shares @ loss:.2%} of a picture cropped away on average"
    return [
        *lines,
        *found.merged,
        f"{crop}, {enlarged:.2%} enlarged; {left_out:.2%} of samples left out of a pass",
    ]
