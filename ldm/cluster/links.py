"""How fast ranks talk: an all-reduce of all of them, and a message from hand to hand around a ring.

The bus bandwidth of an all-reduce over n ranks, 2 (n - 1) / n * bytes / seconds, is what the slowest link
carries, so that it does not depend on n (nccl-tests, PERFORMANCE.md).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from ldm.cluster.probes import synchronize

REPEATS = 3  # the fastest counts


def bus_bandwidth(ranks: int, size: int, seconds: float) -> float:
    """Bytes a second, of an all-reduce of `size` bytes."""
    return 2 * (ranks - 1) / ranks * size / seconds


def rounds(count: int) -> list[list[tuple[int, int]]]:
    """The links of a ring of `count` members, in turns in which nobody has two of them."""
    links = [(i, (i + 1) % count) for i in range(count if count > 2 else count - 1)]
    even, odd = links[: count - count % 2 : 2], links[1::2]
    return [turn for turn in (even, odd, links[-1:] if count % 2 and count > 1 else []) if turn]


def members(hosts: Sequence[str]) -> list[int]:
    """Who is in the ring: the first rank of each host; on one host all ranks."""
    first = [i for i, host in enumerate(hosts) if host not in hosts[:i]]
    return first if len(first) > 1 else list(range(len(hosts)))


def all_reduce_seconds(size: int, device: torch.device) -> float:
    """Of `size` bytes of float32 over the default group; the fastest of some, after one that connects."""
    x = torch.ones(size // 4, device=device)
    times = []
    for _ in range(REPEATS + 1):
        dist.barrier()
        synchronize(device)
        began = time.perf_counter()
        dist.all_reduce(x)
        synchronize(device)
        times.append(time.perf_counter() - began)
        x.fill_(1.0)
    return min(times[1:])


def ring_seconds(size: int, device: torch.device, ring: Sequence[int]) -> dict[str, float]:
    """Seconds of a one-way message on each link that this rank begins: `a-b` by rank. All ranks call it."""
    me, found = dist.get_rank(), {}
    x = torch.ones(size // 4, device=device)
    for turn in rounds(len(ring)):
        dist.barrier()
        for a, b in ((ring[i], ring[j]) for i, j in turn):
            if me in (a, b):
                seconds = exchange_seconds(x, b if me == a else a, me == a)
                if me == a:
                    found[f"{a}-{b}"] = seconds
    dist.barrier()
    return found


def exchange_seconds(x: torch.Tensor, peer: int, first: bool) -> float:
    """Half of a message there and one back; the fastest of some, after one that connects."""
    times: list[float] = []
    steps: list[Any] = [dist.send, dist.recv] if first else [dist.recv, dist.send]
    for _ in range(REPEATS + 1):
        synchronize(x.device)
        began = time.perf_counter()
        for step in steps:
            step(x, peer)
        synchronize(x.device)
        times.append(time.perf_counter() - began)
    return min(times[1:]) / 2
