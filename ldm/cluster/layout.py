"""A start of thousands of ranks, on one core: who plays which sample, what each node opens, when all run.

The data's side is the loader's own code (plan, shares, workers) on shards that are only counted. The clock's
side is a simulation of nodes that share a file system and a rendezvous.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ldm.data.loader import Share
from ldm.data.plan import Ints, Stream, plan_constants
from ldm.data.stages import Places
from ldm.errors import InputError

SHARDS, PER_SHARD = 231_349, 8_000  # laion2B-en at 384 px: shards, and about how many samples each has


@dataclass(frozen=True)
class Dealt:
    """What some steps of all ranks were found to play."""

    ranks: int
    nodes: int
    steps: int
    samples: int
    per_rank: tuple[int, int]  # fewest and most samples of a rank and step
    shards_of_a_node: tuple[int, int]  # fewest and most opened in these steps
    shards_of_a_rank: tuple[int, int]

    def lines(self) -> list[str]:
        low, high = self.per_rank
        each = f"{low:,}" if low == high else f"{low:,} to {high:,}"
        return [
            f"{self.steps:,} steps of {self.ranks:,} ranks on {self.nodes:,} nodes: "
            f"{self.samples:,} samples, each played by exactly one rank and worker",
            f"{each} samples a rank and step; {self.shards_of_a_rank[0]:,} to {self.shards_of_a_rank[1]:,} "
            f"shards a rank, {self.shards_of_a_node[0]:,} to {self.shards_of_a_node[1]:,} a node",
        ]


def deal(
    ranks: int,
    per_node: int,
    global_batch_size: int,
    accumulate: int = 1,
    workers: int = 8,
    steps: int = 4,
    start: int = 0,
    counts: Ints | None = None,
    mean_bytes: float = 50e3,
) -> Dealt:
    """Let every worker of every rank say what it plays in `steps` steps after `start` samples.

    Raises RuntimeError if a place of the run is left out or played twice, or a sample twice in an epoch.
    """
    if global_batch_size % (ranks * accumulate):
        unit = ranks * accumulate
        lower = global_batch_size // unit * unit
        what = f"not divisible by ranks*accumulate = {ranks}*{accumulate} = {unit}"
        nearest = ", ".join(str(n) for n in (lower, lower + unit) if n)
        raise InputError(f"data.global_batch_size={global_batch_size}", what, f"nearest: {nearest}")
    counts = np.full(SHARDS, PER_SHARD, np.int64) if counts is None else counts
    plan = Stream(counts, *plan_constants(int(counts.sum()), mean_bytes, global_batch_size))
    places, sizes = [], np.empty((ranks, steps), np.int64)
    for rank in range(ranks):
        share = Share(global_batch_size, rank, ranks, accumulate, workers)
        # a worker yields one part for each micro-batch of each step
        parts = [list(Places(share, start, steps).of(worker)) for worker in range(max(1, workers))]
        own = [np.concatenate([part[i] for part in parts]) for i in range(steps * accumulate)]
        sizes[rank] = np.array([len(piece) for piece in own]).reshape(steps, accumulate).sum(1)
        places.append(np.concatenate(own))
    played = np.concatenate(places)
    wanted = np.arange(start, start + steps * global_batch_size)
    if not np.array_equal(np.sort(played), wanted):
        raise RuntimeError(f"{ranks} ranks do not play each place of {steps} steps once")
    _, epoch, shard, inside = plan(played)
    sample = plan.cumulative[shard] + inside
    if len(np.unique(epoch * plan.size + sample)) != len(played):
        raise RuntimeError("a sample comes twice in an epoch")
    owner = np.repeat(np.arange(ranks), sizes.sum(1))
    return Dealt(
        ranks,
        -(-ranks // per_node),
        steps,
        len(played),
        (int(sizes.min()), int(sizes.max())),
        opened(owner // per_node, shard),
        opened(owner, shard),
    )


def opened(owner: Ints, shard: Ints) -> tuple[int, int]:
    """Fewest and most different shards of an owner."""
    pairs = np.unique(np.stack([owner, shard]), axis=1)
    found = np.bincount(pairs[0])
    return int(found.min()), int(found.max())


# ---- the clock ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Startup:
    """What a start does, in bytes and seconds; the defaults are assumptions, not measurements."""

    launch: float = 20.0  # seconds within which the scheduler starts the last node's processes
    program: float = 5e9  # bytes of Python, torch and CUDA libraries that a node reads
    imports: float = 15.0  # seconds a rank takes to import them, once read
    connections: float = 2000.0  # a second that the rendezvous on rank 0 takes in
    communicator: float = 2e-3  # seconds a rank adds to the start of the collectives
    warm_up: float = 60.0  # seconds from the collectives to the first step: kernels, first batches
    node_rate: float = 5e9  # bytes/s of a node from the file system
    shared_rate: float = 50e9  # bytes/s of the file system, for all


@dataclass(frozen=True)
class Started:
    """Seconds after the start at which the last node was through each part."""

    launched: float
    imported: float
    met: float
    read: float
    first_step: float

    def line(self) -> str:
        named = {"launched": self.launched, "imported": self.imported, "met": self.met, "read": self.read}
        told = ", ".join(f"{name} {seconds:,.0f} s" for name, seconds in named.items())
        return f"{told}, first step {self.first_step:,.0f} s"


def start_up(
    nodes: int, per_node: int, checkpoint: float, index: float, how: Startup, seed: int = 0
) -> Started:
    """Play a start: `checkpoint` and `index` are bytes that each node reads, once for all its ranks."""
    rng = np.random.default_rng(seed)
    launched = rng.uniform(0, how.launch, nodes)
    imported = shared_reads(launched, how.program, how.node_rate, how.shared_rate) + how.imports
    arriving = np.sort(np.repeat(imported, per_node))
    met = float(queue(arriving, 1 / how.connections)[-1]) + how.communicator * nodes * per_node
    ready = np.full(nodes, met)
    read = shared_reads(ready, checkpoint + index, how.node_rate, how.shared_rate)
    last = float(read.max())
    return Started(float(launched.max()), float(imported.max()), met, last, last + how.warm_up)


def queue(arrivals: np.ndarray, service: float) -> np.ndarray:
    """When each of sorted arrivals is done at a server that takes them one by one."""
    order = np.arange(1, len(arrivals) + 1)
    return np.maximum.accumulate(arrivals - (order - 1) * service) + order * service


def shared_reads(arrivals: np.ndarray, size: float, node_rate: float, shared_rate: float) -> np.ndarray:
    """When each node has read `size` bytes, the file system's rate being shared evenly by those that read."""
    order = np.argsort(arrivals, kind="stable")
    done = np.empty(len(arrivals))
    now, progress, head, tail = 0.0, 0.0, 0, 0  # bytes that each reader has had since the start of time
    marks: list[float] = []  # the progress at which each reader, in order of arrival, is done
    while tail < len(order):
        active = head - tail
        rate = min(node_rate, shared_rate / active) if active else 0.0
        arrival = arrivals[order[head]] if head < len(order) else np.inf
        end = now + (marks[tail] - progress) / rate if active else np.inf
        step_to = min(arrival, end)
        progress += rate * (step_to - now)
        now = step_to
        if end <= arrival:
            done[order[tail]], progress = now, marks[tail]
            tail += 1
        else:
            marks.append(progress + size)
            head += 1
    return done
