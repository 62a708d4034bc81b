"""Reads that may fail, hang or lag: tried again, given up in time, asked a second time.

An event loop on a thread of its own waits for what happens on other threads, the hands: so a retry that is
due in 16 seconds, or a read that hangs for ever, holds up nothing but itself. Knows nothing of shards.
"""

from __future__ import annotations

import asyncio
import random
import statistics
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from itertools import count
from queue import SimpleQueue
from typing import Any, TypeVar

T = TypeVar("T")
Task = Callable[[], None]
KNOWN = 16  # reads whose median is trusted
LATE = 2.0  # seconds after which a read is late while the median is not known
SOON = 0.1  # seconds: no read is late before
HEDGES = 0.1  # second requests a read at most: when all is slow they would make it slower


class Hands:
    """Daemon threads, as many as there is work for; one that hangs is replaced by the next."""

    def __init__(self) -> None:
        self.tasks: SimpleQueue[Task | None] = SimpleQueue()
        self.lock = threading.RLock()
        self.idle = 0  # threads that wait and have not been promised a task
        self.closed = False

    def submit(self, work: Callable[[], T]) -> Future[T]:
        future: Future[T] = Future()

        future.set_running_or_notify_cancel()  # from here on nobody can cancel it

        def task() -> None:
            try:
                future.set_result(work())
            except BaseException as error:
                future.set_exception(error)

        with self.lock:
            self.idle -= 1
            new = self.idle < 0
            self.idle += new
        if new:
            threading.Thread(target=self._work, args=(task,), daemon=True, name="ldm read").start()
        else:
            self.tasks.put(task)
        return future

    def _work(self, task: Task | None) -> None:
        while task is not None:
            task()
            task = None  # lets go of the result, too
            with self.lock:
                if self.closed:
                    return
                self.idle += 1
            task = self.tasks.get()

    def close(self) -> None:
        with self.lock:
            self.closed = True
            for _ in range(self.idle):
                self.tasks.put(None)


class Attempts:
    """Does reads with time limits (seconds) and retries; `threads` of them at once, and those that are late.

    Waits backoff, 2 backoff, 4 backoff, ... and up to a quarter more between attempts. `deadline` is for all
    attempts of a read together. Errors of the kind `final` are not tried again.
    """

    def __init__(
        self,
        timeout: float,
        deadline: float,
        retries: int,
        backoff: float,
        threads: int,
        final: type[OSError],
    ) -> None:
        self.timeout, self.deadline, self.retries, self.backoff = timeout, deadline, retries, backoff
        self.threads, self.final = threads, final
        self.counts: Counter[str] = Counter()  # "reads", "retries", "hedges"
        self.seconds: deque[float] = deque(maxlen=64)  # of recent reads, see `took`
        self.hands = Hands()
        self.jitter = random.Random()
        ready: Future[None] = Future()
        threading.Thread(
            target=lambda: asyncio.run(self._serve(ready)), daemon=True, name="ldm reads"
        ).start()
        ready.result()

    async def _serve(self, ready: Future[None]) -> None:
        self.loop, self.stop = asyncio.get_running_loop(), asyncio.Event()
        self.slots, self.news = asyncio.Semaphore(self.threads), asyncio.Event()
        ready.set_result(None)
        await self.stop.wait()

    def start(self, coroutine: Coroutine[Any, Any, T]) -> Future[T]:
        """Run it on the event loop."""
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop)

    def close(self) -> None:
        """Cancel what is under way; a read that hangs keeps its thread until it ends."""
        if not self.hands.closed:
            self.hands.close()
            self.loop.call_soon_threadsafe(self.stop.set)

    def took(self, seconds: float) -> None:
        """Tell how long a read over the network took: what is late is measured by it."""
        self.seconds.append(seconds)

    async def __call__(self, read: Callable[[], T], hopeless: Callable[[], bool], hedge: bool) -> T:
        """Its result, or the `OSError` of the last attempt; ends early when `hopeless` (see `wake`)."""
        end = 0.0
        for attempt in count():
            await self.slots.acquire()
            end = end or time.monotonic() + self.deadline
            try:
                return await self._once(read, min(self.timeout, end - time.monotonic()), hedge)
            except OSError as error:
                pause = self.backoff * 2**attempt * (1 + self.jitter.random() / 4)
                last = attempt == self.retries or isinstance(error, self.final)
                if last or time.monotonic() + pause >= end or await self._pause(pause, hopeless):
                    raise
            self.counts["retries"] += 1
        raise AssertionError("counted to the end")

    async def once(self, read: Callable[[], T]) -> T:
        """Its result, without a second attempt; raises `TimeoutError`, too."""
        await self.slots.acquire()
        return await self._once(read, self.timeout, False)

    async def _once(self, read: Callable[[], T], limit: float, hedge: bool) -> T:
        """One attempt, in a slot taken before; a late one gives it up, and may be asked for a second time."""
        end = time.monotonic() + limit
        self.counts["reads"] += 1
        tries = [asyncio.wrap_future(self.hands.submit(read))]
        try:
            try:
                done, _ = await asyncio.wait(tries, timeout=min(limit, self._late()))
            finally:
                self.slots.release()
            if done:
                return tries[0].result()
            if hedge and self.counts["hedges"] < HEDGES * self.counts["reads"]:
                self.counts["hedges"] += 1
                tries.append(asyncio.wrap_future(self.hands.submit(read)))
            pending = set(tries)
            while pending:
                left = max(0.0, end - time.monotonic())
                done, pending = await asyncio.wait(pending, timeout=left, return_when="FIRST_COMPLETED")
                if not done:
                    raise TimeoutError(f"no answer within {limit:.3g} s")
                good = [future for future in done if future.exception() is None]
                if good:
                    return good[0].result()
            return tries[0].result()
        finally:
            for future in tries:
                future.cancel()  # what comes of it now is nobody's concern

    def _late(self) -> float:
        if len(self.seconds) < KNOWN:
            return LATE
        return max(SOON, 3 * statistics.median(self.seconds.copy()))

    async def _pause(self, seconds: float, hopeless: Callable[[], bool]) -> bool:
        """Wait; True as soon as there is no hope."""
        end = time.monotonic() + seconds
        while not hopeless():
            try:
                await asyncio.wait_for(self.news.wait(), end - time.monotonic())
            except TimeoutError:
                return hopeless()
        return True

    def wake(self) -> None:
        """Have those that wait look again whether there is hope. On the event loop only."""
        self.news.set()
        self.news = asyncio.Event()
