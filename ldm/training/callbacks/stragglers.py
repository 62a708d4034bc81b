"""Which rank holds the others up, though all of them end a step together.

The ranks of DDP wait for each other in every backward pass, so their steps take equally long, whoever is
slow. A forward pass waits for nobody. S is the time of a step (the same for all), w_r what rank r waited for
data, f_r its forward pass; with the same network everywhere its own work is w_r + k f_r for one k. Nobody's
is more than S, and the slowest's is S: k = min_r (S - w_r) / f_r.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from statistics import median
from typing import Any

import torch

SLOW = 0.75  # of the fastest rank's speed


class Laps:
    """Marks of one rank's steps: CUDA events, which are waited for when they are read, or the clock's."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.steps: list[list[tuple[Any, Any, Any, Any]]] = []  # of each step its batches' marks
        self._batches: list[tuple[Any, Any, Any, Any]] = []
        self._last = self._start = self._now()
        self._forward: Any = None

    def _now(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _seconds(self, a: Any, b: Any) -> float:
        return a.elapsed_time(b) / 1e3 if self.cuda else b - a

    def batch_starts(self) -> None:
        self._start, self._forward = self._now(), None

    def forward_ends(self) -> None:
        if self._forward is None:  # a second loss of the same batch has its own backward pass
            self._forward = self._now()

    def batch_ends(self, step_ends: bool) -> None:
        end = self._now()
        self._batches.append((self._last, self._start, self._forward or end, end))
        self._last = end
        if step_ends:
            self.steps.append(self._batches)
            self._batches = []

    def take(self) -> tuple[float, float, float]:
        """Medians over the steps since the last call: seconds of a step, its forward passes, its waiting."""
        if self.cuda:
            self._last.synchronize()
        steps, self.steps = self.steps, []
        rows = [
            (
                self._seconds(batches[0][0], batches[-1][3]),
                sum(self._seconds(start, forward) for _, start, forward, _ in batches),
                sum(self._seconds(last, start) for last, start, _, _ in batches),
            )
            for batches in steps
        ]
        whole, forward, wait = (median(column) for column in zip(*rows, strict=True))
        return whole, forward, wait


def own_seconds(ranks: Sequence[Sequence[float]]) -> list[float]:
    """Each rank's own work a step, without waiting for others; of (step, forward, data wait) in seconds."""
    whole = median(step for step, _, _ in ranks)
    factors = [max(whole - wait, 0.0) / forward for _, forward, wait in ranks if forward > 0]
    factor = min(factors, default=0.0)
    return [wait + factor * forward for _, forward, wait in ranks]


def slow_ranks(own: Sequence[float]) -> set[int]:
    """Those whose speed is below `SLOW` of the fastest's."""
    return {rank for rank, seconds in enumerate(own) if min(own) < SLOW * seconds}
