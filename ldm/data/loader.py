"""Parts that workers make -> batches, and who makes which slots.

Each worker makes its part of every batch; the loader joins them. Rank and world size are passed in, never
asked of the environment. Workers that die are replaced.

G global batch, W ranks, k micro-batches a step.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from multiprocessing import active_children, set_forkserver_preload
from typing import Any

import numpy as np
import torch
import webdataset as wds
from torch import Tensor
from torch.utils.data import DataLoader, get_worker_info

from ldm.data.makers import Part
from ldm.errors import InputError
from ldm.types import Batch

BY_VALUE = 1 << 20  # bytes of a tensor that a worker sends through the queue
SMALL = 1 << 14  # bytes of an array that is not worth pinned memory
REBUILDS = 3  # of the workers, without a batch in between
LOOK = 0.2  # seconds between looks at the workers where no batch comes
CLOSE = 5.0  # seconds that a worker has to finish its part
OUTLIVE = 60.0  # seconds that a worker goes on after TERM, for its trainer to save
log = logging.getLogger(__name__)


def cut(span: range, i: int, parts: int) -> range:
    """The i-th of `parts` near-equal contiguous pieces of a range."""
    size = len(span)
    return range(span.start + size * i // parts, span.start + size * (i + 1) // parts)


@dataclass(frozen=True)
class Share:
    """Which slots of every global batch belong to whom."""

    global_batch_size: int
    rank: int = 0
    world_size: int = 1
    accumulate: int = 1
    workers: int = 0

    def slots(self, micro: int, worker: int) -> range:
        local = cut(range(self.global_batch_size), self.rank, self.world_size)
        return cut(cut(local, micro, self.accumulate), worker, max(1, self.workers))

    def all_slots(self, worker: int) -> list[int]:
        return [slot for micro in range(self.accumulate) for slot in self.slots(micro, worker)]


def worker_id() -> int:
    info = get_worker_info()
    return 0 if info is None else int(info.id)


def as_is(part: Any) -> Any:
    return part


def by_value(part: Any) -> Any:
    """What a worker sends: small tensors as arrays, through the queue.

    For shared memory our process has to ask the worker for a handle, which answers between its other work.
    """
    small = {name: value for name, value in part.items() if isinstance(value, Tensor)}
    return part | {name: value.numpy() for name, value in small.items() if value.nbytes <= BY_VALUE}


def join(parts: Sequence[Part], pin: bool) -> Batch:
    """The batch that the workers' parts make together, its image in pinned memory if asked."""
    fields: dict[str, Any] = {}
    parts = [part for part in parts if len(part["n"])] or parts[:1]  # an empty one has no shape
    for name, first in parts[0].items():
        values = [part[name] for part in parts]
        if isinstance(first, list):
            fields[name] = [item for value in values for item in value]
            continue
        if first.nbytes <= SMALL:
            fields[name] = torch.from_numpy(np.concatenate(values))
            continue
        values = [torch.as_tensor(value) for value in values]
        if len(parts) == 1 and not pin:
            (fields[name],) = values
        else:
            shape = (sum(map(len, values)), *first.shape[1:])
            out = torch.empty(shape, dtype=values[0].dtype, pin_memory=pin)
            fields[name] = torch.cat(values, out=out)
    return Batch(**fields)


@dataclass(frozen=True)
class After:
    """A first stage, less the `done` micro-batches that were made before its workers were lost."""

    places: Callable[[], Iterator[Any]]
    done: int

    def __call__(self) -> Iterator[Any]:
        return islice(self.places(), self.done, None)


