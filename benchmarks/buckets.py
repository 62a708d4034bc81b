"""What reading by blocks costs with buckets, counted and not timed: the reads of one worker of a large run.

`python -m benchmarks.buckets --json benchmarks/results/buckets.json` (a few minutes, 2 GB). Nothing is read:
sizes of pictures are drawn, the plan, the buckets and the worker's reader are those of training, and what the
reader asks for is added up, over a whole period of the buckets.

G global batch.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks import harness
from ldm.data.blocks import BlockReader, InOrder, Ticket, TurnReader
from ldm.data.buckets import Regroup
from ldm.data.loader import Share
from ldm.data.plan import Stream, plan_constants
from ldm.data.shapes import Buckets, Numbers, cover
from ldm.data.turns import turns

BYTES = 250_000  # of a sample: a JPEG of about 1024 px
BUDGET = 512 << 20  # bytes a worker may hold, as data.reading.memory_mb
BUCKETS = Buckets(resolutions=(1024,))


@dataclass(frozen=True)
class Setting:
    """One worker of a run."""

    name: str
    batch: int
    ranks: int
    workers: int
    samples: int
    steps: int | None = None  # None: a period


SETTINGS = (
    Setting("256 GPUs x 8 workers", 2048, 256, 8, 20_000_000),
    Setting("32 GPUs x 8 workers", 2048, 32, 8, 20_000_000),
    Setting("8 GPUs x 8 workers", 512, 8, 8, 10_000_000),
    Setting("1 GPU x 4 workers", 64, 1, 4, 2_000_000),
)
SMALL = (Setting("small", 16, 2, 2, 400_000, 1500),)


@dataclass
class Sized:
    """What a plan asks of a source."""

    index: Any
    selection: Any
    size: int

    def __len__(self) -> int:
        return self.size


class Reads:
    """Counts instead of reading: what `ldm.data.blocks.Reads` is to a worker."""

    def __init__(self) -> None:
        self.sources = [SimpleNamespace(index=SimpleNamespace(mean_bytes=float(BYTES)))]
        self.count = 0
        self.future: Future[list[Any]] = Future()

    def rows(self, at: Any) -> NDArray[np.int64]:
        return np.asarray(at.place)

    def submit(self, at: Any, rows: NDArray[np.int64]) -> list[Ticket]:
        self.count += 1 + int((np.diff(np.sort(rows)) > 1).sum())  # neighbours come together
        return [Ticket(self.future, 0, BYTES)] * len(rows)


def shapes_of(samples: int) -> NDArray[np.uint8]:
    """The bucket of each sample: pictures as a crawl has them, half as cameras and shops make them."""
    rng = np.random.default_rng(0)
    usual = rng.choice([1, 4 / 3, 3 / 2, 3 / 4, 2 / 3, 16 / 9], samples, p=[0.3, 0.2, 0.2, 0.1, 0.1, 0.1])
    free = np.exp(rng.normal(0.1, 0.35, samples))
    ratio = np.where(rng.random(samples) < 0.5, usual, free)
    return BUCKETS.assign(1280 * np.sqrt(ratio), 1280 / np.sqrt(ratio))


def counted(setting: Setting, numbers: NDArray[np.uint8], kind: str) -> list[float]:
    """Bytes read / played, reads a sample, most bytes and blocks held, of worker 0 of rank 0."""
    batch, count = setting.batch, len(BUCKETS.shapes())
    slots = np.array(Share(batch, 0, setting.ranks, 1, setting.workers).slots(0, 0))
    lanes, block = plan_constants(setting.samples, BYTES, batch)
    base = Stream([setting.samples], lanes, block)
    reads: Any = Reads()
    if kind == "sorted":
        sizes = np.bincount(numbers, minlength=count)
        index = SimpleNamespace(mean_bytes=float(BYTES))
        sources: Any = [Sized(index, SimpleNamespace(counts=[size]), int(size)) for size in sizes.tolist()]
        reads.sources = sources
        turned = TurnReader(reads, turns(sources, batch, 0, None), slots.tolist(), BUDGET)
        readers, reader = turned.readers, turned
    else:
        final = np.arange(256, dtype=np.uint8)
        order: Any = InOrder(base, batch)
        if kind == "buckets":
            order = Regroup(base, [Numbers(numbers)], final, count, batch, BUCKETS.period)
        reader = BlockReader(reads, order, slots, BUDGET)
        readers = [reader]
    held = 0
    for step in range(setting.steps or BUCKETS.period - count + 1):
        reader(step * batch + slots)
        held = max(held, sum(own.bytes for own in readers))
    read = sum(own.bytes_read - own.bytes for own in readers)  # what is held is still to be played
    played = sum(own.samples for own in readers)
    return [read / (played * BYTES), reads.count / played, held]


def table(settings: Sequence[Setting]) -> harness.Table:
    cells, values = [], {}
    for setting in settings:
        numbers = shapes_of(setting.samples)
        for kind in ("none", "buckets", "sorted"):
            wasted, reads, held = values[f"{setting.name}, {kind}"] = counted(setting, numbers, kind)
            where = f"{setting.name}, G {setting.batch}"
            cells.append([where, kind, f"{wasted:.2f}", f"{reads:.3f}", f"{held / 1e6:,.0f}"])
    ratio = np.exp(np.random.default_rng(1).normal(0.1, 0.35, 100_000))
    at = BUCKETS.shapes()[BUCKETS.assign(1280 * np.sqrt(ratio), 1280 / np.sqrt(ratio))]
    scale = cover(1280 * np.sqrt(ratio), 1280 / np.sqrt(ratio), at)
    loss = float(np.mean(1 - at.prod(1) / (1280 * scale) ** 2))
    what = (
        f"One worker's reads over a period of {BUCKETS.period:,} steps; {len(BUCKETS.shapes())} shapes of "
        f"1024 x 1024 pixels in steps of 64, samples of {BYTES // 1000} KB, at most {BUDGET >> 20} MB held. "
        "None: squares. Buckets: as they lie, regrouped. Sorted: a cache of buckets. Bytes read count "
        "samples that sit out or are played by another worker."
    )
    notes = [f"Of pictures with ratios exp(normal(0.1, 0.35)) {loss:.2%} is cropped away on average."]
    head = ["worker of", "buckets", "bytes read / played", "reads a sample", "MB held at most"]
    return harness.Table("Buckets: read amplification", what, head, cells, values, notes)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.buckets", description=__doc__)
    parser.add_argument("--json", type=Path, help="write results here, and the table beside it")
    parser.add_argument("--small", action="store_true", help="seconds instead of minutes")
    options = parser.parse_args(arguments)
    results = [table(SMALL if options.small else SETTINGS)]
    harness.report(options.json, harness.facts(["numpy"]), results)


if __name__ == "__main__":
    main()
