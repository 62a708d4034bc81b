"""Scan many shards: in parallel, with a progress bar, each stored at once so that a stopped scan goes on."""

from __future__ import annotations

import logging
import multiprocessing
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from ldm.data.parts import Facts, Piece, load_facts, part_path, save_part
from ldm.data.remote import public
from ldm.data.scan import scan_shard
from ldm.data.storage import is_remote
from ldm.errors import InputError

PATIENCE = 2.0  # seconds before a progress bar appears
PAUSES = (1.0, 4.0, 16.0)  # seconds before a shard behind a network is tried again
log = logging.getLogger(__name__)


class Job(NamedTuple):
    """One shard to index: its number, path, bytes, and key in the cache."""

    number: int
    path: str
    size: int
    key: str


def scan(job: Job, folder: Path | None, checksums: bool) -> Piece:
    """Index one shard and store its part; its rows stay in memory if there is no folder for it."""
    for pause in (*PAUSES, None):
        try:
            part = scan_shard(job.path, checksums)
            break
        except OSError as error:
            final = isinstance(error, (FileNotFoundError, PermissionError)) or not is_remote(job.path)
            if final or pause is None:
                what = f"{public(job.path)}: {error.strerror or error}"
                raise InputError("data.shards", what, "check that it can be read") from None
            time.sleep(pause)
    if folder is None:
        return Facts.of(part), part.samples
    path = part_path(folder, job.path, job.key)
    try:
        return save_part(part, path), path
    except OSError as error:
        fix = "make room, or give another folder; what is indexed stays"
        raise InputError(str(folder), f"cannot be written: {error.strerror or error}", fix) from None


def scan_all(
    jobs: Sequence[Job], folder: Path | None, checksums: bool, processes: int, progress: bool
) -> Iterator[tuple[Job, Piece]]:
    """Each job with its part, as they are done."""
    begun, done = time.monotonic(), 0
    bar = _Bar(jobs, progress)
    try:
        for job, result in _results(jobs, folder, checksums, processes):
            done += job.size
            bar.advance(job, done, begun)
            yield job, result
    finally:
        bar.close()


def _results(
    jobs: Sequence[Job], folder: Path | None, checksums: bool, processes: int
) -> Iterator[tuple[Job, Piece]]:
    if processes <= 1 or len(jobs) <= 1:
        for job in jobs:
            yield job, scan(job, folder, checksums)
        return
    # spawned: a process with threads or a GPU must not be forked
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(min(processes, len(jobs)), context)
    try:
        left = iter(jobs)
        running: dict[Future[Piece], Job] = {}
        while True:
            for job in islice(left, 2 * processes - len(running)):
                running[pool.submit(scan, job, folder, checksums)] = job
            if not running:
                break
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                yield running.pop(future), future.result()
    except BrokenProcessPool:
        what = "a process that read shards was killed, perhaps for memory"
        raise InputError("index", what, "run it again, with fewer --processes: it goes on") from None
    finally:
        pool.shutdown(cancel_futures=True)


def stored(folder: Path, job: Job, checksums: bool) -> Piece | None:
    """A part of a former scan that knows enough."""
    path = part_path(folder, job.path, job.key)
    facts = load_facts(path)
    return (facts, path) if facts is not None and (facts.checked or not checksums) else None


class _Bar:
    """A progress bar on a terminal from the moment that it takes long."""

    def __init__(self, jobs: Sequence[Job], progress: bool) -> None:
        self.bar = None
        if not progress:
            return
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        console = Console(stderr=True)
        rate = TextColumn("{task.fields[rate]}")
        columns = ("indexing shards", BarColumn(), MofNCompleteColumn(), rate, TimeRemainingColumn())
        self.bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self.task = self.bar.add_task("", total=len(jobs), rate="")

    def advance(self, job: Job, done: int, begun: float) -> None:
        if self.bar is None:
            return
        seconds = time.monotonic() - begun
        if seconds > PATIENCE and not self.bar.live.is_started:
            self.bar.start()
        self.bar.update(self.task, advance=1, rate=f"{done / 1e6 / max(seconds, 1e-6):,.0f} MB/s")

    def close(self) -> None:
        if self.bar is not None:
            self.bar.stop()