class Loader:
    """Batches of a pipeline; each `iter` begins at the pipeline's start again.

    Workers that die (killed for their memory, a crash in a decoder) are replaced at the batch that was
    reached, so nothing is lost or repeated. Raises `InputError` where that does not help `REBUILDS` times.
    """

    def __init__(
        self,
        pipeline: wds.DataPipeline,
        workers: int = 0,
        prefetch_factor: int | None = None,
        context: str | None = None,
        pin: bool = False,
    ) -> None:
        self.pipeline, self.workers, self.pin = pipeline, workers, pin
        self.options: dict[str, Any] = {}
        if workers:
            set_forkserver_preload(["__main__", "ldm.data.stages"])  # importing torch takes seconds
            self.options = {"prefetch_factor": prefetch_factor, "multiprocessing_context": context}

    def __iter__(self) -> Iterator[Batch]:
        if not self.workers:
            for part in self._parts(0):
                yield join([part], self.pin)
            return
        done = lost = 0
        while True:
            crew = Crew(lambda at=done: self._parts(at), self.workers, self.pin)  # type: ignore[misc]
            try:
                for batch in crew:
                    done, lost = done + 1, 0
                    yield batch
                return
            except WorkerLostError as error:
                lost += 1
                if lost > REBUILDS:
                    what = f"{error}, {lost} times at the same place"
                    fix = f"if memory ran out, lower data.num_workers={self.workers}, or give it more"
                    raise InputError("data.num_workers", what, fix, every_rank=True) from None
                log.warning("%s: its loader starts again at the batch that it had reached", error)
            finally:
                crew.close()

    def _parts(self, done: int) -> Iterator[Part]:
        """What the workers make in turn, after `done` micro-batches; starts them."""
        first, *rest = self.pipeline.pipeline
        return iter(
            DataLoader(
                wds.DataPipeline(After(first, done), *rest) if done else self.pipeline,
                batch_size=None,
                num_workers=self.workers,
                collate_fn=by_value if self.workers else as_is,
                worker_init_fn=outlive_signals,
                generator=torch.Generator(),  # the default one would be advanced: our numbers are keyed
                **self.options,
            )
        )


class WorkerLostError(RuntimeError):
    """A worker process ended before its work did."""


class Crew:
    """Worker processes, and a thread that joins (and pins) what they make: the training step does not wait.

    It is at most one batch ahead of what was asked for, beside what the workers prefetch.
    """

    def __init__(self, start: Callable[[], Iterator[Part]], workers: int, pin: bool) -> None:
        before = set(active_children())
        with children_may_die():
            parts = start()
        self.processes = [child for child in active_children() if child not in before]
        self.workers, self.pin = workers, pin
        self.batches: queue.Queue[Batch | Exception | None] = queue.Queue(maxsize=1)
        self.closing = threading.Event()
        self.thread = threading.Thread(target=self._work, args=(parts,), name="loader", daemon=True)
        self.thread.start()

    def _work(self, parts: Iterator[Part]) -> None:
        try:
            while group := list(islice(parts, self.workers)):  # the loader takes its workers in turn
                if self._put(join(group, self.pin)):
                    return
            self._put(None)
        except Exception as error:  # a worker's own, or of one that is gone: the main thread finds out
            self._put(error)

    def _put(self, item: Batch | Exception | None) -> bool:
        """Whether nobody waits for it any more."""
        while not self.closing.is_set():
            with contextlib.suppress(queue.Full):
                self.batches.put(item, timeout=LOOK)
                return self.closing.is_set()
        return True

    def __iter__(self) -> Iterator[Batch]:
        while True:
            try:
                item = self.batches.get(timeout=LOOK)
            except queue.Empty:
                self._require_workers()
                continue
            if item is None:
                return
            if isinstance(item, Exception):
                time.sleep(LOOK)  # its process may still be about to end
                self._require_workers()
                raise item
            yield item

    def _require_workers(self) -> None:
        """The thread cannot tell: it may wait for the rest of a message that a dead worker began."""
        for process in self.processes:
            if process.exitcode:
                code = process.exitcode
                how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
                raise WorkerLostError(f"a loader worker (pid {process.pid}) {how}")
        if len(self.processes) < self.workers:
            raise WorkerLostError("a loader worker died as it started")

    def close(self) -> None:
        """End thread and processes; at once if one of those is dead, for then the thread may never end."""
        self.closing.set()
        with contextlib.suppress(queue.Empty):
            self.batches.get_nowait()
        if not any(process.exitcode for process in self.processes):
            self.thread.join(CLOSE)
        if self.thread.is_alive():
            for process in self.processes:
                process.kill()


@contextmanager
def children_may_die() -> Iterator[None]:
    """Undo the handler that a DataLoader sets: it raises in the main thread, at any line of a step."""
    before = signal.getsignal(signal.SIGCHLD)
    try:
        yield
    finally:
        if before is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGCHLD, before)


def outlive_signals(worker: int) -> None:
    """Signals go to all processes of a job or a terminal: the trainer saves first, and then ends its workers.

    TERM is also how a stuck worker is got rid of, so that one only gives it time.
    """
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.setitimer(signal.ITIMER_REAL, OUTLIVE))


class FiniteLoader(Loader):
    """A loader that ends: validation."""

    def __init__(self, pipeline: wds.DataPipeline, length: int, **options: Any) -> None:
        super().__init__(pipeline, **options)
        self.length = length

    def __len__(self) -> int:
        return self.length
